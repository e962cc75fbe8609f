// The only file that runs the page: it opens a panel when its question is answered, draws again what a control changes,
// and keeps the score.

import { shown } from "./numbers.js";
import { escape } from "./plot.js";
import { slider, choice, cells } from "./widgets.js";
import { ruler } from "./ruler.js";
import { layer } from "./layer.js";
import { eps } from "./eps.js";
import { sphere } from "./sphere.js";
import { invariance } from "./invariance.js";
import { gradient } from "./gradient.js";
import { passes } from "./passes.js";
import { precision } from "./precision.js";
import { network } from "./network.js";
import { depth } from "./depth.js";
import { study } from "./study.js";
import { train } from "./train.js";

const FIGURES = { ruler, layer, eps, sphere, invariance, gradient, passes, precision, network, depth, study, train };
const inside = id => JSON.parse(document.getElementById(`data-${id}`).textContent);
const TEXTS = inside("texts"), DATA = { measured: inside("measured"), study: inside("study"),
  corpus: inside("corpus") };
const LIVE = "live" in document.documentElement.dataset;
const said = (panel, key) => {
  const words = TEXTS[`${panel}.${key}`] ?? TEXTS[`plot.${key}`] ?? TEXTS[`page.${key}`];
  if (words === undefined) throw new Error(`no text for ${panel}.${key}`);
  return words;
};
const PHONE = matchMedia("(max-width: 30rem)");
const MARKS = { right: "✓", wrong: "✗", answer: "→" };
const answers = new Map(); // by panel: the option that was chosen, or null where the reader asked to be shown
const judged = id => (answers.get(id) === null ? "answer" : answers.get(id) === FIGURES[id].right ? "right" : "wrong");
/** The words of the right option. */
const option = id => document.querySelector(`#${id} input[value="${FIGURES[id].right}"]`).parentElement.innerHTML
  .replace(/<input.*?>/, "").trim();

class Panel {
  constructor(article) {
    this.id = article.id;
    this.article = article;
    this.figure = FIGURES[this.id];
    this.t = key => said(this.id, key);
    const form = article.querySelector("form");
    form.addEventListener("change", event => this.open(event.target.value));
    form.querySelector("button").addEventListener("click", () => this.open(null));
    form.addEventListener("keydown", event => { // arrow keys go through the options; who chose one would have guessed
      const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      const options = [...form.querySelectorAll("input")], at = options.indexOf(event.target);
      if (!by || at < 0) return;
      event.preventDefault();
      options.at((at + by) % options.length).focus();
    });
  }

  open(guess) {
    if (answers.has(this.id)) return;
    answers.set(this.id, guess);
    const { article, figure, t } = this, form = article.querySelector("form");
    form.querySelector("fieldset").disabled = true;
    form.querySelector("button").remove();
    for (const input of form.querySelectorAll("input"))
      input.parentElement.className = input.value === figure.right ? "right" : input.value === guess ? "wrong" : "";
    this.guess = guess;
    this.state = structuredClone(Object.fromEntries(Object.entries(figure.controls).map(([key, c]) => [key, c.start])));
    this.bench(article.querySelector(".bench"));
    const verdict = judged(this.id), words = said("page", verdict), space = words.endsWith("：") ? "" : " ";
    article.querySelector(".answer").innerHTML =
      `<p class="verdict ${verdict}">${MARKS[verdict]} ${escape(words)}${space}${option(this.id)}</p>`;
    this.update();
    score();
  }

  /** What was covered: controls, drawing, numbers, the code that ran. */
  bench(box) {
    const { figure, id, t } = this, changed = () => this.later();
    const drawing = `<svg role="${figure.hands ? "group" : "img"}" aria-label="${escape(t("caption"))}"><g></g></svg>`;
    box.hidden = false;
    box.open = true;
    alone(box);
    box.innerHTML = `<summary>${escape(t("figure"))}</summary>
      <div class="controls" role="group" aria-label="${escape(t("turn"))}"></div><figure>
      ${figure.html ? '<div class="html"></div>' : drawing}
      <figcaption>${escape(t("caption"))}</figcaption></figure><dl class="numbers"></dl>
      <details class="ran"><summary>${escape(t("code"))}</summary><pre tabindex="0"></pre></details>`;
    box.querySelector("summary").after(this.article.querySelector(":scope > template").content.cloneNode(true));
    box.querySelector("summary").addEventListener("click", () => alone(box));
    box.querySelector("pre").textContent = source(figure.code ?? figure.compute);
    const controls = box.querySelector(".controls");
    this.widgets = {};
    for (const [key, control] of Object.entries(figure.controls)) {
      const name = t(`control.${key}`), own = `${id}-${key}`;
      const words = option => TEXTS[`${id}.${key}.${option}`] ?? option;
      const act = () => { figure.acted?.[key]?.(this.state); this.refresh(); changed(); };
      const made = { slider, choice, cells }[control.kind]?.(own, name, control, this.state, key, act, words);
      if (made) controls.append(this.widgets[key] = made);
    }
    if (LIVE && figure.live) this.live(box);
    this.svg = box.querySelector("svg");
    this.place = figure.attach?.(this, box);
    new ResizeObserver(() => this.later()).observe(box.querySelector("figure"));
  }

