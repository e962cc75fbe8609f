// The only file that runs the ten lines on the reader's own numbers: each line lights up with its value, mistakes too.

import { layerIn, limit, meanSquare, rms, round, shown, sum, ulps } from "./numbers.js";
import { handle } from "./widgets.js";

const TIMES = { double: 2, half: 0.5, same: 1, square: 4 };
const HALF = 104, LOWER = 66 + HALF; // the height of either drawing of bars, and where the second begins

export function compute({ x, weight, factor, dtype, mistake, eps }) {
  const narrow = mistake === "float", early = narrow || mistake === "type_as";
  const to = v => round(v, narrow ? dtype : "float32"), out = v => round(v, dtype);
  const input = x.map(v => out(out(v) * factor)), gain = weight.map(out);
  const wide = input.map(to), square = wide.map(v => to(v * v));
  const mean = narrow ? meanSquare(wide, dtype) : to(sum(square) / x.length);
  const root = Math.sqrt(to(mean + (mistake === "eps" ? 0 : eps)));
  const r = to((mistake === "rsqrt" ? 0.5 : 1) / root), normalised = wide.map(v => to(v * r));
  const y = normalised.map((v, i) => out(to((early ? out(v) : v) * gain[i])));
  return { input, wide, square, mean, r, normalised, y, rms: Math.sqrt(mean), before: rms(input), after: rms(y),
    ulps: Math.max(...ulps(y, layerIn("float64", "once", input, gain, eps), dtype)) };
}

/** Bars above and below a line; `foreseen` are outlines, by a guess. Returns the bars' ends, and a unit's pixels. */
function bars(d, top, values, largest, cls, lift, foreseen = []) {
  const step = (d.width - 16) / values.length, zero = top + HALF / 2, unit = HALF / 2 / largest;
  const bar = (share, look) => (value, i) => {
    const x = 8 + (i + 0.5) * step, y = zero - unit * limit(value || 0, largest);
    d.rect(x - share * step / 2, Math.min(zero, y), share * step, Math.abs(zero - y), look);
    return [x, y];
  };
  d.segment(8, zero, d.width - 8, zero, "axis");
  const ends = values.map(bar(0.64, `area ${cls}`));
  foreseen.forEach(bar(0.8, "guess"));
  ends.forEach(([x, y], i) => d.text(x, y <= zero ? y - lift : y + lift + 9, shown(values[i], 3), "value", "middle"));
  return { ends, unit };
}

export const right = "same";
export const controls = {
  x: { start: [0.1, 0.1, 0.2, 0.3] },
  factor: { stops: [0, 1e-4, 0.01, 0.1, 0.5, 1, 2, 10, 100, 1000, 3000], start: 2 },
  weight: { start: [1, 1, 1, 1] },
  dtype: { options: ["float32", "bfloat16", "float16"], start: "float32" },
  eps: { stops: [0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 0.1], start: 1e-6 },
  mistake: { options: ["none", "float", "type_as", "rsqrt", "eps"], start: "none" },
};

export function attach(panel, article) {
  const { state } = panel;
  let unit;
  const put = (i, value) => panel.set("x", state.x.with(i, limit(Math.round(20 * value) / 20, 1)));
  const handles = [...article.querySelectorAll(".handle")].map((element, i) => handle(element, { get: () => state.x[i],
    pull: (_dx, dy, start) => put(i, start - dy / unit), press: by => put(i, state.x[i] + by / 20) }));
  return drawn => {
    unit = drawn.unit;
    drawn.ends.forEach((end, i) => handles[i](end));
    for (const { dataset, classList } of article.querySelectorAll("[data-lit]")) { // lines, and the values they have
      const words = key => [drawn.result[key]].flat().map(v => shown(v)).join(", ");
      const value = dataset.lit.split(" ").map(words).join(" → ");
      classList.toggle("lit", dataset.value !== undefined && dataset.value !== value);
      classList.toggle("wrong", dataset.wrong.split(" ").includes(state.mistake));
      dataset.value = value;
    }
  };
}

export function draw(d, { t, state, result, guess }) {
  d.text(8, 16, t("input"), "name");
  const upper = bars(d, 34, state.x, 1, "x", 16);
  d.text(8, LOWER - 14, t("output"), "name");
  d.flag(d.width - 8, LOWER - 14, "end");
  const largest = Math.max(2, ...result.y.filter(Number.isFinite).map(v => 1.25 * Math.abs(v)));
  const guessed = layerIn("float64", "once", state.x, state.weight, state.eps).map(v => v * TIMES[guess]);
  bars(d, LOWER, result.y, largest, result.ulps > 1e3 ? "lost" : "rms", 6, guess ? guessed : []);
  d.height = LOWER + HALF + 10; // whatever the bars
  return { ...upper, result };
}
