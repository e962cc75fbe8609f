// The only file that draws what this project's own experiment found: docs/study, five seeds, 95 % bands.

import { shown } from "./numbers.js";
import { axes, dot, even, flag, segment, text } from "./plot.js";

const LOOKS = { none: "soft", batch: "batch", layer: "layer", rms: "rms", "rms-plain": "rms", prms: "x" };

function compute({ view }, { study: { arms } }) {
  const rows = Object.entries(arms).map(([name, arm]) => {
    const [middle, band] = { loss: arm.loss, difference: arm.difference, rate: [arm.stable, 0] }[view] ?? [0, 0];
    return { name, middle, band, open: view === "rate" && arm.at_least };
  });
  return { view, rows, arms };
}
const signed = v => `${v < 0 ? "−" : "+"}${Math.abs(v).toFixed(3)}`;

export const study = {
  right: "layer",
  controls: { view: { kind: "choice", options: ["loss", "difference", "rate"], start: "difference" } },
  compute,
  draw({ width, t, result, guess, mine, data }) {
    const { rows, view } = result, left = Math.min(150, 0.34 * width), step = 34, height = step * rows.length;
    const ends = rows.flatMap(({ middle, band }) => [middle - band, middle + band]), low = Math.min(...ends),
      high = Math.max(...ends);
    const edge = view === "rate" ? [0.002, 0.512] : [low - 0.08 * (high - low), high + 0.12 * (high - low)];
    const ticks = view === "rate" ? [0.004, 0.016, 0.064, 0.256].map(v => [v, v])
      : even(Math.ceil(edge[0] * 5) / 5, Math.floor(edge[1] * 5) / 5, 3);
    const plot = axes({ left, top: 30, width: width - left - 12, height, x: edge, y: [0, 1],
      log: view === "rate" ? "x" : "", xticks: ticks, xname: t(`axis.${view}`) });
    let body = plot.out;
    if (view === "difference") body += segment(plot.X(0), 30, plot.X(0), 30 + height, "axis");
    rows.forEach(({ name, middle, band, open }, i) => {
      const y = 30 + step * (i + 0.5), cls = LOOKS[name];
      body += text(left - 8, y + 5, t(`arm.${name}`), "tick", "end");
      if (band) body += segment(plot.X(middle - band), y, plot.X(middle + band), y, `line ${cls}`);
      body += dot(plot.X(middle), y, 6, `area ${cls}`) + (open ? text(plot.X(middle) + 9, y + 5, "→", "value") : "");
      if ((GUESSED[guess] ?? guess) === name) body += flag(plot.X(middle), y - 9, mine,
        middle > (edge[0] + edge[1]) / 2 ? "end" : "start");
    });
    return { height: 30 + height + 44, body };
  },
  numbers: ({ arms }) => Object.fromEntries(["none", "batch", "layer", "rms"].map(name =>
    [name, `${arms[name].loss[0].toFixed(3)} ± ${arms[name].loss[1].toFixed(3)}`])),
  quotes: (_, { study: s }) => ({
    difference: `${(-s.arms.layer.difference[0]).toFixed(3)} ± ${s.arms.layer.difference[1].toFixed(3)}`,
      seeds: s.seeds, date: s.date,
    none: `${signed(s.arms.none.difference[0])} ± ${s.arms.none.difference[1].toFixed(3)}`, low: s.arms.none.stable,
      high: s.arms.rms.stable,
    step: s.step[1].toFixed(3), fast: s.step[0].toFixed(3), slow: s.step[2].toFixed(3),
  }),
};
const GUESSED = { tie: "rms" };
