// The only file that shows what flows back: dx loses what points along x, and shrinks as x grows.

import { dot, range, rms, rmsBackward } from "./numbers.js";
import { handle } from "./widgets.js";

const SIZES = range(33, i => 10 ** (-3 + i / 8 * 1.5)); // 0.001 to 1000
const SLOPES = { larger: 1, same: 0, smaller: -1, square: -2 };
const INCOMING = [0.9, 0.5], LENGTH = 76; // of the drawn x, in pixels
const pointing = (angle, length) => ["cos", "sin"].map(f => length * Math[f](angle * Math.PI / 180));

export function compute({ size, angle, eps }) {
  const direction = pointing(angle, Math.SQRT2); // its rms is 1
  const length = s => Math.hypot(...rmsBackward(direction.map(v => s * v), INCOMING, eps));
  const x = direction.map(v => size * v), dx = rmsBackward(x, INCOMING, eps);
  const cosine = dot(dx, x) / Math.hypot(...dx) / Math.hypot(...x), long = length(size);
  return { x, dx, rms: rms(x), length: long, product: long * rms(x), lengths: SIZES.map(length), cosine };
}

export const right = "smaller";
export const controls = {
  size: { stops: range(7, i => Number(`1e${i - 3}`)), start: 10 },
  angle: { stops: range(25, i => -180 + 15 * i), start: 75, words: v => `${v}°` },
  eps: { stops: [0, 1e-6, 1e-3, 0.1, 1], start: 0 },
};
export const attach = (panel, article) => handle(article.querySelector(".handle"), {
  get: () => panel.state.angle,
  press: by => panel.set("angle", panel.state.angle + 15 * by),
  pull: (dx, dy, start) => {
    const [x, y] = pointing(start, LENGTH);
    panel.set("angle", Math.atan2(y - dy, x + dx) * 180 / Math.PI);
  },
});

export function draw(d, { t, state, result, guess }) {
  const cx = Math.min(d.width / 2, 220), cy = 92;
  const to = (v, length, cls, words) => {
    const size = Math.hypot(...v) || 1, x = cx + length * v[0] / size, y = cy - length * v[1] / size;
    const aside = cls === "x" ? 16 : 8, right = x >= cx; // beside the handle
    d.arrow(cx, cy, x, y, cls);
    d.text(right ? x + aside : x - aside, y + (y > cy ? 12 : -4), words, `value ink-${cls}`, right ? "start" : "end");
  };
  to(pointing(state.angle, 1), LENGTH, "x", "x");
  to(INCOMING, LENGTH, "soft", t("incoming"));
  to(result.dx, 62, "rms", "dx");
  const plot = d.axes({ top: 210, height: 180, x: [1e-3, 1e3], y: [1e-5, 1e4], log: "xy", xticks: 1, yticks: 3,
    xname: t("size"), title: t("length") });
  plot.line(SIZES.map((s, i) => [s, result.lengths[i]]), "rms");
  plot.mark(result.rms);
  plot.guess(SIZES.map(s => [s, result.lengths[16] * s ** SLOPES[guess]]));
  const [x, y] = pointing(state.angle, LENGTH);
  return [cx + x, cy - y];
}

export function says() {
  const [first, tenfold] = [1, 10].map(size => compute({ size, angle: 75, eps: 0 }).length);
  return { first, tenfold };
}
