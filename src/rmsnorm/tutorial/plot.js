// The only file that draws: SVG as text, from scales, lines, bars and words. Colours are classes of style.css.

import { raised } from "./numbers.js";

export const escape = text => String(text).replace(/[&<>"]/g,
  c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
export const tag = (name, attributes, inner = "") =>
  `<${name}${Object.entries(attributes).map(([key, value]) => ` ${key}="${value}"`).join("")}>${inner}</${name}>`;
export const text = (x, y, words, cls = "", anchor = "start") =>
  tag("text", { x: x.toFixed(1), y: y.toFixed(1), class: cls, "text-anchor": anchor }, escape(words));
export const path = (points, cls, close = false) => {
  const d = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("") + (close ? "Z" : "");
  return points.length ? tag("path", { d, class: cls }) : "";
};
export const segment = (x1, y1, x2, y2, cls) => path([[x1, y1], [x2, y2]], cls);
export const dot = (x, y, r, cls) => tag("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r, class: cls });
export const rect = (x, y, w, h, cls) =>
  tag("rect", { x: x.toFixed(1), y: y.toFixed(1), width: Math.max(w, 0).toFixed(1), height: Math.max(h, 0).toFixed(1),
    class: cls });

/** An arrow with a head, for vectors. */
export function arrow(x1, y1, x2, y2, cls) {
  const length = Math.hypot(x2 - x1, y2 - y1) || 1, ux = (x2 - x1) / length, uy = (y2 - y1) / length,
    s = Math.min(9, length);
  const head = [[x2, y2], [x2 - s * ux - s / 2 * uy, y2 - s * uy + s / 2 * ux],
    [x2 - s * ux + s / 2 * uy, y2 - s * uy - s / 2 * ux]];
  return segment(x1, y1, x2 - s * ux, y2 - s * uy, `line ${cls}`) + path(head, `area ${cls}`, true);
}

/** A box with scales: `x`, `y` are [low, high]; `log` names logarithmic ones, "x", "y" or "xy"; ticks are [value,
 *  words]; `title` stands above, and above the legend, if there is one. Returns what draws into it. */
export function axes({ left, top, width, height, x, y, log = "", xticks, yticks, xname = "", title = "",
  legend = [] }) {
  const scale = ([low, high], from, to, logarithmic) => {
    const f = logarithmic ? v => Math.log10(Math.max(v, 1e-300)) : v => v;
    return v => from + (f(v) - f(low)) / (f(high) - f(low)) * (to - from);
  };
  const X = scale(x, left, left + width, log.includes("x")), Y = scale(y, top + height, top, log.includes("y"));
  let out = rect(left, top, width, height, "box");
  for (const [value, words] of xticks ?? [])
    out += segment(X(value), top, X(value), top + height, "grid")
      + text(X(value), top + height + 19, words, "tick", "middle");
  for (const [value, words] of yticks ?? [])
    out += segment(left, Y(value), left + width, Y(value), "grid") + text(left - 6, Y(value) + 4, words, "tick", "end");
  if (xname) out += text(left + width / 2, top + height + 38, xname, "name", "middle");
  if (title) out += text(0, top - (legend.length ? 33 : 14), title, "name");
  legend.forEach(([words, cls], i) => {
    out += text(left + i * width / legend.length, top - 11, `— ${words}`, `value ink-${cls}`);
  });
  const inside = ([px, py]) => [px, Math.min(Math.max(py, top), top + height)];
  const line = (points, cls) => path(points.map(([a, b]) => inside([X(a), Y(b)])), `line ${cls}`);
  const mark = value => line([[value, y[0]], [value, y[1]]], "mark");
  const flagged = (points, mine) => line(points, "guess")
    + flag(left + width, top - (legend.length ? 33 : 14), mine, "end");
  return { X, Y, out, line, mark, flagged };
}

/** Ticks at powers of ten, every so many. */
export const decades = (low, high, every = 1) => {
  const ticks = [];
  for (let p = Math.ceil(Math.log10(low)); p <= Math.log10(high) + 1e-9; p += every) ticks.push([10 ** p, power(p)]);
  return ticks;
};
const power = p => (p >= 0 && p <= 3 ? String(10 ** p) : `10${raised(p)}`);
export const even = (low, high, steps) =>
  Array.from({ length: steps + 1 }, (_, i) => low + (high - low) * i / steps).map(v =>
    [v, String(Number(v.toPrecision(3))).replace("-", "−")]);

/** Bars of a vector, above and below a zero line. Returns the drawing, its words, and where each bar ends. */
export function bars({ left, top, width, height, values, largest, cls, shown, lift = 6 }) {
  const step = width / values.length, zero = top + height / 2, unit = height / 2 / largest;
  const clip = v => Math.max(-largest, Math.min(largest, Number.isFinite(v) ? v : 0));
  let out = segment(left, zero, left + width, zero, "axis"), words = "";
  const ends = values.map((value, i) => {
    const length = clip(value) * unit, x = left + (i + 0.18) * step;
    out += rect(x, Math.min(zero, zero - length), 0.64 * step, Math.abs(length), `area ${cls}`);
    const above = length >= 0 ? -lift : lift + 9;
    words += text(left + (i + 0.5) * step, zero - length + above, shown(value), "value", "middle");
    return [left + (i + 0.5) * step, zero - length];
  });
  return { out, words, ends, unit };
}

/** Outlines where the reader's guess would have put the bars. */
export const ghosts = ({ left, width, height, top, values, largest }) => {
  const step = width / values.length, zero = top + height / 2, unit = height / 2 / largest;
  return values.map((value, i) => {
    const length = Math.max(-largest, Math.min(largest, value)) * unit;
    return rect(left + (i + 0.1) * step, Math.min(zero, zero - length), 0.8 * step, Math.abs(length), "guess");
  }).join("");
};

/** The flag of the reader's guess: words in the guess's colour with a small mark. */
export const flag = (x, y, words, anchor = "start") => text(x, y, `◆ ${words}`, "flag", anchor);
