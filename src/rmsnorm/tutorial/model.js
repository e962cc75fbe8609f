// The only file with the model that is trained in the page: its formulas, its backward by hand, its steps.
// Eight letters are looked up, four numbers each, and stand side by side as a stream of 32. Each layer adds
// W relu(norm(x)) to it; after a last norm, one matrix says how likely each next letter is.

import { normal, uniform } from "./numbers.js";

export const LETTERS = " abcdefghijklmnopqrstuvwxyz.";
const CONTEXT = 8, EACH = 4, N = CONTEXT * EACH, V = LETTERS.length, LAYERS = 4, BATCH = 32, EPS = 1e-5, MOMENTUM = 0.9;

/** A text as numbers of letters; whatever is no letter and no space is a full stop. */
export const encode = words => [...words.toLowerCase().replace(/\s+/g, " ")].map(c =>
  (LETTERS.includes(c) ? LETTERS.indexOf(c) : V - 1));

/** The loss in nats of a model that knows how frequent each letter is, and no more. */
export function frequencies(data) {
  const counts = new Array(V).fill(0);
  for (const letter of data) counts[letter]++;
  return counts.reduce((total, c) => total - (c ? c / data.length * Math.log(c / data.length) : 0), 0);
}

/** All three norms, forward: groups are rows or, for `batch`, columns. Returns x̂ and 1/std or 1/rms of each group. */
export function forward(kind, x, rows, n) {
  if (kind === "none") return { hat: x, r: null };
  const [groups, size, step, next] = kind === "batch" ? [n, rows, n, 1] : [rows, n, 1, n];
  const hat = new Float64Array(x.length), r = new Float64Array(groups);
  for (let g = 0; g < groups; g++) {
    let middle = 0, square = 0;
    if (kind !== "rms") for (let i = 0; i < size; i++) middle += x[g * next + i * step] / size;
    for (let i = 0; i < size; i++) square += (x[g * next + i * step] - middle) ** 2 / size;
    r[g] = 1 / Math.sqrt(square + EPS);
    for (let i = 0; i < size; i++) hat[g * next + i * step] = (x[g * next + i * step] - middle) * r[g];
  }
  return { hat, r };
}

/** Their backward: dx = r (h − mean(h) − x̂ mean(h x̂)), without mean(h) for RMSNorm; h is the gradient at x̂. */
export function backward(kind, { hat, r }, h, rows, n) {
  if (kind === "none") return h;
  const [groups, size, step, next] = kind === "batch" ? [n, rows, n, 1] : [rows, n, 1, n];
  const dx = new Float64Array(h.length);
  for (let g = 0; g < groups; g++) {
    let middle = 0, along = 0;
    for (let i = 0; i < size; i++) {
      const at = g * next + i * step;
      if (kind !== "rms") middle += h[at] / size;
      along += h[at] * hat[at] / size;
    }
    for (let i = 0; i < size; i++) {
      const at = g * next + i * step;
      dx[at] = r[g] * (h[at] - middle - hat[at] * along);
    }
  }
  return dx;
}

/** out[b, j] += Σ a[b, i] m[i, j], or with m transposed. */
function product(a, m, out, rows, n, k, transposed = false) {
  for (let b = 0; b < rows; b++) for (let i = 0; i < n; i++) {
    const value = a[b * n + i];
    if (value === 0) continue;
    if (transposed) for (let j = 0; j < k; j++) out[b * k + j] += value * m[j * n + i];
    else for (let j = 0; j < k; j++) out[b * k + j] += value * m[i * k + j];
  }
}
function outer(a, d, out, rows, n, k) {
  for (let b = 0; b < rows; b++) for (let i = 0; i < n; i++) {
    const value = a[b * n + i];
    if (value !== 0) for (let j = 0; j < k; j++) out[i * k + j] += value * d[b * k + j];
  }
}

