// The only file that shows who shares a ruler: one batch, three norms, and which outputs a changed cell moves.

import { columns, mean, normRows, rms, shown, std } from "./numbers.js";

const ROWS = ["a", "b", "c"], A = [1, 2, 3, 6];
const ORIGINAL = [A, A.map(v => 10 * v), A.map(v => v + 5)], CHANGED = ORIGINAL.with(1, [10, 20, 45, 60]);
const MOVES = { batch: ["batch"], layer: ["batch", "layer"], rms: ["layer", "rms"], all: ["batch", "layer", "rms"] };

export function compute({ batch }) {
  const touched = batch.map((row, i) => row.some((v, j) => v !== ORIGINAL[i][j]));
  const close = (one, other) => one.every((v, j) => Math.abs(v - other[j]) < 1e-9);
  const norms = Object.fromEntries(MOVES.all.map(kind => {
    const y = normRows(kind, batch, 1e-12), before = normRows(kind, ORIGINAL, 1e-12);
    const moved = y.map((row, i) => row.map((v, j) => v !== before[i][j]));
    const elsewhere = moved.flatMap((row, i) => (touched[i] ? [] : row)).filter(Boolean).length;
    return [kind, { y, moved, elsewhere, scale: close(y[1], y[0]), shift: close(y[2], y[0]) }];
  }));
  return { batch, norms };
}

export const right = "batch";
export const controls = {
  batch: { start: CHANGED, rows: ROWS, step: 1 },
  preset: { options: ["changed", "original"], start: "changed",
    sets: preset => ({ batch: preset === "original" ? ORIGINAL : CHANGED }) },
};

/** Fills the tables of page.html. */
export function draw(_, { result: { batch, norms }, t, guess, ground }) {
  for (const [kind, { y, moved, elsewhere }] of Object.entries(norms)) {
    const find = where => [...ground.querySelectorAll(`.of-${kind} ${where}`)], down = kind === "batch";
    const rulers = kind === "rms" ? [rms] : [mean, std], groups = down ? columns(batch) : batch;
    const statistics = groups.map(group => rulers.map(f => f(group)));
    const fill = (where, values) =>
      find(where).forEach((cell, i) => { cell.textContent = shown(values.flat()[i], 3); });
    fill("td:not(.statistic)", y);
    find("td:not(.statistic)").forEach((cell, i) => cell.classList.toggle("moved", moved.flat()[i]));
    fill(".statistic", down ? columns(statistics) : statistics);
    fill(".note b", [elsewhere]);
    if (guess) find(".flag")[0].textContent = `◆ ${t("guess")}: ${t(MOVES[guess].includes(kind) ? "moves" : "stays")}`;
  }
}
