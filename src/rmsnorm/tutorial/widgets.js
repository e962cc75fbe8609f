// The only file with controls: sliders that speak their values, choices, cells that are typed in or dragged, handles.

import { limit, range, shown } from "./numbers.js";
import { escape } from "./plot.js";

const made = html => document.createRange().createContextualFragment(html).firstElementChild;

/** What moves a figure. A control that has `stops` is a slider, one with `options` a choice; others are cells, number
 *  fields for a vector or a matrix. `set` hears of a new value, `show` of the widget that is returned shows one. */
export const widget = (id, name, control, set, words) =>
  (control.stops ? slider : control.options ? choice : cells)(id, escape(name), control, set, words);

/** `aria-valuetext` and the number beside it say the value, not its place among the stops. */
function slider(id, name, { stops, words = shown }, set) {
  const box = made(`<div class="dial"><label for="${id}">${name}</label><output for="${id}"></output>
    <input type="range" id="${id}" min="0" max="${stops.length - 1}"></div>`);
  const [output, input] = box.querySelectorAll("output, input");
  input.addEventListener("input", () => set(stops[input.value]));
  const show = value => {
    input.value = stops.indexOf(value);
    output.textContent = words(value);
    input.setAttribute("aria-valuetext", words(value));
  };
  return { box, show };
}

function choice(id, name, { options }, set, words) {
  const radios = options.map(option =>
    `<label><input type="radio" name="${id}" value="${option}"> ${escape(words(option))}</label>`);
  const box = made(`<fieldset class="choice"><legend>${name}</legend>${radios.join("")}</fieldset>`);
  box.addEventListener("change", event => set(event.target.value));
  return { box, show: value => { box.querySelector(`[value="${value}"]`).checked = true; } };
}

/** Type, press arrow keys, or drag sideways. */
function cells(id, name, { start, rows = [""], step = 0.1 }, set) {
  const n = start.flat().length / rows.length, rounded = value => Number(value.toFixed(6));
  const fields = rows.flatMap(row => range(n, j => `<input type="number" step="${step}"
    aria-label="${name}${row ? `, ${row}` : " "}${j + 1}">`));
  const box = made(`<div class="cells" role="group" aria-label="${name}"><span class="name">${name}</span>
    <div class="grid" style="--columns:${n}">${fields.join("")}</div></div>`);
  const inputs = [...box.querySelectorAll("input")];
  let values;
  const show = given => {
    values = given.flat();
    inputs.forEach((input, i) => { // whoever types "0." is not interrupted
      if (input.valueAsNumber !== rounded(values[i])) input.value = rounded(values[i]);
    });
  };
  const put = (place, value) => {
    const all = values.with(place, limit(value, 1e4));
    set(rows[0] ? rows.map((_, i) => all.slice(n * i, n * i + n)) : all);
  };
  inputs.forEach((input, place) => {
    input.addEventListener("input", () => {
      if (Number.isFinite(input.valueAsNumber)) put(place, input.valueAsNumber);
    });
    input.addEventListener("change", () => show(values));
    dragged(input, (dx, _, at) => put(place, rounded(Math.round((at + dx * step / 4) / step) * step)),
      () => values[place]);
  });
  return { box, show };
}

/** Calls `moved(dx, dy, start)` while a pointer that went down here is moved, wherever it goes; a click stays a click.
 *  `begin` says what `start` is, or null where nothing is to be dragged. */
export function dragged(element, moved, begin) {
  let down = null, start, active;
  element.addEventListener("pointerdown", event => {
    start = event.button ? null : begin(event);
    if (start === null) return;
    event.stopPropagation(); // a handle is dragged, and not the drawing that it is in
    element.setPointerCapture(event.pointerId);
    [down, active] = [event, false];
  });
  element.addEventListener("touchstart", event => { // Chromium's touch-action knows nothing of parts of a drawing
    if (down && element instanceof SVGElement) event.preventDefault();
  }, { passive: false });
  element.addEventListener("pointermove", event => {
    if (event.pointerId !== down?.pointerId) return;
    const dx = event.clientX - down.clientX, dy = event.clientY - down.clientY;
    active ||= Math.hypot(dx, dy) >= 4;
    if (active) moved(dx, dy, start);
  });
  for (const name of ["pointerup", "pointercancel"]) element.addEventListener(name, () => { down = null; });
}

/** A handle in a drawing, for mouse, finger and keys: `pull(dx, dy, start)` is told by pointers, `press(by, up)` by
 *  arrow keys, up and down or sideways; `get` is what `start` is; the function returned says where it is drawn. */
export function handle(element, { get, pull, press }) {
  dragged(element, pull, get);
  element.addEventListener("keydown", event => {
    const by = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (!by) return;
    event.preventDefault();
    press(by, !/Left|Right/.test(event.key));
  });
  return ([cx, cy]) => {
    const values = [get()].flat(), said = values.map(v => shown(v, 3)).join(", ");
    for (const [key, value] of Object.entries({ cx, cy, "aria-valuenow": values[0], "aria-valuetext": said }))
      element.setAttribute(key, value);
  };
}
