// The only file that shows what a kernel does: who touches which row when, and the bytes that cross the memory bus.

import { shown } from "./numbers.js";
import { flag, rect, segment, text } from "./plot.js";

const SMALL = 6; // rows that are drawn
// By engine: operators, each over all rows before the next one; or passes over a row before the next row.
// full: readings and writings of a number of the row; "cached" ones stay in a core's first cache.
const ENGINES = {
  chain: { byRow: false, steps: [["x²", 1, 1], ["mean", 1, 0], ["x · r", 1, 1], ["· w", 1, 1]] },
  rms: { byRow: true, steps: [["Σ x²", 1, 0], ["x · r · w", "cached", 1]] },
  layer: { byRow: true, steps: [["Σ x", 1, 0], ["Σ (x − m)²", "cached", 0], ["(x − m) · r · w + b", "cached", 1]] },
};
const ITEM = { float32: 4, bfloat16: 2 };

function compute({ engine, step, rows, dtype }) {
  const { byRow, steps } = ENGINES[engine], events = [];
  const outer = byRow ? SMALL : steps.length, inner = byRow ? steps.length : SMALL;
  for (let i = 0; i < outer; i++) for (let j = 0; j < inner; j++) {
    const [name, reads, writes] = steps[byRow ? j : i];
    events.push({ name, row: byRow ? i : j, reads: reads === "cached" ? 0 : reads, cached: reads === "cached",
      writes });
  }
  const done = events.slice(0, Math.round(step / 12 * events.length));
  const count = list => list.reduce((total, e) => total + e.reads + e.writes, 0) / SMALL;
  const passes = Object.fromEntries(Object.entries(ENGINES).map(([name, { steps: all }]) =>
    [name, all.reduce((total, [, reads, writes]) => total + (reads === "cached" ? 0 : reads) + writes, 0)]));
  return { events, done, now: done.at(-1), crossed: count(done), passes,
    bytes: passes[engine] * rows * 4096 * ITEM[dtype] };
}

export const passes = {
  right: "seven",
  live: { name: "cost", asks: ({ rows, dtype }) => ({ rows, dtype }) },
  controls: {
    engine: { kind: "choice", options: ["chain", "rms", "layer"], start: "chain" },
    step: { kind: "slider", stops: Array.from({ length: 13 }, (_, i) => i), start: 7,
      words: v => `${Math.round(100 * v / 12)} %` },
    rows: { kind: "slider", stops: [1, 128, 4096, 32768], start: 4096, words: v => `${v} × 4096` },
    dtype: { kind: "choice", options: ["float32", "bfloat16"], start: "float32" },
  },
  compute,
  draw({ width, t, state, result, guess, mine, data }) {
    const { engine } = state, lane = (width - 24) / 2, h = 20;
    let body = text(0, 16, t("memory"), "name") + text(lane + 24, 16, t("written"), "name");
    for (let row = 0; row < SMALL; row++) {
      const y = 26 + row * (h + 4), of = result.done.filter(e => e.row === row),
        last = result.now?.row === row ? result.now : null;
      const state = { read: of.some(e => e.reads), now: last?.reads, cached: last?.cached };
      body += rect(0, y, lane, h, `cell ${Object.keys(state).filter(key => state[key]).join(" ")}`);
      const written = of.filter(e => e.writes).length;
      body += rect(lane + 24, y, lane, h, `cell${written ? " written" : ""}${last?.writes ? " now" : ""}`);
      if (written > 1) body += text(lane + 32, y + 15, `× ${written}`, "value bare");
      if (last) body += text(8, y + 15, `${last.name}${last.cached ? `  (${t("cache")})` : ""}`, "value bare");
    }
    let top = 26 + SMALL * (h + 4) + 30;
    const chart = (title, rows, unit, marked) => {
      const left = Math.min(150, 0.36 * width), most = 1.3 * Math.max(...rows.map(([, v]) => v), marked ?? 0);
      body += text(0, top, title, "name");
      rows.forEach(([name, value, cls], i) => {
        const y = top + 12 + 28 * i, length = (width - left) * value / most;
        body += text(left - 8, y + 15, name, "tick", "end") + rect(left, y, length, 20, `area ${cls}`)
          + text(left + length + 6, y + 15, `${shown(value, 3)}${unit}`, "value");
      });
      const bottom = top + 12 + 28 * rows.length;
      if (marked) {
        const x = left + (width - left) * marked / most;
        body += segment(x, top + 8, x, bottom, "line guess")
          + flag(x, bottom + 12, mine, x > 0.7 * width ? "end" : "start");
      }
      top = bottom + (marked ? 40 : 26);
    };
    chart(t("passes"), Object.entries(result.passes).map(([name, v]) =>
      [t(`engine.${name}`), v, name === engine ? "rms" : "soft"]), "", GUESSED[guess]);
    const cost = data.measured.cost;
    if (cost?.seconds) {
      const unit = Math.max(...Object.values(cost.seconds)) < 1e-3 ? ["µs", 1e6] : ["ms", 1e3];
      chart(`${t("time")}, ${cost.shape}, ${cost.dtype}`,
        Object.entries(cost.seconds).map(([name, s]) =>
        [name, s * unit[1], name.startsWith("rmsnorm") ? "rms" : "soft"]), ` ${unit[0]}`);
    }
    return { height: top, body };
  },
  numbers: ({ crossed, passes: all, bytes }, { engine }) => ({ crossed, passes: all[engine], bytes }),
  quotes: ({ passes: all }) => ({ chain: all.chain, kernel: all.rms, layer: all.layer }),
};
const GUESSED = { two: 2, three: 3, seven: 7, twenty: 20 };
