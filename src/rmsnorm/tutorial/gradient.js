// The only file that shows what flows back: dx loses what points along x, and shrinks as x grows.

import { rmsBackward, rms, dot } from "./numbers.js";
import { handle } from "./widgets.js";
import { arrow, axes, decades, text } from "./plot.js";

const SIZES = Array.from({ length: 33 }, (_, i) => 10 ** (-3 + i / 8 * 1.5)); // 0.001 to 1000
const SLOPES = { larger: 1, same: 0, smaller: -1, square: -2 };
const INCOMING = [0.9, 0.5];

function compute({ size, angle, eps }) {
  // its rms is 1
  const turn = angle * Math.PI / 180, direction = [Math.SQRT2 * Math.cos(turn), Math.SQRT2 * Math.sin(turn)];
  const length = s => Math.hypot(...rmsBackward(direction.map(v => s * v), INCOMING, eps));
  const x = direction.map(v => size * v), dx = rmsBackward(x, INCOMING, eps);
  const cosine = dot(dx, x) / Math.hypot(...dx) / Math.hypot(...x);
  return { x, dx, direction, eps, rms: rms(x), length: length(size), lengths: SIZES.map(length), cosine };
}

export const gradient = {
  right: "smaller",
  hands: true,
  controls: {
    size: { kind: "slider", stops: [0.001, 0.01, 0.1, 1, 10, 100, 1000], start: 10 },
    angle: { kind: "slider", stops: Array.from({ length: 25 }, (_, i) => -180 + 15 * i), start: 75,
      words: v => `${v}°` },
    eps: { kind: "slider", stops: [0, 1e-6, 1e-3, 0.1, 1], start: 0 },
  },
  compute,
  attach({ svg, state, t, widgets }) {
    const { put } = widgets.angle, centre = {};
    const place = handle(svg, {
      name: t("control.angle"), get: () => state.angle, range: { "aria-valuemin": -180, "aria-valuemax": 180 },
      press: by => put(state.angle + 15 * by),
      pull: (_dx, _dy, _start, event) => {
        const box = svg.getBoundingClientRect();
        put(Math.atan2(centre.y - (event.clientY - box.top), event.clientX - box.left - centre.x) * 180 / Math.PI);
      },
    });
    return ({ tip, cx, cy }) => { Object.assign(centre, { x: cx, y: cy }); place(...tip); };
  },
  draw({ width, t, result, guess, mine }) {
    const side = 170, cx = Math.min(width / 2, 220), cy = 92;
    const to = (v, length, cls, words) => {
      const size = Math.hypot(...v) || 1, x = cx + length * v[0] / size, y = cy - length * v[1] / size;
      const aside = cls === "x" ? 16 : 8; // beside the handle
      return arrow(cx, cy, x, y, cls) + text(x + (x >= cx ? aside : -aside), y
        + (y > cy ? 12 : -4), words, `value ink-${cls}`, x >= cx ? "start" : "end");
    };
    let body = to(result.x, 76, "x", "x") + to(INCOMING, 76, "soft", t("incoming")) + to(result.dx, 62, "rms", "dx");
    const low = 1e-5, high = 1e4;
    const plot = axes({
      left: 52, top: side + 40, width: width - 64, height: 180, x: [1e-3, 1e3], y: [low, high], log: "xy",
      xticks: decades(1e-3, 1e3), yticks: decades(low, high, 3), xname: t("size"), title: t("length"),
    });
    body += plot.out + plot.line(SIZES.map((s, i) => [s, result.lengths[i]]), "rms") + plot.mark(result.rms);
    if (guess) body += plot.flagged(SIZES.map(s => [s, result.lengths[16] * s ** SLOPES[guess]]), mine);
    const size = Math.hypot(...result.x), tip = [cx + 76 * result.x[0] / size, cy - 76 * result.x[1] / size];
    return { height: side + 266, body, tip, cx, cy };
  },
  numbers: ({ rms, length, cosine, dx }) => ({ rms, length, product: length * rms, cosine, dx }),
  quotes: () => ({ first: compute({ size: 1, angle: 75, eps: 0 }).length,
    tenfold: compute({ size: 10, angle: 75, eps: 0 }).length }),
};
