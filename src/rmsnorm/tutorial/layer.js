// The only file that runs the ten lines on the reader's own numbers: each line lights up with its value, mistakes too.

import { layerIn, meanSquare, round, rms, shown, ulp } from "./numbers.js";
import { bars, escape, ghosts, text } from "./plot.js";
import { handle } from "./widgets.js";

const TIMES = { double: 2, half: 0.5, same: 1, square: 4 };
// By the line of ten_lines.py that the value belongs to.
const LINES = { wide: 6, square: 7, mean: 7, r: 8, normalised: 8, y: 9 };

function compute({ x, weight, factor, dtype, mistake, eps }) {
  const narrow = mistake === "float", type = narrow ? dtype : "float32", to = v => round(v, type);
  const input = x.map(v => round(round(v, dtype) * factor, dtype));
  const wide = input.map(to), square = wide.map(v => to(v * v));
  const mean = narrow ? meanSquare(wide, dtype) : to(square.reduce((a, b) => a + b, 0) / x.length);
  const inside = to(mean + (mistake === "eps" ? 0 : eps));
  const r = to(mistake === "rsqrt" ? 0.5 / Math.sqrt(inside) : 1 / Math.sqrt(inside));
  const normalised = wide.map(v => to(v * r)), gain = weight.map(v => round(v, dtype));
  const y = mistake === "type_as" || narrow
    ? normalised.map((v, i) => round(round(v, dtype) * gain[i], dtype))
    : normalised.map((v, i) => round(to(v * gain[i]), dtype));
  const exact = layerIn("float64", "once", input, gain, eps);
  const ulps = Math.max(...y.map((v, i) => (Number.isFinite(v) ? Math.abs(v - exact[i]) / ulp(exact[i], dtype)
    : Infinity)));
  return { input, wide, square, mean, r, normalised, y, exact, ulps, dtype };
}

export const layer = {
  right: "same",
  hands: true,
  controls: {
    x: { kind: "cells", start: [0.1, 0.1, 0.2, 0.3] },
    factor: { kind: "slider", stops: [0, 1e-4, 0.01, 0.1, 0.5, 1, 2, 10, 100, 1000, 3000], start: 2 },
    weight: { kind: "cells", start: [1, 1, 1, 1] },
    dtype: { kind: "choice", options: ["float32", "bfloat16", "float16"], start: "float32" },
    eps: { kind: "slider", stops: [0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 0.1], start: 1e-6 },
    mistake: { kind: "choice", options: ["none", "float", "type_as", "rsqrt", "eps"], start: "none" },
  },
  compute,
  attach(panel, box) {
    const { svg, state } = panel;
    const self = {};
    const lit = document.createElement("div");
    lit.className = "code";
    lit.append(document.getElementById("ten-lines").content.cloneNode(true));
    box.querySelector("figure").before(lit);
    const put = (i, value) => {
      state.x[i] = Math.max(-1, Math.min(1, Math.round(20 * value) / 20));
      panel.refresh();
      panel.later();
    };
    const handles = state.x.map((_, i) => handle(svg, {
      name: `x ${i + 1}`, get: () => state.x[i], range: { "aria-valuemin": -1, "aria-valuemax": 1 },
      pull: (_dx, dy, start) => put(i, start - dy / self.unit), press: by => put(i, state.x[i] + by / 20),
    }));
    return ({ ends, unit, result, mistake }) => {
      self.unit = unit;
      ends.forEach(([x, y], i) => handles[i](x, y));
      const words = {};
      for (const [key, place] of Object.entries(LINES))
        (words[place] ??= []).push([result[key]].flat().map(v => shown(v)).join(", "));
      for (const [place, values] of Object.entries(words)) {
        const row = lit.children[place], value = values.join(" → ");
        row.classList.toggle("lit", row.dataset.value !== undefined && row.dataset.value !== value);
        row.classList.toggle("wrong", MISTAKEN[mistake] === Number(place));
        row.dataset.value = value;
      }
    };
  },
  draw({ width, t, state, result, guess, mine }) {
    const half = 104, room = { left: 8, width: width - 16, height: half, shown: v => shown(v, 3) };
    const upper = bars({ ...room, top: 34, values: state.x, largest: 1, cls: "x", lift: 16 });
    const largest = Math.max(2, ...result.y.map(v => (Number.isFinite(v) ? 1.25 * Math.abs(v) : 0)));
    const lower = bars({ ...room, top: 66 + half, values: result.y, largest, cls: result.ulps > 1e3 ? "lost" : "rms" });
    let body = text(8, 16, t("input"), "name") + upper.out + upper.words
      + text(8, 52 + half, t("output"), "name") + lower.out;
    if (guess) {
      const base = layerIn("float64", "once", state.x, state.weight, state.eps);
      body += ghosts({ ...room, top: 66 + half, values: base.map(v => v * TIMES[guess]), largest });
      body += text(width - 8, 52 + half, `◆ ${mine}`, "flag", "end");
    }
    return { height: 2 * half + 76, body: body + lower.words, ends: upper.ends, unit: upper.unit, result, mistake: state.mistake };
  },
  numbers: ({ input, mean, r, y, ulps }) => ({ input, mean, rms: Math.sqrt(mean), r, y, after: rms(y), ulps }),
  quotes: ({ input, y }) => ({ before: rms(input), after: rms(y) }),
};
const MISTAKEN = { none: -1, float: 6, type_as: 9, rsqrt: 8, eps: 8 };
