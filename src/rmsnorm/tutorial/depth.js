// The only file that draws a real model: what SmolLM2's norms are given, as `rmsnorm learn` measured it.

import { filled, mean, round } from "./numbers.js";

const BANDS = { tiny: [0, 10], half: [40, 60], most: [90, 100] };

export function compute({ tokens }, { measured }) {
  const seen = measured.depth?.[tokens];
  if (!seen) return { why: measured.depth?.why };
  const { rms, largest, share } = seen, most = Math.max(...largest);
  return { ...seen, norms: rms.length, first: rms[0], last: rms.at(-1), most, where: largest.indexOf(most) + 1,
    average: mean(share), overflows: largest.filter(v => round(v * v, "float16") === Infinity).length };
}
const percent = v => `${(100 * v).toPrecision(3)} %`;

export const right = "tiny";
export const controls = { tokens: { options: ["all", "rest"], start: "all" } };

export function draw(d, { t, result, guess }) {
  const { rms, largest, share, norms: n, most, why } = result;
  if (!rms) {
    d.text(0, 24, t("absent"), "name");
    d.text(0, 46, why ?? t("unmeasured"), "tick left");
    return;
  }
  const power = (v, whole) => 10 ** Math[whole](Math.log10(v)), points = values => values.map((v, i) => [i + 1, v]);
  const sizes = d.axes({ height: 170, x: [1, n], y: [power(Math.min(...rms), "floor"), power(most, "ceil")], log: "y",
    yticks: 1, title: t("given"), legend: [[t("largest"), "x"], ["rms", "rms"]] });
  sizes.line(points(largest), "x");
  sizes.line(points(rms), "rms");
  const shares = d.axes({ top: 256, height: 110, x: [1, n], y: [0, 100], yticks: 2,
    xticks: [1, 20, 40, 60].filter(v => v <= n), xname: t("norms"), title: t("share") });
  shares.line(points(share.map(v => 100 * v)), "layer");
  if (!guess) return;
  const [low, high] = BANDS[guess].map(shares.Y);
  d.rect(52, high, d.width - 64, low - high, "guess");
  d.flag(d.width - 12, 238, "end");
}

export function says({ average, most }, { data, t }) {
  const all = compute({ tokens: "all" }, data), rest = compute({ tokens: "rest" }, data);
  if (!all.rms) return { found: t("waiting") };
  return { share: percent(average), largest: most,
    found: filled(t("found"), { ...all, average: percent(all.average), largest: all.most, rest: rest.most,
      left: rest.overflows }) };
}