  /** What only the library or a real model can say: asked of `rmsnorm learn`, marked as live. */
  live(box) {
    const { name, asks, sentence } = this.figure.live, place = document.createElement("div");
    place.className = "live";
    const [label, start] = sentence ? [this.t("sentence"), this.t("sentence.start")].map(escape) : [];
    place.innerHTML = (sentence ? `<label>${label}<textarea rows="2">${start}</textarea></label>` : "")
      + `<button type="button">${escape(this.t(sentence ? "read" : "measure"))}</button><output></output>`;
    const [button, output] = ["button", "output"].map(one => place.querySelector(one));
    button.addEventListener("click", async () => {
      button.disabled = true;
      output.textContent = this.t("busy");
      try {
        const words = new URLSearchParams(sentence ? { sentence: place.querySelector("textarea").value }
          : asks(this.state));
        const found = DATA.measured[name] = await (await fetch(`live/${name}?${words}`)).json();
        output.textContent = found.why ?? found.machine ?? "✓";
      } catch {
        output.textContent = this.t("failed");
      }
      button.disabled = false;
      this.later();
    });
    box.querySelector("figure").before(place);
  }

  refresh() {
    for (const widget of Object.values(this.widgets)) widget.refresh?.();
  }

  later() {
    this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.update(); });
  }

  update() {
    const { article, figure, state, t, guess } = this, figureBox = article.querySelector("figure");
    const width = Math.max(280, Math.min(640, figureBox.clientWidth || 640));
    this.result = figure.compute(state, DATA);
    const seen = figure.draw({ width, t, state, guess, result: this.result, data: DATA, mine: t("guess") });
    if (figure.html) figureBox.querySelector(".html").innerHTML = seen.body;
    else {
      this.svg.setAttribute("viewBox", `0 0 ${width} ${seen.height}`);
      this.svg.style.aspectRatio = `${width} / ${seen.height}`;
      this.svg.style.maxWidth = `${width}px`;
      this.svg.firstElementChild.innerHTML = seen.body;
    }
    this.place?.(seen);
    const numbers = Object.entries(figure.numbers?.(this.result, state, t) ?? {});
    const words = v => (typeof v === "boolean" ? t(v ? "yes" : "no") : [v].flat().map(one => shown(one)).join(", "));
    article.querySelector(".numbers").innerHTML = numbers.map(([key, value]) =>
      `<div><dt>${escape(t(`number.${key}`))}</dt>
        <dd data-number="${this.id}.${key}" data-value="${value}">${escape(words(value))}</dd></div>`).join("");
    const quotes = figure.quotes?.(this.result, DATA, t) ?? {};
    for (const quote of article.querySelectorAll("[data-quote]")) {
      if (!(quote.dataset.quote in quotes)) throw new Error(`${this.id}: no number for ${quote.dataset.quote}`);
      quote.textContent = shown(quotes[quote.dataset.quote]);
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

/** The text of a function as it runs, without comments, moved to the left. */
const source = f => {
  const lines = f.toString().replace(/^\s*\/\/.*\n/gm, "").split("\n");
  const indent = Math.min(...lines.slice(1).filter(line => line.trim()).map(line => line.search(/\S/)));
  return lines.map((line, i) => (i ? line.slice(Number.isFinite(indent) ? indent : 0) : line)).join("\n");
};

function score() {
  const right = [...answers.keys()].filter(id => judged(id) === "right").length;
  const guessed = [...answers.values()].filter(guess => guess !== null).length;
  document.getElementById("score").textContent = said("page", "score")
    .replace("{right}", right).replace("{guessed}", guessed).replace("{all}", Object.keys(FIGURES).length);
  document.getElementById("short").open ||= answers.size === Object.keys(FIGURES).length;
  const sheet = document.getElementById("sheet");
  sheet.hidden = false;
  sheet.tBodies[0].innerHTML = [...answers.keys()].map(id =>
    `<tr><td>${MARKS[judged(id)]}</td><th scope="row"><a href="#${id}">${escape(said(id, "title"))}</a></th>
      <td>${option(id)}</td></tr>`).join("");
}

/** The glossary on hover and focus; the link itself is described by the same words for screen readers. */
function glossary() {
  const tip = document.body.appendChild(Object.assign(document.createElement("div"),
    { className: "tip", hidden: true }));
  tip.setAttribute("aria-hidden", "true");
  const show = event => {
    const term = event.target.closest?.(".term");
    if (!term) return;
    tip.textContent = document.querySelector(term.getAttribute("href")).textContent;
    tip.hidden = false;
    const box = term.getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8)) + scrollX}px`;
    const above = box.bottom + own.height + 8 > innerHeight;
    tip.style.top = `${(above ? box.top - own.height - 6 : box.bottom + 6) + scrollY}px`;
  };
  for (const name of ["pointerover", "focusin"]) document.addEventListener(name, show);
  for (const name of ["pointerout", "focusout"]) document.addEventListener(name, () => { tip.hidden = true; });
  addEventListener("keydown", event => { if (event.key === "Escape") tip.hidden = true; });
}

const panels = [...document.querySelectorAll(".panel")].map(article => new Panel(article));
addEventListener("beforeprint", () => {
  panels.forEach(panel => panel.open(null));
  document.querySelectorAll(".bench").forEach(box => { box.open = true; });
});
glossary();
const facts = DATA.measured.machine;
document.getElementById("facts").textContent = LIVE ? said("page", "live") : facts
  ? `${said("page", "recorded")} ${facts}` : said("page", "unmeasured");
