// The only file that draws: SVG as text, from scales, lines, arrows and words. Colours are classes of style.css.

import { raised, range, shown } from "./numbers.js";

export const escape = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt()};`);

/** Ticks at powers of ten, every so many, as [value, words]. */
export const decades = (low, high, every = 1) => {
  const first = Math.ceil(Math.log10(low)), count = Math.floor((Math.log10(high) + 1e-9 - first) / every) + 1;
  return range(count, i => first + i * every).map(p => [10 ** p, p >= 0 && p <= 3 ? 10 ** p : `10${raised(p)}`]);
};

/** Ticks that are given, as values or [value, words]; or so many steps; or, on a logarithmic scale, `decades`. */
function ticks([low, high], logarithmic, given = []) {
  const values = Array.isArray(given) ? given : logarithmic ? decades(low, high, given)
    : range(given + 1, i => low + (high - low) * i / given);
  return values.map(one => (Array.isArray(one) ? one : [one, shown(one, 3)]));
}

/** A drawing of a width, as high as what is drawn. `mine` are the words for the reader's guess, if there is one. */
export class Drawing {
  body = "";
  height = 0;

  constructor(width, mine) {
    Object.assign(this, { width, mine });
  }

  add(name, attributes, inner = "") {
    const words = Object.entries(attributes).map(([key, value]) =>
      ` ${key}="${typeof value === "number" ? +value.toFixed(1) : value}"`);
    this.body += `<${name}${words.join("")}>${inner}</${name}>`;
  }

  text(x, y, words, cls = "", anchor = "start") {
    this.height = Math.max(this.height, y + 8);
    this.add("text", { x, y, class: cls, "text-anchor": anchor }, escape(words));
  }

  rect(x, y, width, height, cls) {
    this.height = Math.max(this.height, y + height + 2);
    this.add("rect", { x, y, width: Math.max(width, 0), height: Math.max(height, 0), class: cls });
  }

  /** Through points [x, y]; a third value that is true lifts the pen before its point. */
  path(points, cls, end = "") {
    const d = points.map(([x, y, lifted], i) => `${i && !lifted ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`);
    this.add("path", { d: d.join("") + end, class: cls });
  }

  segment(x1, y1, x2, y2, cls) {
    this.path([[x1, y1], [x2, y2]], cls);
  }

  dot(cx, cy, r, cls) {
    this.add("circle", { cx, cy, r, class: cls });
  }

  /** With a head, for vectors. */
  arrow(x1, y1, x2, y2, cls) {
    const length = Math.hypot(x2 - x1, y2 - y1) || 1, head = Math.min(9, length) / length;
    const u = head * (x2 - x1), v = head * (y2 - y1), x = x2 - u, y = y2 - v;
    this.segment(x1, y1, x, y, `line ${cls}`);
    this.path([[x2, y2], [x - v / 2, y + u / 2], [x + v / 2, y - u / 2]], `area ${cls}`, "Z");
  }

  /** Marks the reader's guess, in words. */
  flag(x, y, anchor = "start", more = "") {
    if (this.mine) this.text(x, y, `◆ ${this.mine}${more}`, "flag", anchor);
  }

  /** A box with scales: `x`, `y` are [low, high]; `log` names logarithmic ones, "x", "y" or "xy"; `title` stands above,
   *  and above the legend, if there is one. Returns its scales, and what draws into it. */
  axes({ left = 52, top = 48, width = this.width - left - 12, height, x, y, log = "", xticks, yticks, xname, title,
    legend = [] }) {
    const scale = ([low, high], from, to, logarithmic) => {
      const f = logarithmic ? v => Math.log10(Math.max(v, 1e-300)) : v => v;
      return v => from + (f(v) - f(low)) / (f(high) - f(low)) * (to - from);
    };
    const bottom = top + height, above = top - (legend.length ? 33 : 14);
    const X = scale(x, left, left + width, log.includes("x")), Y = scale(y, bottom, top, log.includes("y"));
    this.rect(left, top, width, height, "box");
    for (const [value, words] of ticks(x, log.includes("x"), xticks)) {
      this.segment(X(value), top, X(value), bottom, "grid");
      this.text(X(value), bottom + 19, words, "tick", "middle");
    }
    for (const [value, words] of ticks(y, log.includes("y"), yticks)) {
      this.segment(left, Y(value), left + width, Y(value), "grid");
      this.text(left - 6, Y(value) + 4, words, "tick", "end");
    }
    if (xname) this.text(left + width / 2, bottom + 38, xname, "name", "middle");
    if (title) this.text(0, above, title, "name");
    legend.forEach(([words, cls], i) =>
      this.text(left + i * width / legend.length, top - 11, `— ${words}`, `value ink-${cls}`));
    const line = (points, cls) => this.path(points.filter(point => point.every(v => !Number.isNaN(v)))
      .map(([a, b]) => [X(a), Math.min(Math.max(Y(b), top), bottom)]), `line ${cls}`);
    const guess = (points, more) => {
      if (!this.mine) return;
      line(points, "guess");
      this.flag(left + width, above, "end", more);
    };
    return { X, Y, line, guess, mark: value => line([[value, y[0]], [value, y[1]]], "mark") };
  }
}
