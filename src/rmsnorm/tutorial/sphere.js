// The only file that draws in three dimensions: the sphere of RMSNorm's outputs, and LayerNorm's circle on it.

import { norm, mean, std, rms } from "./numbers.js";
import { axes, arrow, even, path, text } from "./plot.js";
import { dragged, handle } from "./widgets.js";

const SHIFTS = Array.from({ length: 41 }, (_, i) => -4 + i / 5);
// two directions in LayerNorm's plane
const ACROSS = [[1, -1, 0], [1, 1, -2]].map(v => v.map(c => c / Math.hypot(...v)));

function compute({ x, shift }) {
  const moved = x.map(v => v + shift), layer = norm("layer", moved), root = norm("rms", moved);
  const apart = (a, b) => Math.max(...a.map((v, i) => Math.abs(v - b[i])));
  const strip = SHIFTS.map(s => {
    const all = x.map(v => v - mean(x) + s);
    return [s, apart(norm("layer", all), norm("rms", all))];
  });
  const cos = mean(moved) / rms(moved), sin = std(moved) / rms(moved);
  const gap = apart(root, layer.map(v => sin * v + cos)); // RMSNorm = sin θ · LayerNorm + cos θ · 1
  return { moved, layer, root, strip, apart: apart(layer, root), mean: mean(moved), std: std(moved), rms: rms(moved),
    theta: Math.acos(Math.max(-1, Math.min(1, cos))) * 180 / Math.PI, gap };
}

/** Turns a point by two angles: right, up, towards the eye. */
function turned([a, b, c], yaw, pitch) {
  const x = a * Math.cos(yaw) + b * Math.sin(yaw), y = -a * Math.sin(yaw) + b * Math.cos(yaw);
  return [x, c * Math.cos(pitch) - y * Math.sin(pitch), y * Math.cos(pitch) + c * Math.sin(pitch)];
}

export const sphere = {
  right: "zero",
  hands: true,
  controls: {
    x: { kind: "cells", start: [1.2, -0.6, 0.3] },
    shift: { kind: "slider", stops: Array.from({ length: 33 }, (_, i) => -4 + i / 4), start: 1 },
    yaw: { kind: "slider", stops: Array.from({ length: 73 }, (_, i) => -180 + 5 * i), start: 20, words: v => `${v}°` },
    pitch: { kind: "slider", stops: Array.from({ length: 37 }, (_, i) => -90 + 5 * i), start: 25, words: v => `${v}°` },
  },
  compute,
  attach(panel) {
    const { svg, state, t, widgets } = panel, self = {};
    svg.classList.add("turned");
    dragged(svg, (dx, dy, start) => {
      if (start) { widgets.yaw.put(start[0] - dx / 2); widgets.pitch.put(start[1] + dy / 2); }
    }, event => event.target.closest(".ball") && [state.yaw, state.pitch]);
    const pull = (dx, dy, start) => { // across the screen; how deep in the picture it lies stays
      const [yaw, pitch] = [state.yaw, state.pitch].map(v => v * Math.PI / 180), { unit } = self;
      const right = [Math.cos(yaw), Math.sin(yaw), 0];
      const up = [Math.sin(yaw) * Math.sin(pitch), -Math.cos(yaw) * Math.sin(pitch), Math.cos(pitch)];
      start.forEach((v, i) => {
        const moved = v + (dx * right[i] - dy * up[i]) / unit;
        state.x[i] = Math.max(-4, Math.min(4, Math.round(100 * moved) / 100));
      });
      panel.refresh();
      panel.later();
    };
    const place = handle(svg, {
      name: t("tip"), get: () => [...state.x], pull,
      press: (by, up) => pull(up ? 0 : by * self.unit / 10, up ? -by * self.unit / 10 : 0, [...state.x]),
    });
    return ({ tip, unit }) => { self.unit = unit; place(...tip); };
  },
  draw({ width, t, state, result, guess, mine }) {
    const size = Math.min(width, 340), middle = [width / 2, 26 + 0.44 * size], scale = size / 2 / 2.3, n = 3;
    const yaw = state.yaw * Math.PI / 180, pitch = state.pitch * Math.PI / 180;
    const see = point => turned(point, yaw, pitch), at = p => [middle[0] + scale * p[0], middle[1] - scale * p[1]];
    const angles = Array.from({ length: 73 }, (_, i) => i * Math.PI / 36), radius = Math.sqrt(n);
    const ring = (u, v) => angles.map(a => see(u.map((c, i) => radius * (c * Math.cos(a) + v[i] * Math.sin(a)))));
    const halves = (points, cls) => { // what is behind the sphere's middle is fainter
      let out = "", run = [], behind = null;
      for (const p of [...points, null]) {
        const now = p && p[2] < -1e-9;
        if (run.length && (p === null || now !== behind)) {
          out += path([...run, ...(p ? [at(p)] : [])], `line ${cls}${behind ? " behind" : ""}`);
          run = [];
        }
        if (p) { run.push(at(p)); behind = now; }
      }
      return out;
    };
    let body = path(angles.map(a => [middle[0] + scale * radius * Math.cos(a), middle[1]
      + scale * radius * Math.sin(a)]), "ball", true);
    for (let i = -2; i <= 2; i++) { // circles of latitude around (1, 1, 1)
      const height = Math.sin(i * Math.PI / 6) * radius, r = Math.cos(i * Math.PI / 6);
      const points = ring(ACROSS[0].map(c => c * r),
        ACROSS[1].map(c => c * r)).map(p => see([1, 1, 1]).map((c, k) => p[k] + c * height / radius));
      body += i ? halves(points, "faint") : halves(points, "layer thick");
    }
    const vectors = { soft: [1.45, 1.45, 1.45], x: result.moved, layer: result.layer, rms: result.root };
    const reach = Math.min(1, 2.15 / Math.hypot(...result.moved)), tip = at(see(result.moved.map(v => v * reach)));
    const words = { soft: "(1, 1, 1)", x: reach < 1 ? "x …" : "x", layer: "LayerNorm", rms: "RMSNorm" };
    Object.entries(vectors).forEach(([cls, point], i) => {
      body += text([0, 0.27, 0.42, 0.72][i] * width, 14, `— ${words[cls]}`, `value ink-${cls}`);
      if (point.every(Number.isFinite)) body += arrow(...middle, ...(cls === "x" ? tip : at(see(point))), cls);
    });
    const top = 0.88 * size + 56;
    const plot = axes({
      left: 44, top, width: width - 56, height: 84, x: [-4, 4], y: [0, 3], xticks: even(-4, 4, 4),
      yticks: even(0, 3, 3), xname: t("mean"), title: t("apart"),
    });
    body += plot.out + plot.line(result.strip.filter(([, d]) => Number.isFinite(d)), "rms") + plot.mark(result.mean);
    const lines = { never: [[-4, 0.4], [4, 0.4]], zero: [[0, 0], [0, 3]], unit: [[1, 0], [1, 3]],
      always: [[-4, 0.02], [4, 0.02]] };
    if (guess) body += plot.flagged(lines[guess], guess === "unit" ? `${mine}: std = 1` : mine);
    return { height: top + 128, body, tip, unit: scale * reach };
  },
  numbers: ({ root, layer, mean, std, rms, theta, apart, gap }) =>
    ({ rmsnorm: root, layernorm: layer, mean, std, rms, theta, apart, gap }),
  quotes: () => ({ upright: compute({ x: [1, -1, 0], shift: 0 }).theta }),
};
