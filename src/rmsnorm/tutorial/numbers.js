// The only file that computes norms in the page: in float64, and in 16 bits as machines round, bit for bit.
// tests/tutorial/test_numbers.py holds every function here to PyTorch and to the library.

export const sum = values => values.reduce((total, value) => total + value, 0);
export const mean = values => sum(values) / values.length;
export const rms = values => Math.sqrt(mean(values.map(v => v * v)));
export function std(values) {
  const middle = mean(values);
  return rms(values.map(v => v - middle));
}
export const dot = (a, b) => a.reduce((total, value, i) => total + value * b[i], 0);
export const columns = rows => rows[0].map((_, j) => rows.map(row => row[j]));

/** One group of numbers that share a ruler. `layer` takes the mean away first; eps stands inside the root. */
export function norm(kind, x, eps = 0) {
  if (kind === "none") return [...x];
  const middle = kind === "rms" ? 0 : mean(x);
  const centred = x.map(v => v - middle);
  const r = 1 / Math.sqrt(mean(centred.map(v => v * v)) + eps);
  return centred.map(v => v * r);
}

/** A batch, one token a row: `batch` has a ruler for each column, the others for each row. */
export const normRows = (kind, rows, eps = 0) =>
  kind === "batch" ? columns(columns(rows).map(c => norm("layer", c, eps))) : rows.map(row => norm(kind, row, eps));

/** What flows back through RMSNorm: dx = r (h − x̂ mean(h x̂)), for the gradient times the gain, h. */
export function rmsBackward(x, h, eps = 0) {
  const r = 1 / Math.sqrt(mean(x.map(v => v * v)) + eps);
  const along = dot(h, x) * r / x.length;
  return x.map((v, i) => r * (h[i] - v * r * along));
}

// Digits of the significand, and the exponents of the smallest and the largest normal number.
const TYPES = { bfloat16: [8, -126, 127], float16: [11, -14, 15], float32: [24, -126, 127] };
const double = new Float64Array(1), words = new Uint32Array(double.buffer);
function exponent(value) {
  double[0] = value;
  return ((words[1] >>> 20) & 0x7ff) - 1023;
}

/** The distance of neighbouring numbers of a type around a value: one ulp. */
export function ulp(value, type) {
  const [digits, least] = TYPES[type];
  return 2 ** (Math.max(value === 0 ? least : exponent(value), least) - digits + 1);
}

/** The number of a type that is nearest to a value; of two, the even one; infinite behind the largest. */
export function round(value, type) {
  if (type === "float64" || value === 0 || !Number.isFinite(value)) return value;
  const gap = ulp(value, type), whole = 1.5 * 2 ** 52; // adding it leaves no bit behind the point
  const nearest = (value / gap + whole - whole) * gap;
  if (Math.abs(nearest) >= 2 ** (TYPES[type][2] + 1)) return value > 0 ? Infinity : -Infinity;
  return nearest === 0 ? 0 * value : nearest; // keeps the sign of zero
}

/** The mean of the squares, every step rounded to one type. */
export function meanSquare(x, type) {
  let total = 0;
  for (const v of x) total = round(total + round(round(v, type) ** 2, type), type);
  return round(total / x.length, type);
}

/** The layer on one row of a 16-bit type, in the orders that are in use.
 *  once: float32 or better throughout, one rounding. twice: LLaMA's, rounded, then × w. narrow: `.float()` forgotten.
 *  */
export function layerIn(type, order, x, w, eps = 0) {
  const to = v => round(v, type), a = x.map(to), gain = w.map(to);
  if (order === "narrow") {
    const r = to(1 / Math.sqrt(to(meanSquare(a, type) + eps)));
    return a.map((v, i) => to(to(v * r) * gain[i]));
  }
  const r = 1 / Math.sqrt(mean(a.map(v => v * v)) + eps);
  return a.map((v, i) => (order === "twice" ? to(to(v * r) * gain[i]) : to(v * r * gain[i])));
}

/** Uniform numbers from 0 to 1, the same for the same seed on every machine: a Weyl sequence, mixed. */
export function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let z = state;
    z = Math.imul(z ^ (z >>> 16), 0x85ebca6b);
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35);
    return ((z ^ (z >>> 16)) >>> 0) / 2 ** 32;
  };
}

/** Normal numbers: mean 0, standard deviation 1. */
export function normal(seed) {
  const next = uniform(seed);
  return () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
}

/** A text with its `{names}` replaced by numbers. */
export const filled = (words, values) => words.replace(/\{([\w.]+)\}/g, (_, name) => shown(values[name]));

/** A power as superscripts. */
export const raised = p => [...String(p)].map(c => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");

/** A number for readers: so many digits, powers of ten as such. */
export function shown(value, digits = 4) {
  if (typeof value !== "number") return String(value);
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value).replace("-", "−");
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
    const [digitsOf, power] = value.toExponential(digits - 1).split("e");
    return `${String(Number(digitsOf)).replace("-", "−")} × 10${raised(Number(power))}`;
  }
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}
