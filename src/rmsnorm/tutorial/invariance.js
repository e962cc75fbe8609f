// The only file that asks what a norm ignores: change weights or data of a = W x, run again, compare.

import { dot, mapped, normRows, normal, raised, range, rms } from "./numbers.js";

const noise = normal(7), some = (n, m) => range(n, () => range(m, noise));
const W = some(8, 5), DATA = some(6, 5), SHIFT = some(1, 5)[0];
const times = (rows, weights) => rows.map(x => weights.map(w => dot(w, x)));
const scaled = (rows, f) => rows.map((row, i) => row.map((v, j) => f(row, i, j) * v));
const plus = rows => rows.map(row => row.map((v, i) => v + SHIFT[i]));
const HOLDS_BELOW = 1e-6;

export function compute({ factor, eps }) {
  const norms = {
    BatchNorm: (x, w) => normRows("batch", times(x, w), eps),
    WeightNorm: (x, w) => times(x, scaled(w, row => 1 / Math.hypot(...row))),
    LayerNorm: (x, w) => normRows("layer", times(x, w), eps),
    RMSNorm: (x, w) => normRows("rms", times(x, w), eps),
    pRMSNorm: (x, w) => scaled(times(x, w), row => 1 / rms(row.slice(0, 2))),
  };
  const all = () => factor, only = place => (_, i) => (i === place ? factor : 1);
  const changes = {
    scale_weights: [DATA, scaled(W, all)], shift_weights: [DATA, plus(W)], scale_neuron: [DATA, scaled(W, only(3))],
    scale_data: [scaled(DATA, all), W], shift_data: [plus(DATA), W], scale_case: [scaled(DATA, only(2)), W],
  };
  const moved = mapped(changes, changed => mapped(norms, f => {
    const before = f(DATA, W).flat(), after = f(...changed).flat();
    return rms(after.map((v, i) => v - before[i])) / rms(before);
  }));
  return { moved };
}

export const right = "shift_weights";
export const controls = {
  factor: { stops: [0.1, 0.5, 2, 7, 100], start: 7 },
  eps: { stops: [0, 1e-6, 1e-3, 1], start: 0 },
};

export function draw(d, { t, result, guess }) {
  const names = Object.keys(result.moved.scale_data), first = Math.min(150, 0.36 * d.width), small = d.width < 480;
  const step = (d.width - first) / names.length, middle = j => first + (j + 0.5) * step;
  names.forEach((name, j) => d.text(middle(j), 18, small ? name.replace("Norm", "") : name,
    `${small ? "small" : "value"}${name === "RMSNorm" ? " ink-rms" : ""}`, "middle"));
  Object.entries(result.moved).forEach(([change, row], i) => {
    const y = 30 + 42 * i;
    d.text(6, y + 25, t(`change.${change}`), "tick left");
    names.forEach((name, j) => {
      const holds = row[name] < HOLDS_BELOW, sign = holds ? "✓" : "✗";
      const size = row[name] ? `10${raised(Math.floor(Math.log10(row[name])))}` : "0";
      d.rect(first + j * step + 2, y + 2, step - 4, 38, holds ? "holds" : "breaks");
      (step < 64 ? [sign, size] : [`${sign} ${size}`]).forEach((words, k, lines) =>
        d.text(middle(j), y + (lines.length > 1 ? 17 + 17 * k : 26), words, "value bare", "middle"));
    });
    if (guess === change) {
      d.rect(1, y, d.width - 2, 42, "guess");
      d.flag(0, 18);
    }
  });
}

export const says = ({ moved }) => mapped(moved, row => row.RMSNorm);
