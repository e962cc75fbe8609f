// The only file with controls: sliders that speak their values, choices, cells that are typed in or dragged, handles.

import { shown } from "./numbers.js";
import { escape } from "./plot.js";

const make = html => {
  const template = document.createElement("template");
  template.innerHTML = html.trim();
  return template.content.firstElementChild;
};

/** A range over the stops of a control; `aria-valuetext` and the number beside it say the value, not the place. */
export function slider(id, name, control, state, key, changed) {
  const words = value => (control.words ?? shown)(value);
  const box = make(`<div class="dial"><label for="${id}">${escape(name)}</label><output for="${id}"></output>
    <input type="range" id="${id}" min="0" max="${control.stops.length - 1}" step="1"></div>`);
  const input = box.querySelector("input"), output = box.querySelector("output");
  const say = () => {
    output.textContent = words(state[key]);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.value = control.stops.indexOf(state[key]);
  input.addEventListener("input", () => { state[key] = control.stops[input.value]; say(); changed(); });
  say();
  box.put = value => { // the stop that is nearest
    const away = control.stops.map(stop => Math.abs(stop - value));
    input.value = away.indexOf(Math.min(...away));
    input.dispatchEvent(new Event("input"));
  };
  return box;
}

/** Radio buttons in a group with a name. */
export function choice(id, name, control, state, key, changed, words) {
  const radios = control.options.map(option => {
    const checked = option === state[key] ? " checked" : "";
    return `<label><input type="radio" name="${id}" value="${option}"${checked}> ${escape(words(option))}</label>`;
  });
  const box = make(`<fieldset class="choice"><legend>${escape(name)}</legend>${radios.join("")}</fieldset>`);
  box.addEventListener("change", event => { state[key] = event.target.value; changed(); });
  return box;
}

/** Number fields, one for each value of a vector or a matrix: type, press arrow keys, or drag sideways. */
export function cells(id, name, control, state, key, changed) {
  const rows = Array.isArray(state[key][0]) ? state[key] : [state[key]];
  const step = control.step ?? 0.1, round = value => Number(value.toFixed(6));
  const named = (i, j) => (rows.length > 1 ? `${name}, ${control.rows[i]}${j + 1}` : `${name} ${j + 1}`);
  const fields = rows.flatMap((row, i) => row.map((value, j) =>
    `<input type="number" step="${step}" value="${value}" aria-label="${escape(named(i, j))}">`));
  const box = make(`<div class="cells" role="group" aria-label="${escape(name)}">
    <span class="name">${escape(name)}</span>
    <div class="grid" style="--columns:${rows[0].length}">${fields.join("")}</div></div>`);
  const inputs = [...box.querySelectorAll("input")];
  const put = (place, value) => {
    rows[Math.floor(place / rows[0].length)][place % rows[0].length] = Math.max(-1e4, Math.min(1e4, value));
    changed(place);
  };
  inputs.forEach((input, place) => {
    input.addEventListener("input", () => {
      if (Number.isFinite(input.valueAsNumber)) put(place, input.valueAsNumber);
    });
    input.addEventListener("change", () => { if (!Number.isFinite(input.valueAsNumber)) box.refresh(); });
    dragged(input, (dx, _, start) => {
      input.value = round(Math.round((start + dx * step / 4) / step) * step);
      put(place, input.valueAsNumber);
    }, () => input.valueAsNumber || 0);
  });
  box.refresh = () => inputs.forEach((input, place) => {
    const value = round(rows[Math.floor(place / rows[0].length)][place % rows[0].length]);
    if (input.valueAsNumber !== value) input.value = value; // whoever types "0." is not interrupted
  });
  return box;
}

/** Calls `moved(dx, dy, start)` while a pointer is down and has moved; a click stays a click. */
export function dragged(element, moved, begin = () => null) {
  element.addEventListener("pointerdown", event => {
    if (event.button) return;
    event.stopPropagation(); // a handle is dragged, and not the drawing that it is in
    const { clientX, clientY, pointerId } = event, start = begin(event);
    let active = false;
    const move = next => {
      if (next.pointerId !== pointerId) return;
      const dx = next.clientX - clientX, dy = next.clientY - clientY;
      if (!active && Math.hypot(dx, dy) < 4) return;
      active = true;
      next.preventDefault();
      moved(dx, dy, start, next);
    };
    const end = next => {
      if (next.pointerId !== pointerId) return;
      removeEventListener("pointermove", move);
      for (const name of ["pointerup", "pointercancel"]) removeEventListener(name, end);
    };
    addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel"]) addEventListener(name, end);
  });
}

/** Handles in a drawing, for mouse, finger and keys: `pull(dx, dy, start, event)` is told by pointers, `press(by, up)`
 *  by arrow keys, up and down or sideways; `get` is what `start` is; the function returned says where it is drawn. */
export function handle(svg, { name, get, pull, press, say = get, range = {} }) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  const put = attributes => Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
  put({ r: 9, class: "handle", tabindex: 0, role: "slider", "aria-label": name, ...range });
  dragged(element, pull, get);
  element.addEventListener("keydown", event => {
    const by = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (!by) return;
    event.preventDefault();
    press(by, !/Left|Right/.test(event.key));
  });
  svg.append(element);
  return (cx, cy) => put({ cx, cy, "aria-valuenow": [get()].flat()[0], "aria-valuetext": [say()].flat().map(v =>
    shown(v, 3)).join(", ") });
}
