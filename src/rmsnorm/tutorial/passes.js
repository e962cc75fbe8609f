// The only file that shows what a kernel does: who touches which row when, and the bytes that cross the memory bus.

import { mapped, range, shown, sum } from "./numbers.js";

const SMALL = 6, LINE = 24; // rows that are drawn, and their height
// By engine: operators, each over all rows before the next one; or passes over a row before the next row.
// A step's readings and writings of a number of the row; one that is "cached" reads it in a core's first cache.
const ENGINES = {
  chain: { steps: [["x²", 1, 1], ["mean", 1, 0], ["x · r", 1, 1], ["· w", 1, 1]] },
  rms: { byRow: true, steps: [["Σ x²", 1, 0], ["x · r · w", 0, 1, "cached"]] },
  layer: { byRow: true, steps: [["Σ x", 1, 0], ["Σ (x − m)²", 0, 0, "cached"],
    ["(x − m) · r · w + b", 0, 1, "cached"]] },
};
const ITEM = { float32: 4, bfloat16: 2 };
const count = steps => sum(steps.map(([, reads, writes]) => reads + writes));

export function compute({ engine, step, rows, dtype }) {
  const { byRow, steps } = ENGINES[engine], n = steps.length;
  const events = range(SMALL * n, i => (byRow ? { row: Math.floor(i / n), step: steps[i % n] }
    : { row: i % SMALL, step: steps[Math.floor(i / SMALL)] }));
  const done = events.slice(0, Math.round(step / 12 * events.length)), all = mapped(ENGINES, one => count(one.steps));
  return { done, crossed: count(done.map(event => event.step)) / SMALL, all, passes: all[engine],
    bytes: all[engine] * rows * 4096 * ITEM[dtype] };
}

export const right = "7";
export const controls = {
  engine: { options: Object.keys(ENGINES), start: "chain" },
  step: { stops: range(13), start: 7, words: v => `${Math.round(100 * v / 12)} %` },
  rows: { stops: [1, 128, 4096, 32768], start: 4096, words: v => `${v} × 4096` },
  dtype: { options: ["float32", "bfloat16"], start: "float32" },
};

export function draw(d, { t, state: { engine }, result: { done, all }, guess, data }) {
  const lane = (d.width - 24) / 2, right = lane + 24;
  const last = done.at(-1), [name, , writes, cached] = last?.step ?? [];
  d.text(0, 16, t("memory"), "name");
  d.text(right, 16, t("written"), "name");
  for (let row = 0; row < SMALL; row++) {
    const y = 26 + row * LINE, steps = done.filter(event => event.row === row).map(event => event.step);
    const now = last?.row === row, read = steps.some(([, from]) => from), written = sum(steps.map(([, , to]) => to));
    d.rect(0, y, lane, 20, `cell ${read ? "read" : ""} ${now ? cached ?? "now" : ""}`);
    d.rect(right, y, lane, 20, `cell ${written ? "written" : ""} ${now && writes ? "now" : ""}`);
    if (written > 1) d.text(right + 8, y + 15, `× ${written}`, "value bare");
    if (now) d.text(8, y + 15, cached ? `${name}  (${t("cache")})` : name, "value bare");
  }
  let top = 56 + SMALL * LINE;
  const chart = (title, rows, unit, marked = 0) => {
    const left = Math.min(150, 0.4 * d.width), bottom = top + 12 + 28 * rows.length;
    const long = v => (d.width - left) * v / 1.3 / Math.max(marked, ...rows.map(([, value]) => value));
    d.text(0, top, title, "name");
    rows.forEach(([words, value, cls], i) => {
      const y = top + 12 + 28 * i;
      d.text(left - 8, y + 15, words, "tick", "end");
      d.rect(left, y, long(value), 20, `area ${cls}`);
      d.text(left + long(value) + 6, y + 15, shown(value, 3) + unit, "value");
    });
    if (marked) {
      const x = left + long(marked);
      d.segment(x, top + 8, x, bottom, "line guess");
      d.flag(x, bottom + 12, x > 0.7 * d.width ? "end" : "start");
    }
    top = bottom + (marked ? 40 : 26);
  };
  chart(t("passes"), Object.entries(all).map(([key, v]) => [t(`engine.${key}`), v, key === engine ? "rms" : "soft"]),
    "", Number(guess));
  const { seconds, shape, dtype } = data.measured.cost ?? {};
  if (!seconds) return;
  const [unit, factor] = Math.max(...Object.values(seconds)) < 1e-3 ? [" µs", 1e6] : [" ms", 1e3];
  chart(`${t("time")}, ${shape}, ${dtype}`,
    Object.entries(seconds).map(([who, s]) => [who, s * factor, who.startsWith("rmsnorm") ? "rms" : "soft"]), unit);
}
