// The only file that asks what a norm ignores: change weights or data of a = W x, run again, compare.

import { norm, normRows, normal, raised, rms } from "./numbers.js";
import { flag, rect, text } from "./plot.js";

const noise = normal(7), some = (n, m) => Array.from({ length: n }, () => Array.from({ length: m }, noise));
const W = some(8, 5), DATA = some(6, 5), SHIFT = some(1, 5)[0];
const times = (rows, weights) => rows.map(x => weights.map(w => w.reduce((total, v, i) => total + v * x[i], 0)));
const scaled = (rows, f) => rows.map(row => row.map(v => f * v));
const unit = rows => rows.map(row => row.map(v => v / Math.hypot(...row)));
const partial = rows => rows.map(row => row.map(v => v / rms(row.slice(0, 2))));

function compute({ factor, eps }) {
  const norms = {
    BatchNorm: (x, w) => normRows("batch", times(x, w), eps),
    WeightNorm: (x, w) => times(x, unit(w)),
    LayerNorm: (x, w) => normRows("layer", times(x, w), eps),
    RMSNorm: (x, w) => normRows("rms", times(x, w), eps),
    pRMSNorm: (x, w) => partial(times(x, w)),
  };
  const one = (rows, place) => rows.map((row, i) => (i === place ? row.map(v => factor * v) : row));
  const plus = rows => rows.map(row => row.map((v, i) => v + SHIFT[i]));
  const changes = {
    scale_weights: [DATA, scaled(W, factor)], shift_weights: [DATA, plus(W)], scale_neuron: [DATA, one(W, 3)],
    scale_data: [scaled(DATA, factor), W], shift_data: [plus(DATA), W], scale_case: [one(DATA, 2), W],
  };
  const moved = {};
  for (const [change, [x, w]] of Object.entries(changes)) {
    moved[change] = {};
    for (const [name, f] of Object.entries(norms)) {
      const before = f(DATA, W).flat(), after = f(x, w).flat();
      moved[change][name] = rms(after.map((v, i) => v - before[i])) / rms(before);
    }
  }
  return { moved };
}
const HOLDS_BELOW = 1e-6;

export const invariance = {
  right: "shift_weights",
  controls: {
    factor: { kind: "slider", stops: [0.1, 0.5, 2, 7, 100], start: 7 },
    eps: { kind: "slider", stops: [0, 1e-6, 1e-3, 1], start: 0 },
  },
  compute,
  draw({ width, t, result, guess, mine }) {
    const names = Object.keys(Object.values(result.moved)[0]), first = Math.min(150, 0.36 * width),
      step = (width - first) / names.length;
    let body = names.map((name, j) => text(first + (j + 0.5) * step, 18, width < 480 ? name.replace("Norm", "") : name,
      `${width < 480 ? "small" : "value"}${name === "RMSNorm" ? " ink-rms" : ""}`, "middle")).join("");
    Object.entries(result.moved).forEach(([change, row], i) => {
      const y = 30 + 42 * i;
      body += text(6, y + 25, t(`change.${change}`), "tick left");
      names.forEach((name, j) => {
        const holds = row[name] < HOLDS_BELOW, x = first + j * step;
        body += rect(x + 2, y + 2, step - 4, 38, holds ? "holds" : "breaks");
        const size = row[name] ? `10${raised(Math.floor(Math.log10(row[name])))}` : "0", sign = holds ? "✓" : "✗",
          middle = x + step / 2;
        body += step < 64 ? text(middle, y + 17, sign, "value bare", "middle")
          + text(middle, y + 34, size, "value bare", "middle")
          : text(middle, y + 26, `${sign} ${size}`, "value bare", "middle");
      });
      if (guess === change) body += rect(1, y, width - 2, 42, "guess") + flag(0, 18, mine);
    });
    return { height: 30 + 42 * 6 + 6, body };
  },
  numbers: ({ moved }) => Object.fromEntries(Object.entries(moved).map(([change, row]) => [change, row.RMSNorm])),
  quotes: () => ({ threshold: HOLDS_BELOW }),
};
