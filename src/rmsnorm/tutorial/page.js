// The only file that runs the page: it opens a panel when its question is answered, draws again what a control changes,
// and keeps the score.

import { filled, mapped, shown } from "./numbers.js";
import { Drawing, escape } from "./plot.js";
import { widget } from "./widgets.js";

const DATA = JSON.parse(document.getElementById("data").textContent), TEXTS = DATA.texts;
const PHONE = matchMedia("(max-width: 30rem)"), MARKS = { right: "✓", wrong: "✗", shown: "→" };
const panels = [];

/** The panel of a figure, covered; figures are given its `state`, `t`, which finds texts, and `set`. */
function panel(article, figure) {
  const { id } = article, find = where => article.querySelector(where);
  const t = key => TEXTS[`${id}.${key}`] ?? TEXTS[`plot.${key}`] ?? TEXTS[`page.${key}`];
  const state = mapped(figure.controls, control => control.start);
  const form = find("form"), options = [...form.querySelectorAll("input")];
  const own = { id, t, state, open, set, later, answer: find(`[value="${figure.right}"] + span`).innerHTML };
  let widgets, place, waiting;

  form.addEventListener("change", event => open(event.target.value));
  find("button").addEventListener("click", () => open(null));
  form.addEventListener("keydown", event => { // arrow keys go through the options; choosing one is a guess
    const by = /Arrow[DR]/.test(event.key) - /Arrow[UL]/.test(event.key), at = options.indexOf(event.target);
    if (!by || at < 0) return;
    event.preventDefault();
    options.at((at + by) % options.length).focus();
  });
  panels.push(own);

  /** Uncovers everything, for a guess or for null, where the reader asked to be shown. */
  function open(guess) {
    if (own.verdict) return;
    own.guess = guess;
    own.verdict = guess === null ? "shown" : guess === figure.right ? "right" : "wrong";
    find("fieldset").disabled = true;
    find(".question button").remove();
    for (const { value, parentElement } of options)
      parentElement.className = value === figure.right ? "right" : value === guess ? "wrong" : "";
    const box = find(".bench"), said = find(".answer");
    said.classList.add("verdict", own.verdict);
    said.innerHTML = `${MARKS[own.verdict]} ${filled(t(own.verdict), own)}`;
    box.append(find("template").content);
    Object.assign(box, { hidden: false, open: true });
    alone(box);
    find("summary").addEventListener("click", () => alone(box));
    find("pre").textContent = String(figure.code ?? figure.compute).replace(/^\s*\/\/.*\n/gm, "");
    widgets = mapped(figure.controls, (control, key) => widget(`${id}-${key}`, t(`control.${key}`), control,
      value => set(key, value), option => t(`${key}.${option}`) ?? option));
    find(".controls").append(...Object.values(widgets).map(one => one.box));
    find(".live button")?.addEventListener("click", ask);
    place = figure.attach?.(own, article);
    show();
    new ResizeObserver(later).observe(find("figure"));
    update();
    score();
  }

  /** A control's new value, a slider's the nearest of its stops. */
  function set(key, value) {
    const { stops, sets } = figure.controls[key];
    state[key] = stops?.reduce((a, b) => (Math.abs(b - value) < Math.abs(a - value) ? b : a)) ?? value;
    Object.assign(state, sets?.(value));
    show();
    later();
  }

  function show() {
    for (const [key, one] of Object.entries(widgets)) one.show(state[key]);
  }

  /** What only the library or a real model can say, asked of `rmsnorm learn`. */
  async function ask({ target }) {
    const output = find(".live output"), sentence = find("textarea")?.value ?? "";
    target.disabled = true;
    output.textContent = t("busy");
    try {
      const answer = await fetch(`live/${target.value}?${new URLSearchParams({ ...state, sentence })}`);
      const found = DATA.measured[target.value] = await answer.json();
      output.textContent = found.why ?? found.machine ?? "✓";
    } catch {
      output.textContent = t("failed");
    }
    target.disabled = false;
    later();
  }

  function later() {
    waiting ??= requestAnimationFrame(() => {
      waiting = null;
      update();
    });
  }

  function update() {
    const { guess } = own, room = find("figure"), [ground] = room.children;
    const width = Math.max(280, Math.min(640, room.clientWidth || 640)), d = new Drawing(width, guess && t("guess"));
    const result = figure.compute(state, DATA);
    const drawn = figure.draw(d, { result, state, guess, t, ground, data: DATA });
    if (d.height) { // but for tables
      ground.firstElementChild.innerHTML = d.body;
      ground.setAttribute("viewBox", `0 0 ${width} ${d.height}`);
      ground.style.maxWidth = `${width}px`;
    }
    place?.(drawn);
    const values = { ...result, ...figure.says?.(result, { state, data: DATA, t }) };
    const value = name => name.split(".").reduce((found, key) => found?.[key], values);
    const words = v => (typeof v === "boolean" ? t(v ? "yes" : "no") : [v].flat().map(one => shown(one)).join(", "));
    for (const cell of article.querySelectorAll("[data-number], [data-quote]")) {
      const { number, quote } = cell.dataset, found = value(quote ?? number.slice(id.length + 1));
      cell.textContent = words(found);
      cell.dataset.value = found;
      if (number) cell.parentElement.hidden = found === undefined; // of a model that wasn't measured
    }
  }
}

/** On a phone one figure is open at a time, and what is under the reader's finger stays there. */
function alone(box) {
  if (!PHONE.matches) return;
  const { top } = box.parentElement.getBoundingClientRect();
  for (const other of document.querySelectorAll(".bench[open]")) if (other !== box) other.open = false;
  scrollBy({ top: box.parentElement.getBoundingClientRect().top - top, behavior: "instant" });
}

function score() {
  const find = id => document.getElementById(id), answered = panels.filter(one => one.verdict);
  const guessed = answered.filter(one => one.guess !== null), right = guessed.filter(one => one.verdict === "right");
  find("score").textContent = filled(TEXTS["page.score"], { right: right.length, guessed: guessed.length,
    all: panels.length });
  find("short").open ||= answered.length === panels.length;
  find("sheet").hidden = false;
  find("sheet").tBodies[0].innerHTML = answered.map(({ id, verdict, answer, t }) => `<tr><td>${MARKS[verdict]}</td>
    <th scope="row"><a href="#${id}">${escape(t("title"))}</a></th><td>${answer}</td></tr>`).join("");
}

/** Begins; the figures by the names of their panels. */
export function run(figures) {
  for (const article of document.querySelectorAll(".panel")) panel(article, figures[article.id]);
  addEventListener("beforeprint", () => {
    panels.forEach(({ open }) => open(null));
    document.querySelectorAll(".bench").forEach(box => { box.open = true; });
  });
  for (const name of ["keydown", "pointerover"]) // Escape puts away what a word of the glossary means
    addEventListener(name, event => document.body.classList.toggle("hushed", event.key === "Escape"));
}
