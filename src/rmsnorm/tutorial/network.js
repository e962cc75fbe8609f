// The only file that follows one token through a network: norms off, before, behind, or on both sides of each layer.

import { norm, normal, rms, shown } from "./numbers.js";
import { axes, decades, dot, even } from "./plot.js";

const WIDTH = 64, DEPTH = 48;
const PLACES = ["none", "pre", "post", "peri"];
const LOOKS = { none: "soft", pre: "rms", post: "layer", peri: "batch" };
const CURVES = { one: () => 1, root: l => Math.sqrt(1 + l), linear: l => 1 + l, double: l => 2 ** l };
const noise = normal(3), START = Array.from({ length: WIDTH }, noise);
const MATRICES = Array.from({ length: DEPTH }, () =>
  Array.from({ length: WIDTH }, () => Array.from({ length: WIDTH }, () => noise() / 8)));

function compute({ kind, gain, depth, layer, place }) {
  const runs = {};
  for (const where of PLACES) {
    let stream = norm("rms", START);
    const steps = [{ stream: rms(stream), read: NaN, added: NaN, x: stream }];
    for (let l = 0; l < depth; l++) {
      const read = where === "pre" || where === "peri" ? norm(kind, stream) : stream;
      let added = MATRICES[l].map(row => gain * row.reduce((total, w, i) => total + w * read[i], 0));
      if (where === "peri") added = norm(kind, added);
      stream = stream.map((v, i) => v + added[i]);
      if (where === "post") stream = norm(kind, stream);
      steps.push({ stream: rms(stream), read: rms(read), added: rms(added), x: stream });
    }
    runs[where] = steps;
  }
  return { runs, at: runs[place][Math.min(layer, depth)], end: runs[place][depth].stream, depth };
}

export const network = {
  right: "root",
  controls: {
    place: { kind: "choice", options: PLACES, start: "pre" },
    kind: { kind: "choice", options: ["rms", "layer"], start: "rms" },
    gain: { kind: "slider", stops: [0.25, 0.5, 1, 1.5, 2, 3], start: 1 },
    depth: { kind: "slider", stops: [6, 12, 24, 48], start: 24 },
    layer: { kind: "slider", stops: Array.from({ length: DEPTH + 1 }, (_, i) => i), start: 12 },
  },
  compute,
  draw({ width, t, state, result, guess, mine }) {
    const { depth } = result, top = 48, all = Object.values(result.runs).flat().map(s => s.stream);
    const high = 10 ** Math.ceil(Math.log10(Math.max(...all, 10)) + 0.01), low = 0.1;
    const plot = axes({
      left: 52, top, width: width - 64, height: 210, x: [0, depth], y: [low, high], log: "y",
      xticks: even(0, depth, 4), yticks: decades(low, high, Math.max(1, Math.round(Math.log10(high) / 5))),
      xname: t("layers"), title: t("stream"), legend: PLACES.map(where => [t(`short.${where}`), LOOKS[where]]),
    });
    let body = plot.out;
    for (const where of PLACES) body += plot.line(result.runs[where].map((s, l) => [l, s.stream]),
      `${LOOKS[where]}${where === state.place ? " thick" : ""}`);
    if (guess) body += plot.flagged(result.runs.pre.map((_, l) => [l, CURVES[guess](l)]), mine);
    const l = Math.min(state.layer, depth);
    body += plot.mark(l)
      + dot(plot.X(l), Math.max(top, plot.Y(result.at.stream)), 5, `area ${LOOKS[state.place]}`);
    return { height: top + 254, body };
  },
  numbers: ({ at, end }) => ({ stream: at.stream, read: at.read, added: at.added, end }),
  quotes: () => {
    const run = extra => compute({ kind: "rms", gain: 1, depth: 24, layer: 0, place: "pre", ...extra }).end;
    return { layers: 24, pre: run({}), none: run({ place: "none" }), post: run({ place: "post" }),
      peri: run({ place: "peri", gain: 3 }), loud: run({ gain: 3 }), gain: 3 };
  },
};