/** One arm of the race; the arms of a seed begin with the same numbers and read the same letters. */
export function create(kind, data, seed) {
  const noise = normal(seed), sizes = { embed: V * EACH, ...layers(i => [`w${i}`, N * N]), ...layers(i => [`g${i}`, N]),
    last: N, out: N * V };
  const weights = {}, grads = {}, speed = {};
  for (const [name, size] of Object.entries(sizes)) {
    const scale = name === "embed" ? 1 : name === "out" ? 0.3 / Math.sqrt(N) : Math.sqrt(2 / N);
    weights[name] = Float64Array.from({ length: size },
      () => (name[0] === "g" || name === "last" ? 1 : scale * noise()));
    grads[name] = new Float64Array(size);
    speed[name] = new Float64Array(size);
  }
  const count = Object.values(sizes).reduce((a, b) => a + b, 0);
  return { kind, data, weights, grads, speed, count, next: uniform(seed + 1000), losses: [] };
}
const layers = f => Object.fromEntries(Array.from({ length: LAYERS }, (_, i) => f(i)));

export const draw = model => Array.from({ length: BATCH },
  () => Math.floor(model.next() * (model.data.length - CONTEXT)));

/** The mean loss in nats over the windows that start at these places; fills `grads`. */
export function loss({ kind, data, weights, grads }, places) {
  const rows = places.length, gained = (hat, g) => hat.map((v, i) => v * g[i % N]);
  for (const g of Object.values(grads)) g.fill(0);
  let x = new Float64Array(rows * N);
  places.forEach((place, b) => {
    for (let i = 0; i < N; i++) x[b * N + i] = weights.embed[data[place + Math.floor(i / EACH)] * EACH + i % EACH];
  });
  const seen = [];
  for (let l = 0; l < LAYERS; l++) {
    const normed = forward(kind, x, rows, N), h = gained(normed.hat, weights[`g${l}`]),
      active = h.map(v => Math.max(v, 0));
    x = x.slice();
    product(active, weights[`w${l}`], x, rows, N, N);
    seen.push({ normed, active });
  }
  const normed = forward(kind, x, rows, N), h = gained(normed.hat, weights.last), logits = new Float64Array(rows * V);
  product(h, weights.out, logits, rows, N, V);
  let total = 0;
  const d = new Float64Array(rows * V);
  for (let b = 0; b < rows; b++) {
    const row = logits.subarray(b * V, b * V + V), top = row.reduce((a, v) => Math.max(a, v), -Infinity),
      goal = data[places[b] + CONTEXT];
    let sum = 0;
    for (const v of row) sum += Math.exp(v - top);
    total += (top + Math.log(sum) - row[goal]) / rows;
    for (let j = 0; j < V; j++) d[b * V + j] = (Math.exp(row[j] - top) / sum - (j === goal)) / rows;
  }
  outer(h, d, grads.out, rows, N, V);
  const dh = new Float64Array(rows * N);
  product(d, weights.out, dh, rows, V, N, true);
  const through = (normed_, dh_, gain, dgain) => {
    dh_.forEach((v, i) => { dgain[i % N] += v * normed_.hat[i]; });
    return backward(kind, normed_, dh_.map((v, i) => v * gain[i % N]), rows, N);
  };
  let dx = through(normed, dh, weights.last, grads.last);
  for (let l = LAYERS - 1; l >= 0; l--) {
    const { normed: own, active } = seen[l], da = new Float64Array(rows * N);
    outer(active, dx, grads[`w${l}`], rows, N, N);
    product(dx, weights[`w${l}`], da, rows, N, N, true);
    const back = through(own, da.map((v, i) => (active[i] > 0 ? v : 0)), weights[`g${l}`], grads[`g${l}`]);
    dx = dx.map((v, i) => v + back[i]);
  }
  places.forEach((place, b) => {
    for (let i = 0; i < N; i++) grads.embed[data[place + Math.floor(i / EACH)] * EACH + i % EACH] += dx[b * N + i];
  });
  return total;
}

/** One step of gradient descent with momentum. The arm without a norm has no gains to learn: they stay 1. */
export function step(model, rate) {
  model.losses.push(loss(model, draw(model)));
  for (const [name, w] of Object.entries(model.weights)) {
    if (model.kind === "none" && (name[0] === "g" || name === "last")) continue;
    const g = model.grads[name], v = model.speed[name];
    for (let i = 0; i < w.length; i++) {
      v[i] = MOMENTUM * v[i] + g[i];
      w[i] -= rate * v[i];
    }
  }
}
