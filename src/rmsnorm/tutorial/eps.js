// The only file that shows what eps is for: a row of zeros, and rows that are not far above its root.

import { rmsBackward, round, rms, norm } from "./numbers.js";
import { axes, decades, dot, flag, text } from "./plot.js";

const SIZES = Array.from({ length: 31 }, (_, i) => Number((10 ** (-7 + i / 3)).toPrecision(6)));
const GUESSED = { zero: 0, one: 1, nan: 1.3, error: 1.3 };
const DIRECTION = [1, 5, 1, 3].map(v => v / 3); // its rms is 1

function compute({ eps, size }) {
  const of = x => rms(norm("rms", x, eps));
  const inside = SIZES.map(s => of(DIRECTION.map(v => s * v)));
  const outside = SIZES.map(s => s / (s + eps));
  const zeros = [0, 0, 0, 0], zero = norm("rms", zeros, eps)[0];
  return {
    eps, size, inside, outside, zero,
    here: of(DIRECTION.map(v => size * v)),
    gradient: rmsBackward(zeros, [1, 0, 0, 0], eps)[0],
    half: round(eps, "float16"),
  };
}

export const eps = {
  right: "nan",
  controls: {
    eps: { kind: "slider", stops: [0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1], start: 0 },
    size: { kind: "slider", stops: SIZES.filter((_, i) => i % 3 === 0), start: 1e-3 },
  },
  compute,
  draw({ width, t, result, guess, mine }) {
    const strip = 78, top = 44, height = 190;
    const yticks = [[0, "0"], [0.5, "0.5"], [1, "1"], [1.3, "NaN"]];
    const left = axes({ left: 44, top, width: strip, height, x: [0, 1], y: [-0.1, 1.45], yticks,
      xticks: [[0.5, t("zeros")]] });
    const plot = axes({
      left: strip + 62, top, width: width - strip - 74, height, x: [1e-7, 1e3], y: [-0.1, 1.45], log: "x",
      xticks: decades(1e-7, 1e3, 2), yticks: [0, 0.5, 1].map(v => [v, ""]), xname: t("size"),
    });
    let body = text(0, 14, t("out"), "name") + left.out + plot.out;
    body += plot.line(SIZES.map((s, i) => [s, result.outside[i]]), "dashed layer")
      + plot.line(SIZES.map((s, i) => [s, result.inside[i]]), "rms");
    if (result.eps) {
      const knee = Math.sqrt(result.eps);
      body += plot.mark(knee) + text(plot.X(knee) + 4, top + 14, "√ε", "value");
    }
    body += dot(plot.X(result.size), plot.Y(result.here), 6, "area rms");
    if (guess) body += dot(left.X(0.3), left.Y(GUESSED[guess]), 8, "guess")
      + flag(44, 36, guess === "error" ? `${mine}: ${t("option.error")}` : mine);
    body += dot(left.X(0.65), left.Y(Number.isNaN(result.zero) ? 1.3 : result.zero), 6, "area rms");
    return { height: top + height + 44, body };
  },
  numbers: ({ here, zero, gradient, half }) => ({ here, zero, gradient, half }),
  quotes: () => {
    const { zero, gradient, here } = compute({ eps: 1e-5, size: Math.sqrt(1e-5) });
    return { eps: 1e-5, knee: Math.sqrt(1e-5), left: here, zero, gradient, tiny: 1e-8, half: round(1e-8, "float16"),
      smallest: 2 ** -24 };
  },
};
