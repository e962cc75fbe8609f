// The only file that follows one token through a network: norms off, before, behind, or on both sides of each layer.

import { dot, mapped, norm, normal, range, rms } from "./numbers.js";

const WIDTH = 64, DEPTH = 48, LOOKS = { none: "soft", pre: "rms", post: "layer", peri: "batch" };
const PLACES = Object.keys(LOOKS);
const CURVES = { one: () => 1, root: l => Math.sqrt(1 + l), linear: l => 1 + l, double: l => 2 ** l };
const noise = normal(3), START = range(WIDTH, noise);
const MATRICES = range(DEPTH, () => range(WIDTH, () => range(WIDTH, () => noise() / 8)));

export function compute({ kind, gain, depth, layer, place }) {
  const runs = mapped(LOOKS, (_, where) => {
    let stream = norm("rms", START);
    const steps = [{ stream: rms(stream) }];
    for (let l = 0; l < depth; l++) {
      const read = where === "pre" || where === "peri" ? norm(kind, stream) : stream;
      let added = MATRICES[l].map(row => gain * dot(row, read));
      if (where === "peri") added = norm(kind, added);
      stream = stream.map((v, i) => v + added[i]);
      if (where === "post") stream = norm(kind, stream);
      steps.push({ stream: rms(stream), read: rms(read), added: rms(added) });
    }
    return steps;
  });
  return { runs, at: runs[place][Math.min(layer, depth)], end: runs[place][depth].stream };
}

export const right = "root";
export const controls = {
  place: { options: PLACES, start: "pre" },
  kind: { options: ["rms", "layer"], start: "rms" },
  gain: { stops: [0.25, 0.5, 1, 1.5, 2, 3], start: 1 },
  depth: { stops: [6, 12, 24, 48], start: 24 },
  layer: { stops: range(DEPTH + 1), start: 12 },
};

export function draw(d, { t, state, result: { runs, at }, guess }) {
  const { depth, place } = state, l = Math.min(state.layer, depth);
  const most = Math.max(10, ...Object.values(runs).flat().map(step => step.stream));
  const high = 10 ** Math.ceil(Math.log10(most) + 0.01), top = 48;
  const plot = d.axes({ top, height: 210, x: [0, depth], y: [0.1, high], log: "y", xticks: 4,
    yticks: Math.max(1, Math.round(Math.log10(high) / 5)), xname: t("layers"), title: t("stream"),
    legend: PLACES.map(where => [t(`short.${where}`), LOOKS[where]]) });
  for (const where of PLACES)
    plot.line(runs[where].map((step, i) => [i, step.stream]), LOOKS[where] + (where === place ? " thick" : ""));
  plot.guess(range(depth + 1, i => [i, CURVES[guess]?.(i)]));
  plot.mark(l);
  d.dot(plot.X(l), Math.max(top, plot.Y(at.stream)), 5, `area ${LOOKS[place]}`);
}
export function says({ at }) {
  const ends = gain => mapped(compute({ kind: "rms", gain, depth: 24, layer: 0, place: "pre" }).runs,
    run => run.at(-1).stream);
  return { ...at, layers: 24, gain: 3, usual: ends(1), loud: ends(3) };
}
