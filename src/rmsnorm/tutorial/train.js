// The only file that trains in front of the reader: four arms in turns, a few milliseconds of every frame.

import { filled, mapped, mean, range } from "./numbers.js";
import { LETTERS, create, encode, frequencies, step } from "./model.js";

const LOOKS = { none: "x", batch: "batch", layer: "layer", rms: "rms" }, KINDS = Object.keys(LOOKS);
const STEPS = 600, EVERY = 12, BUDGET = 10, HOPELESS = 2 * Math.log(LETTERS.length); // twice what a uniform guess has
let race = null;

/** The arms at this rate and seed, as far as they are; a new race where either has changed. */
export function compute({ rate, seed }, { corpus }) {
  if (race?.rate !== rate || race.seed !== seed) {
    const data = encode(corpus);
    const models = mapped(LOOKS, (_, kind) => create(kind, data, seed));
    race = { rate, seed, models, away: {}, letters: frequencies(data) };
  }
  const arms = mapped(race.models, ({ losses }) => range(Math.floor(losses.length / EVERY),
    i => [EVERY * (i + 1), mean(losses.slice(EVERY * i, EVERY * (i + 1)))]));
  return { ...race, arms, step: Math.max(...Object.values(race.models).map(model => model.losses.length)),
    parameters: race.models.rms.count };
}

/** Trains for a few milliseconds, the arm that is behind first; false if there was nothing left to do. */
function advance() {
  const end = performance.now() + BUDGET;
  let trained = false;
  while (performance.now() < end) {
    const left = Object.values(race.models).filter(({ kind, losses }) => !(kind in race.away) && losses.length < STEPS);
    if (!left.length) break;
    const model = left.reduce((a, b) => (b.losses.length < a.losses.length ? b : a));
    step(model, race.rate);
    trained = true;
    if (!(model.losses.at(-1) < HOPELESS)) race.away[model.kind] = model.losses.length;
  }
  return trained;
}

function sentence({ arms, away, step: at, rate }, t) {
  const name = kind => t(`option.${kind}`), gone = Object.keys(away).sort((a, b) => away[a] - away[b]);
  if (at < STEPS && !gone.length) return t("seen.wait");
  const loss = kind => arms[kind].at(-1)?.[1], last = KINDS.filter(kind => !(kind in away) && loss(kind));
  const [first] = last.sort((a, b) => loss(a) - loss(b));
  const best = first ? filled(t("seen.best"), { name: name(first), loss: loss(first).toFixed(2) }) : "";
  return filled(t(gone.length ? "seen.away" : "seen.all"), { rate, names: gone.map(name).join(", "), best });
}

export const right = "none";
export const controls = {
  rate: { stops: [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2], start: 0.3 },
  seed: { stops: [1, 2, 3, 4, 5], start: 1 },
};
export { loss as code } from "./model.js";
export const attach = ({ later }) => () => { // after each drawing; goes on when a control has begun a new race
  if (advance()) later();
};

export function draw(d, { t, result: { arms, away, letters }, guess }) {
  const named = kind => t(kind === "none" ? "short.none" : `option.${kind}`), top = 48;
  const plot = d.axes({ top, height: 220, x: [0, STEPS], y: [1.5, 4.5], xticks: 4, yticks: 3,
    xname: t("steps"), title: t("loss"),
    legend: KINDS.map(kind => [d.width < 520 ? named(kind).replace("Norm", "") : named(kind), LOOKS[kind]]) });
  plot.line([[0, letters], [STEPS, letters]], "soft dashed");
  KINDS.forEach((kind, i) => {
    plot.line(arms[kind], LOOKS[kind]);
    if (kind in away) d.text(Math.min(plot.X(away[kind]) + 6, d.width - 90), top + 16 + 15 * i, `↑ ${named(kind)}`,
      `value ink-${LOOKS[kind]}`);
    if (guess === kind) d.flag(d.width - 12, 14, "end", `: ${named(kind)}`);
  });
}

export function says(result, { t }) {
  const { arms, away } = result, last = mapped(arms, (points, kind) =>
    (kind in away ? `${t("away")} (${away[kind]})` : points.at(-1)?.[1] ?? NaN));
  return { ...last, seen: sentence(result, t) };
}
