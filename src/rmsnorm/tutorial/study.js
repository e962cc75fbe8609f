// The only file that draws what this project's own experiment found: docs/study, five seeds, 95 % bands.

import { mapped } from "./numbers.js";

const LOOKS = { none: "soft", batch: "batch", layer: "layer", rms: "rms", "rms-plain": "rms", prms: "x" };
const fixed = v => v.toFixed(3), banded = ([middle, band]) => `${fixed(middle)} ± ${fixed(band)}`;

export function compute({ view }, { study: { arms } }) {
  const rows = Object.entries(arms).map(([name, arm]) => {
    const [middle, band] = { ...arm, rate: [arm.stable, 0] }[view] ?? [0, 0];
    return { name, middle, band, open: view === "rate" && arm.at_least };
  });
  return { rows };
}

export const right = "layer";
export const controls = { view: { options: ["loss", "difference", "rate"], start: "difference" } };

export function draw(d, { t, state: { view }, result: { rows }, guess }) {
  const left = Math.min(150, 0.34 * d.width), top = 30, step = 34, height = step * rows.length, rate = view === "rate";
  const ends = rows.flatMap(({ middle, band }) => [middle - band, middle + band]), low = Math.min(...ends),
    high = Math.max(...ends);
  const x = rate ? [0.002, 0.512] : [low - 0.08 * (high - low), high + 0.12 * (high - low)];
  const [first, last] = [Math.ceil(x[0] * 5) / 5, Math.floor(x[1] * 5) / 5];
  const plot = d.axes({ left, top, height, x, y: [0, 1], log: rate ? "x" : "", xname: t(`axis.${view}`),
    xticks: rate ? [0.004, 0.016, 0.064, 0.256] : [0, 1, 2, 3].map(i => first + (last - first) * i / 3) });
  if (view === "difference") d.segment(plot.X(0), top, plot.X(0), top + height, "axis");
  rows.forEach(({ name, middle, band, open }, i) => {
    const y = top + step * (i + 0.5), at = plot.X(middle);
    d.text(left - 8, y + 5, t(`arm.${name}`), "tick", "end");
    if (band) d.segment(plot.X(middle - band), y, plot.X(middle + band), y, `line ${LOOKS[name]}`);
    d.dot(at, y, 6, `area ${LOOKS[name]}`);
    if (open) d.text(at + 9, y + 5, "→", "value");
    if (name === (guess === "tie" ? "rms" : guess)) d.flag(at, y - 9, middle > (x[0] + x[1]) / 2 ? "end" : "start");
  });
}

export function says(_, { data: { study: { arms, seeds, date, step } } }) {
  const { none, layer, rms } = arms, [middle, band] = none.difference;
  const [fast, usual, slow] = step.map(fixed);
  return { ...mapped(arms, arm => banded(arm.loss)), seeds, date, fast, usual, slow, low: none.stable, high: rms.stable,
    difference: banded([-layer.difference[0], layer.difference[1]]),
    without: (middle < 0 ? "−" : "+") + banded([Math.abs(middle), band]) };
}
