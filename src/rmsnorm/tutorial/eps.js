// The only file that shows what eps is for: a row of zeros, and rows that are not far above its root.

import { rmsBackward, round, range, rms, norm } from "./numbers.js";

const SIZES = range(31, i => Number((10 ** (-7 + i / 3)).toPrecision(6)));
const GUESSED = { zero: 0, one: 1, nan: 1.3, error: 1.3 };
const DIRECTION = [1, 5, 1, 3].map(v => v / 3); // its rms is 1

export function compute({ eps, size }) {
  const of = s => rms(norm("rms", DIRECTION.map(v => s * v), eps)), zeros = [0, 0, 0, 0];
  return {
    inside: SIZES.map(of), outside: SIZES.map(s => s / (s + eps)), here: of(size), zero: norm("rms", zeros, eps)[0],
    gradient: rmsBackward(zeros, [1, 0, 0, 0], eps)[0], half: round(eps, "float16"),
  };
}

export const right = "nan";
export const controls = {
  eps: { stops: [0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1], start: 0 },
  size: { stops: SIZES.filter((_, i) => i % 3 === 0), start: 1e-3 },
};

export function draw(d, { t, state, result, guess }) {
  d.text(0, 14, t("out"), "name");
  const box = { top: 44, height: 190, y: [-0.1, 1.45] };
  const left = d.axes({ ...box, left: 44, width: 78, x: [0, 1], yticks: [0, 0.5, 1, [1.3, "NaN"]],
    xticks: [[0.5, t("zeros")]] });
  const plot = d.axes({ ...box, left: 140, x: [1e-7, 1e3], log: "x", xticks: 2,
    yticks: [0, 0.5, 1].map(v => [v, ""]), xname: t("size") });
  plot.line(SIZES.map((s, i) => [s, result.outside[i]]), "dashed layer");
  plot.line(SIZES.map((s, i) => [s, result.inside[i]]), "rms");
  if (state.eps) {
    const knee = Math.sqrt(state.eps);
    plot.mark(knee);
    d.text(plot.X(knee) + 4, box.top + 14, "√ε", "value");
  }
  d.dot(plot.X(state.size), plot.Y(result.here), 6, "area rms");
  if (guess) d.dot(left.X(0.3), left.Y(GUESSED[guess]), 8, "guess");
  d.flag(44, 36, "start", guess === "error" ? `: ${t("option.error")}` : "");
  d.dot(left.X(0.65), left.Y(Number.isNaN(result.zero) ? 1.3 : result.zero), 6, "area rms");
}
export const says = () => {
  const usual = { eps: 1e-5, size: Math.sqrt(1e-5) };
  return { usual: { ...usual, ...compute(usual) }, tiny: 1e-8, lost: round(1e-8, "float16"), smallest: 2 ** -24 };
};
