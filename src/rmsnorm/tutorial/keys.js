// The only file with a script of the notebook's page: lets the keyboard choose between radio buttons.
// Marimo's are Radix's, in shadow roots. To move the focus, Radix tries one button after the other until
// document.activeElement changes; that is the shadow's host all the time, so it always ended at the last button.
(() => {
  const STEPS = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };
  const role = (element, name) => element.getAttribute?.("role") === name;
  const buttons = group => [...group.querySelectorAll("[role=radio]")];
  let tabbed = false;
  addEventListener("pointerdown", () => { tabbed = false; }, true);
  addEventListener("keydown", event => {
    tabbed = event.key === "Tab";
    const button = event.composedPath()[0], step = STEPS[event.key];
    if (!step || !role(button, "radio")) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    const all = buttons(button.closest("[role=radiogroup]"));
    const next = all[(all.indexOf(button) + step + all.length) % all.length];
    next.focus();
    next.click();
  }, true);
  addEventListener("focusin", event => {
    const group = event.composedPath()[0];
    if (!tabbed || !role(group, "radiogroup")) return;
    event.stopImmediatePropagation();
    const all = buttons(group);
    (all.find(button => button.getAttribute("aria-checked") === "true") ?? all[0])?.focus();
  }, true);
})();
