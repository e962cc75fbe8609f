// The only file that draws in three dimensions: the sphere of RMSNorm's outputs, and LayerNorm's circle on it.

import { centred, dot, limit, mean, norm, range, rms, std } from "./numbers.js";
import { dragged, handle } from "./widgets.js";

const ACROSS = [[1, -1, 0], [1, 1, -2]].map(v => v.map(c => c / Math.hypot(...v))); // in LayerNorm's plane
const RADIUS = Math.sqrt(3), REACH = 2.15; // x is drawn as far as that
const degrees = v => `${v}°`, turn = angle => angle * Math.PI / 180;

export function compute({ x, shift }) {
  const moved = x.map(v => v + shift), layer = norm("layer", moved), root = norm("rms", moved);
  const apart = (a, b) => Math.max(...a.map((v, i) => Math.abs(v - b[i])));
  const strip = range(41, i => {
    const middle = -4 + i / 5, all = centred(x).map(v => v + middle);
    return [middle, apart(norm("layer", all), norm("rms", all))];
  });
  const [middle, away, size] = [mean, std, rms].map(f => f(moved)), cos = middle / size, sin = away / size;
  const gap = apart(root, layer.map(v => sin * v + cos)); // RMSNorm = sin θ · LayerNorm + cos θ · 1
  return { moved, layer, root, strip, apart: apart(layer, root), mean: middle, std: away, rms: size, gap,
    theta: Math.acos(limit(cos, 1)) * 180 / Math.PI };
}

/** Three directions, as they look from where the reader has turned to: to the right, up, towards the eye. */
function axes({ yaw, pitch }) {
  const [[s, c], [u, v]] = [yaw, pitch].map(turn).map(a => [Math.sin(a), Math.cos(a)]);
  return [[c, s, 0], [s * u, -c * u, v], [-s * v, c * v, u]];
}

export const right = "zero";
export const controls = {
  x: { start: [1.2, -0.6, 0.3] },
  shift: { stops: range(33, i => -4 + i / 4), start: 1 },
  yaw: { stops: range(73, i => -180 + 5 * i), start: 20, words: degrees },
  pitch: { stops: range(37, i => -90 + 5 * i), start: 25, words: degrees },
};

export function attach(panel, article) {
  const { state } = panel, svg = article.querySelector("svg");
  let unit;
  dragged(svg, (dx, dy, [yaw, pitch]) => {
    panel.set("yaw", yaw - dx / 2);
    panel.set("pitch", pitch + dy / 2);
  }, event => event.target.closest(".ball") && [state.yaw, state.pitch]);
  const pull = (dx, dy, start) => { // across the screen; how deep in the picture it lies stays
    const [right, up] = axes(state), moved = start.map((v, i) => v + (dx * right[i] - dy * up[i]) / unit);
    panel.set("x", moved.map(v => limit(Math.round(100 * v) / 100, 4)));
  };
  const place = handle(svg.querySelector(".handle"), { get: () => state.x, pull,
    press: (by, up) => pull(up ? 0 : by * unit / 10, up ? -by * unit / 10 : 0, state.x) });
  return drawn => {
    unit = drawn.unit;
    place(drawn.tip);
  };
}

export function draw(d, { t, state, result, guess }) {
  const size = Math.min(d.width, 340), scale = size / 4.6, middle = [d.width / 2, 26 + 0.44 * size];
  const eye = axes(state), at = p => [middle[0] + scale * dot(p, eye[0]), middle[1] - scale * dot(p, eye[1])];
  d.dot(...middle, scale * RADIUS, "ball");
  for (const latitude of [-60, -30, 0, 30, 60]) { // circles around (1, 1, 1); what is behind is fainter
    const r = RADIUS * Math.cos(turn(latitude)), points = range(73, i => ACROSS[0].map((u, k) =>
      r * (u * Math.cos(turn(5 * i)) + ACROSS[1][k] * Math.sin(turn(5 * i))) + Math.sin(turn(latitude))));
    for (const behind of [true, false]) d.path(points.map(p => [...at(p), dot(p, eye[2]) < -1e-9 !== behind]),
      `line ${latitude ? "faint" : "layer thick"}${behind ? " behind" : ""}`);
  }
  const reach = Math.min(1, REACH / Math.hypot(...result.moved)), tip = at(result.moved.map(v => v * reach));
  [["soft", "(1, 1, 1)", at([1.45, 1.45, 1.45])], ["x", reach < 1 ? "x …" : "x", tip],
    ["layer", "LayerNorm", at(result.layer)], ["rms", "RMSNorm", at(result.root)]].forEach(([cls, words, end], i) => {
    d.text([0, 0.27, 0.42, 0.72][i] * d.width, 14, `— ${words}`, `value ink-${cls}`);
    if (end.every(Number.isFinite)) d.arrow(...middle, ...end, cls);
  });
  const plot = d.axes({ top: 0.88 * size + 56, height: 84, x: [-4, 4], y: [0, 3], xticks: 4, yticks: 3,
    xname: t("mean"), title: t("apart") });
  plot.line(result.strip, "rms");
  plot.mark(result.mean);
  plot.guess({ never: [[-4, 0.4], [4, 0.4]], zero: [[0, 0], [0, 3]], unit: [[1, 0], [1, 3]],
    always: [[-4, 0.02], [4, 0.02]] }[guess], guess === "unit" ? ": std = 1" : "");
  return { tip, unit: scale * reach };
}
export const says = () => ({ upright: compute({ x: [1, -1, 0], shift: 0 }).theta });
