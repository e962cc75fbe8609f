// The only file that shows what 16 bits do to a norm: squares that overflow, sums that stand still, two places to
// round.

import { filled, layerIn, meanSquare, normal, round, ulp, uniform } from "./numbers.js";
import { axes, decades, even, path } from "./plot.js";

const SIZES = [1e-4, 1e-3, 0.01, 0.1, 1, 4, 16, 64, 128, 255, 256, 661.7, 1000, 10000];
const COUNT = 1024, ROWS = 16, COLS = 256, BINS = 32;
const kept = {};
const once = (key, make) => (kept[key] ??= make());

/** The relative error of the mean of 1024 squares, added one by one in a type. */
const sumError = (size, type) => once(`${size} ${type}`, () => {
  const next = uniform(0), x = Array.from({ length: COUNT }, () => round(size * (1 + next()) / 2, type));
  const exact = x.reduce((total, v) => total + v * v, 0) / COUNT;
  return Math.abs(meanSquare(x, type) - exact) / exact;
});

/** Errors in ulps of the same rows in both orders of rounding, and the share of outputs that differ. */
const orders = dtype => once(dtype, () => {
  const noise = normal(1), w = Array.from({ length: COLS }, () => round(1 + 0.2 * noise(), dtype)),
    errors = { once: [], twice: [] };
  let differ = 0;
  for (let row = 0; row < ROWS; row++) {
    const x = Array.from({ length: COLS }, () => round(noise(), dtype)), exact = layerIn("float64", "once", x, w, 1e-6);
    const y = { once: layerIn(dtype, "once", x, w, 1e-6), twice: layerIn(dtype, "twice", x, w, 1e-6) };
    for (const order of ["once", "twice"]) errors[order].push(...y[order].map((v, i) =>
      Math.abs(v - exact[i]) / ulp(exact[i], dtype)));
    differ += y.once.filter((v, i) => v !== y.twice[i]).length;
  }
  return { errors, differ: differ / (ROWS * COLS) };
});

function compute({ size, dtype }) {
  const sums = Object.fromEntries(["float16", "bfloat16",
    "float32"].map(type => [type, SIZES.map(s => sumError(s, type))]));
  return { size, sums, at: SIZES.indexOf(size), square: round(round(size, "float16") ** 2, "float16"),
    ...orders(dtype) };
}
const worst = list => list.reduce((a, b) => Math.max(a, b), 0);

export const precision = {
  right: "256",
  live: { name: "ulps", asks: () => ({}) },
  controls: {
    size: { kind: "slider", stops: SIZES, start: 661.7 },
    dtype: { kind: "choice", options: ["bfloat16", "float16"], start: "bfloat16" },
  },
  compute,
  draw({ width, t, result, guess, mine }) {
    const colours = { float16: "batch", bfloat16: "layer", float32: "rms" }, top = 46, ceiling = 30;
    const plot = axes({
      left: 56, top, width: width - 68, height: 190, x: [1e-4, 1e5], y: [1e-9, 1000], log: "xy",
      xticks: decades(1e-4, 1e5, width < 480 ? 2 : 1), yticks: [[ceiling, "∞"], ...decades(1e-9, 1, 3)],
      xname: t("size"), title: t("sum"), legend: Object.entries(colours),
    });
    let body = plot.out + plot.mark(result.size);
    for (const [type, values] of Object.entries(result.sums)) body += plot.line(SIZES.map((s, k) =>
      [s, Number.isFinite(values[k]) ? Math.min(Math.max(values[k], 1e-9), ceiling) : ceiling]), colours[type]);
    if (guess) body += plot.flagged([[Number(guess), 1e-9], [Number(guess), 1000]], mine);
    const spread = axes({ left: 56, top: 330, width: width - 68, height: 110, x: [0, 1.6], y: [0, 1],
      xticks: even(0, 1.5, 3), xname: t("ulps"), legend: [[t("once"), "rms"], [t("twice"), "layer"]] });
    body += spread.out;
    const counts = Object.fromEntries(Object.entries(result.errors).map(([order, list]) => {
      const bins = new Array(BINS).fill(0);
      for (const e of list) bins[Math.min(BINS - 1, Math.floor(e / 1.6 * BINS))]++;
      return [order, bins];
    }));
    const most = 1.1 * Math.max(...Object.values(counts).flat());
    for (const [order, cls] of [["once", "rms"], ["twice", "layer"]]) {
      const steps = counts[order].flatMap((c, i) => [[1.6 * i / BINS, c / most], [1.6 * (i + 1) / BINS, c / most]]);
      body += path([[0, 0], ...steps, [1.6, 0]].map(([a, b]) => [spread.X(a), spread.Y(b)]), `line ${cls}`);
    }
    return { height: 490, body };
  },
  numbers: ({ square, sums, at, errors, differ }) => ({
    square, float16: sums.float16[at], bfloat16: sums.bfloat16[at], float32: sums.float32[at],
    once: worst(errors.once), twice: worst(errors.twice), differ,
  }),
  quotes: ({ errors }, data, t) => {
    const whole = Array.from({ length: 1000 }, (_, i) => i),
      first = whole.find(v => round(v * v, "float16") === Infinity);
    const kernel = data.measured.ulps?.bfloat16;
    return {
      last: first - 1, fits: (first - 1) ** 2, rounded: round((first - 1) ** 2, "float16"), first, square: first ** 2,
        spike: 661.7,
      count: COUNT, little: SIZES.find(s => !Number.isFinite(sumError(s, "float16"))),
        off: `${Math.round(100 * sumError(256, "bfloat16"))} %`,
      twice: worst(errors.twice), kernel: kernel === undefined ? "" : filled(t("kernel"), { kernel }),
    };
  },
};
