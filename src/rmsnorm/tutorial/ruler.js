// The only file that shows who shares a ruler: one batch, three norms, and which outputs a changed cell moves.

import { normRows, mean, std, rms, columns, shown } from "./numbers.js";
import { escape } from "./plot.js";

const ROWS = ["a", "b", "c"];
const A = [1, 2, 3, 6];
const ORIGINAL = [A, A.map(v => 10 * v), A.map(v => v + 5)];
const CHANGED = ORIGINAL.map((row, i) => row.map((v, j) => (i === 1 && j === 2 ? 45 : v)));
const KINDS = { batch: "BatchNorm", layer: "LayerNorm", rms: "RMSNorm" };
const MOVES = { batch: ["batch"], layer: ["batch", "layer"], rms: ["layer", "rms"], all: ["batch", "layer", "rms"] };

function compute({ batch }) {
  const touched = batch.map((row, i) => row.some((v, j) => v !== ORIGINAL[i][j]));
  const close = (one, other) => one.every((v, j) => Math.abs(v - other[j]) < 1e-9);
  const norms = {};
  for (const kind of ["batch", "layer", "rms"]) {
    const y = normRows(kind, batch, 1e-12), before = normRows(kind, ORIGINAL, 1e-12);
    const moved = y.map((row, i) => row.map((v, j) => v !== before[i][j]));
    const elsewhere = moved.flatMap((row, i) => (touched[i] ? [] : row)).filter(Boolean).length;
    norms[kind] = { y, moved, elsewhere, scale: close(y[1], y[0]), shift: close(y[2], y[0]) };
  }
  return { batch, touched, norms };
}

/** A table; `ruler` says which cells share a colour, `extra` is a statistic for each row or column. */
function table(title, note, rows, { ruler = () => "", moved = () => false, rights = {}, below = {} }) {
  const cell = (v, i, j) => `<td class="${ruler(i, j)}${moved(i, j) ? " moved" : ""}">${shown(v, 3)}</td>`;
  const head = ["", 1, 2, 3, 4, ...Object.keys(rights)].map(v => `<th scope="col">${v}</th>`).join("");
  const body = rows.map((row, i) => `<tr><th scope="row">${ROWS[i]}</th>${row.map((v, j) => cell(v, i, j)).join("")}${
    Object.values(rights).map(values => `<td class="statistic">${shown(values[i], 3)}</td>`).join("")}</tr>`).join("");
  const foot = Object.entries(below).map(([name, values]) => `<tr><th scope="row">${name}</th>${
    values.map(v => `<td class="statistic">${shown(v, 3)}</td>`).join("")}</tr>`).join("");
  return `<table><caption>${title}${note}</caption>
    <thead><tr>${head}</tr></thead><tbody>${body}${foot}</tbody></table>`;
}

export const ruler = {
  right: "batch",
  html: true,
  controls: {
    batch: { kind: "cells", start: CHANGED, rows: ROWS, step: 1 },
    preset: { kind: "choice", options: ["changed", "original"], start: "changed" },
  },
  acted: {
    preset: state => (state.preset === "original" ? ORIGINAL
      : CHANGED).forEach((row, i) => state.batch[i].splice(0, 4, ...row)),
  },
  compute,
  draw({ result, t, guess, mine }) {
    const columnsOf = columns(result.batch);
    const body = Object.entries(KINDS).map(([kind, name]) => {
      const { y, moved, elsewhere } = result.norms[kind];
      const foreseen = guess && escape(t(MOVES[guess].includes(kind) ? "moves" : "stays"));
      const guessed = guess && `<span class="flag">◆ ${escape(mine)}: ${foreseen}</span>`;
      const note = `<span class="note">${escape(t("elsewhere"))}: <b>${elsewhere}</b></span>${guessed ?? ""}`;
      const down = { mean: columnsOf.map(mean), std: columnsOf.map(std) };
      const right = kind === "rms" ? { rms: result.batch.map(rms) }
        : { mean: result.batch.map(mean), std: result.batch.map(std) };
      return table(`<b class="ink-${kind}">${name}</b>`, note, y, {
        ruler: (i, j) => `ruler-${kind === "batch" ? j : i}`,
        moved: (i, j) => moved[i][j],
        ...(kind === "batch" ? { below: down } : { rights: right }),
      });
    }).join("");
    return { body: `<div class="tables">${body}</div>` };
  },
  numbers: ({ norms }) => Object.fromEntries(["elsewhere", "scale", "shift"].flatMap(key =>
    Object.keys(KINDS).map(kind => [`${key}.${kind}`, norms[kind][key]]))),
  quotes: ({ norms }) => ({ elsewhere: norms.batch.elsewhere }),
};
