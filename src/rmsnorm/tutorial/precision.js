// The only file that shows what 16 bits do to a norm: squares that overflow, sums that stand still, two places to
// round.

import { filled, layerIn, mapped, meanSquare, normal, range, round, sum, ulps, uniform } from "./numbers.js";
import { decades } from "./plot.js";

const SIZES = [1e-4, 1e-3, 0.01, 0.1, 1, 4, 16, 64, 128, 255, 256, 661.7, 1000, 10000];
const COUNT = 1024, ROWS = 16, COLS = 256, BINS = 32, WIDEST = 1.6, CEILING = 30;
const TYPES = { float16: "batch", bfloat16: "layer", float32: "rms" }, ORDERS = { once: "rms", twice: "layer" };
const kept = {};
const keep = (key, make) => (kept[key] ??= make());

/** The relative error of the mean of 1024 squares, added one by one in a type. */
const sumError = (size, type) => keep(`${size} ${type}`, () => {
  const next = uniform(0), x = range(COUNT, () => round(size * (1 + next()) / 2, type));
  const exact = sum(x.map(v => v * v)) / COUNT;
  return Math.abs(meanSquare(x, type) - exact) / exact;
});

/** Errors in ulps of the same rows in both orders of rounding, and the share of outputs that differ. */
const orders = dtype => keep(dtype, () => {
  const noise = normal(1), some = f => range(COLS, () => round(f(noise()), dtype)), w = some(v => 1 + 0.2 * v);
  const rows = range(ROWS, () => some(v => v));
  const all = (type, order) => rows.flatMap(x => layerIn(type, order, x, w, 1e-6));
  const exact = all("float64", "once"), outputs = mapped(ORDERS, (_, order) => all(dtype, order));
  const errors = mapped(outputs, y => ulps(y, exact, dtype));
  const differ = outputs.once.filter((v, i) => v !== outputs.twice[i]).length / exact.length;
  return { errors, differ, once: Math.max(...errors.once), twice: Math.max(...errors.twice) };
});

export function compute({ size, dtype }) {
  const sums = mapped(TYPES, (_, type) => SIZES.map(s => sumError(s, type)));
  return { sums, square: round(round(size, "float16") ** 2, "float16"), ...orders(dtype),
    ...mapped(TYPES, (_, type) => sumError(size, type)) };
}

export const right = "256";
export const controls = {
  size: { stops: SIZES, start: 661.7 },
  dtype: { options: ["bfloat16", "float16"], start: "bfloat16" },
};

export function draw(d, { t, state, result, guess }) {
  const low = 1e-9, plot = d.axes({ height: 190, x: [1e-4, 1e5], y: [low, 1000], log: "xy",
    xticks: d.width < 480 ? 2 : 1, yticks: [[CEILING, "∞"], ...decades(low, 1, 3)], xname: t("size"),
    title: t("sum"), legend: Object.entries(TYPES) });
  plot.mark(state.size);
  for (const [type, values] of Object.entries(result.sums))
    plot.line(SIZES.map((s, k) => [s, Math.min(values[k], CEILING)]), TYPES[type]);
  plot.guess([[Number(guess), low], [Number(guess), 1000]]);
  const counts = mapped(result.errors, list =>
    range(BINS, i => list.filter(e => Math.min(BINS - 1, Math.floor(e / WIDEST * BINS)) === i).length));
  const spread = d.axes({ top: 330, height: 110, x: [0, WIDEST], xticks: [0, 0.5, 1, 1.5],
    y: [0, 1.1 * Math.max(...Object.values(counts).flat())], xname: t("ulps"),
    legend: Object.entries(ORDERS).map(([order, cls]) => [t(order), cls]) });
  for (const [order, bins] of Object.entries(counts))
    spread.line([[0, 0], ...bins.flatMap((c, i) => [i, i + 1].map(edge => [WIDEST * edge / BINS, c])), [WIDEST, 0]],
      ORDERS[order]);
}

export function says(_, { data, t }) {
  const first = range(1000).find(v => round(v * v, "float16") === Infinity), last = first - 1;
  const kernel = data.measured.ulps?.bfloat16;
  return { first, last, overflow: first ** 2, fits: last ** 2, rounded: round(last ** 2, "float16"), spike: 661.7,
    count: COUNT, little: SIZES.find(s => !Number.isFinite(sumError(s, "float16"))),
    off: `${Math.round(100 * sumError(256, "bfloat16"))} %`,
    kernel: kernel === undefined ? "" : filled(t("kernel"), { kernel }) };
}
