// The only file that draws a real model: what SmolLM2's norms are given, as `rmsnorm learn` measured it.

import { filled, mean, round } from "./numbers.js";
import { axes, decades, even, flag, rect, text } from "./plot.js";

const BANDS = { tiny: [0, 10], half: [40, 60], most: [90, 100] };

function compute({ tokens }, { measured }) {
  const seen = measured.depth?.[tokens];
  if (!seen) return { why: measured.depth?.why };
  const largest = Math.max(...seen.largest), share = mean(seen.share);
  const overflows = seen.largest.filter(v => round(v * v, "float16") === Infinity).length;
  return { ...seen, most: largest, where: seen.largest.indexOf(largest) + 1, average: share, overflows };
}
const percent = v => `${(100 * v).toPrecision(3)} %`;

export const depth = {
  right: "tiny",
  live: { name: "depth", sentence: true },
  controls: { tokens: { kind: "choice", options: ["all", "rest"], start: "all" } },
  compute,
  draw({ width, t, result, guess, mine, data }) {
    if (result.why || !result.rms) return { height: 60, body: text(0, 24, t("absent"), "name")
      + text(0, 46, result.why ?? t("unmeasured"), "tick left") };
    const n = result.rms.length, least = Math.min(...result.rms), high = 10 ** Math.ceil(Math.log10(result.most)),
      low = 10 ** Math.floor(Math.log10(least));
    const sizes = axes({ left: 52, top: 48, width: width - 64, height: 170, x: [1, n], y: [low, high], log: "y",
      yticks: decades(low, high), title: t("given"), legend: [[t("largest"), "x"], ["rms", "rms"]] });
    let body = sizes.out + sizes.line(result.largest.map((v, i) => [i + 1, v]), "x")
      + sizes.line(result.rms.map((v, i) => [i + 1, v]), "rms");
    const share = axes({ left: 52, top: 256, width: width - 64, height: 110, x: [1, n], y: [0, 100],
      yticks: even(0, 100, 2), xticks: [1, 20, 40, 60].filter(v => v <= n).map(v => [v, v]), xname: t("norms"), title: t("share") });
    body += share.out
      + share.line(result.share.map((v, i) => [i + 1, 100 * v]), "layer");
    if (guess) {
      const [a, b] = BANDS[guess];
      body += rect(52, share.Y(b), width - 64, share.Y(a) - share.Y(b), "guess") + flag(width - 12, 238, mine, "end");
    }
    return { height: 412, body };
  },
  numbers: result => (result.rms ? {
    tokens: result.tokens, norms: result.rms.length, first: result.rms[0], last: result.rms.at(-1),
      largest: result.most,
    where: result.where, overflows: result.overflows, share: percent(result.average),
  } : {}),
  quotes: (_, data, t) => {
    const all = compute({ tokens: "all" }, data), rest = compute({ tokens: "rest" }, data);
    if (!all.rms) return { found: t("waiting") };
    const ends = { first: all.rms[0], last: all.rms.at(-1), largest: all.most, rest: rest.most };
    return { found: filled(t("found"), { average: percent(all.average), ...ends, overflows: all.overflows,
      left: rest.overflows }) };
  },
};
