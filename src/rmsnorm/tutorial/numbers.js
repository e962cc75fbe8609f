// The only file that computes norms in the page: in float64, and in 16 bits as machines round, bit for bit.
// tests/tutorial/test_numbers.py holds every function here to PyTorch and to the library.

/** `count` values of a function of 0, 1, 2 … */
export const range = (count, f = i => i) => Array.from({ length: count }, (_, i) => f(i));
/** An object with the same keys. */
export const mapped = (object, f) =>
  Object.fromEntries(Object.entries(object).map(([key, value]) => [key, f(value, key)]));
export const limit = (value, most) => Math.max(-most, Math.min(most, value));

export const sum = values => values.reduce((total, value) => total + value, 0);
export const mean = values => sum(values) / values.length;
export const dot = (a, b) => a.reduce((total, value, i) => total + value * b[i], 0);
export const rms = x => Math.sqrt(dot(x, x) / x.length);
export function centred(x) {
  const middle = mean(x);
  return x.map(v => v - middle);
}
export const std = x => rms(centred(x));
export const columns = rows => rows[0].map((_, j) => rows.map(row => row[j]));
const reciprocal = (x, eps) => 1 / Math.sqrt(dot(x, x) / x.length + eps);

/** One group of numbers that share a ruler. `layer` takes the mean away first; eps stands inside the root. */
export function norm(kind, x, eps = 0) {
  if (kind === "none") return x;
  const measured = kind === "rms" ? x : centred(x), r = reciprocal(measured, eps);
  return measured.map(v => v * r);
}

/** What flows back through RMSNorm: dx = r (h − x̂ mean(h x̂)), for the gradient times the gain, h. */
export function rmsBackward(x, h, eps = 0) {
  const r = reciprocal(x, eps), along = dot(h, x) * r / x.length;
  return x.map((v, i) => r * (h[i] - v * r * along));
}

/** A batch, one token a row: `batch` has a ruler for each column, the others for each row. */
const grouped = (kind, f, ...tables) => (kind === "batch" ? columns(grouped("layer", f, ...tables.map(columns)))
  : tables[0].map((_, i) => f(kind, ...tables.map(rows => rows[i]))));
export const normRows = (kind, rows, eps = 0) => grouped(kind, (own, x) => norm(own, x, eps), rows);
/** What flows back through it: LayerNorm is RMSNorm behind a centring, and a centring's backward is a centring. */
export const backwardRows = (kind, rows, h, eps) => grouped(kind, (own, x, g) =>
  (own === "none" ? g : own === "rms" ? rmsBackward(x, g, eps) : rmsBackward(centred(x), centred(g), eps)), rows, h);

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
  return 2 ** (Math.max(exponent(value), least) - digits + 1);
}

/** How far results are off, in ulps of their type; infinite where one isn't finite. */
export const ulps = (results, exact, type) => results.map((v, i) =>
  (Number.isFinite(v) ? Math.abs(v - exact[i]) / ulp(exact[i], type) : Infinity));

/** The number of a type that is nearest to a value; of two, the even one; infinite behind the largest. */
export function round(value, type) {
  if (type === "float64" || !Number.isFinite(value)) return value;
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

/** The layer on one row of a 16-bit type: rounded once, at the end, or `twice`, as LLaMA does, before × w, too. */
export function layerIn(type, order, x, w, eps = 0) {
  const to = v => round(v, type), r = reciprocal(x.map(to), eps);
  return x.map((v, i) => to((order === "twice" ? to(to(v) * r) : to(v) * r) * to(w[i])));
}

/** Uniform numbers from 0 to 1, the same for the same seed on every machine: a Weyl sequence, mixed. */
export function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let z = Math.imul(state ^ (state >>> 16), 0x85ebca6b);
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
export const raised = p => String(p).replace(/./g, c => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻");

/** A number for readers: so many digits, powers of ten as such. */
export function shown(value, digits = 4) {
  if (typeof value !== "number" || Number.isNaN(value)) return String(value);
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  let words = String(Number.isInteger(value) && size < 1e6 ? value : Number(value.toPrecision(digits)));
  if (size >= 1e6 || (size && size < 1e-3)) {
    const [first, power] = value.toExponential(digits - 1).split("e");
    words = `${Number(first)} × 10${raised(Number(power))}`;
  }
  return words.replace("-", "−");
}
