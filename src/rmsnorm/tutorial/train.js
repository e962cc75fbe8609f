// The only file that trains in front of the reader: four arms in turns, a few milliseconds of every frame.

import { filled } from "./numbers.js";
import { LETTERS, create, encode, frequencies, loss, step } from "./model.js";
import { axes, even, flag, text } from "./plot.js";

const KINDS = ["none", "batch", "layer", "rms"], NAMES = { batch: "BatchNorm", layer: "LayerNorm", rms: "RMSNorm" };
const STEPS = 600, EVERY = 12, BUDGET = 10, HOPELESS = 2 * Math.log(LETTERS.length); // twice what a uniform guess has
let race = null;

/** The arms at this rate and seed, as far as they are; a new race where either has changed. */
function compute({ rate, seed }, { corpus }) {
  if (race?.rate !== rate || race.seed !== seed) {
    const data = encode(corpus);
    race = { rate, seed, data, models: KINDS.map(kind => create(kind, data, seed)), away: {},
      letters: frequencies(data) };
  }
  const points = ({ losses }) => Array.from({ length: Math.floor(losses.length / EVERY) }, (_, i) =>
    [EVERY * (i + 1), losses.slice(EVERY * i, EVERY * (i + 1)).reduce((a, b) => a + b, 0) / EVERY]);
  const arms = Object.fromEntries(race.models.map(model => [model.kind, points(model)]));
  const at = Math.max(...race.models.map(model => model.losses.length));
  return { arms, at, rate, away: race.away, letters: race.letters, count: race.models[3].count };
}

const unfinished = () => race.models.filter(m => !(m.kind in race.away) && m.losses.length < STEPS);

/** Trains until the time is up; false once there is nothing left to do. */
function advance(milliseconds) {
  const end = performance.now() + milliseconds;
  while (performance.now() < end) {
    const left = unfinished();
    if (!left.length) return false;
    const model = left.reduce((a, b) => (b.losses.length < a.losses.length ? b : a));
    step(model, race.rate);
    if (!(model.losses.at(-1) < HOPELESS)) race.away[model.kind] = model.losses.length;
  }
  return true;
}

function sentence({ arms, away, at, rate }, t) {
  const name = kind => NAMES[kind] ?? t("option.none"), gone = KINDS.filter(kind => kind in away);
  const lasts = KINDS.filter(kind => !(kind in away) && arms[kind].length).map(kind => [kind, arms[kind].at(-1)[1]]);
  if (at < STEPS && !gone.length) return t("seen.wait");
  const [best] = lasts.sort((a, b) => a[1] - b[1]);
  const names = gone.sort((a, b) => away[a] - away[b]).map(name).join(", ");
  const first = t(gone.length ? "seen.away" : "seen.all"), space = first.endsWith("。") ? "" : " ";
  const lowest = best ? filled(t("seen.best"), { name: name(best[0]), loss: best[1].toFixed(2) }) : "";
  return filled(first, { rate, names }) + space + lowest;
}

export const train = {
  right: "none",
  controls: {
    rate: { kind: "slider", stops: [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2], start: 0.3 },
    seed: { kind: "slider", stops: [1, 2, 3, 4, 5], start: 1 },
  },
  compute,
  code: loss,
  attach(panel) {
    let running = false;
    const tick = () => {
      running = advance(BUDGET);
      panel.later();
      if (running) requestAnimationFrame(tick);
    };
    return () => { // after each drawing: goes on if a control began a new race
      if (running || !unfinished().length) return;
      running = true;
      requestAnimationFrame(tick);
    };
  },
  draw({ width, t, result, guess, mine }) {
    const looks = { none: "x", batch: "batch", layer: "layer", rms: "rms" }, named = kind => NAMES[kind]
      ?? t("short.none");
    const top = 48, plot = axes({
      left: 44, top, width: width - 56, height: 220, x: [0, STEPS], y: [1.5, 4.5], xticks: even(0, STEPS, 4),
      yticks: even(1.5, 4.5, 3), xname: t("steps"), title: t("loss"),
      legend: KINDS.map(kind => [width < 520 ? named(kind).replace("Norm", "") : named(kind), looks[kind]]),
    });
    let body = plot.out + plot.line([[0, result.letters], [STEPS, result.letters]], "soft dashed");
    KINDS.forEach((kind, i) => {
      const name = named(kind);
      body += plot.line(result.arms[kind].filter(([, l]) => Number.isFinite(l)), looks[kind]);
      if (kind in result.away) body += text(Math.min(plot.X(result.away[kind]) + 6, width - 90), top + 16
        + 15 * i, `↑ ${name}`, `value ink-${looks[kind]}`);
      if (guess === kind) body += flag(width - 12, 14, `${mine}: ${name}`, "end");
    });
    return { height: top + 264, body };
  },
  numbers: ({ arms, away, at }, _, t) => ({
    ...Object.fromEntries(KINDS.map(kind => [kind, kind in away ? `${t("away")} (${away[kind]})`
      : arms[kind].at(-1)?.[1] ?? NaN])), step: at,
  }),
  quotes: (result, _, t) => ({ seen: sentence(result, t), parameters: result.count }),
};
