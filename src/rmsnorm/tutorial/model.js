// The only file with the model that is trained in the page: its formulas, its backward by hand, its steps.
// Eight letters are looked up, four numbers each, and stand side by side as a stream of 32. Each layer adds
// W relu(norm(x)) to it; after a last norm, one matrix says how likely each next letter is.

import { backwardRows, columns, mapped, normal, normRows, range, sum, uniform } from "./numbers.js";

export const LETTERS = " abcdefghijklmnopqrstuvwxyz.";
const CONTEXT = 8, EACH = 4, N = CONTEXT * EACH, V = LETTERS.length, LAYERS = 4, BATCH = 32, EPS = 1e-5, MOMENTUM = 0.9;
const GAINS = [...range(LAYERS, l => `g${l}`), "last"];

/** A text as numbers of letters; whatever is no letter and no space is a full stop. */
export const encode = words => [...words.toLowerCase().replace(/\s+/g, " ")].map(c =>
  (LETTERS.includes(c) ? LETTERS.indexOf(c) : V - 1));

/** The loss in nats of a model that knows how frequent each letter is, and no more. */
export const frequencies = data => -sum(range(V, letter => data.filter(one => one === letter).length / data.length)
  .filter(Boolean).map(share => share * Math.log(share)));

/** One arm of the race; the arms of a seed begin with the same numbers and read the same letters. */
export function create(kind, data, seed) {
  const noise = normal(seed), table = (rows, n, scale) => range(rows, () => range(n, () => scale * noise()));
  const weights = { embed: table(V, EACH, 1) };
  for (let l = 0; l < LAYERS; l++) weights[`w${l}`] = table(N, N, Math.sqrt(2 / N));
  weights.out = table(N, V, 0.3 / Math.sqrt(N));
  for (const gain of GAINS) weights[gain] = range(N, () => 1);
  const count = Object.values(weights).flat(2).length;
  return { kind, data, weights, speed: mapped(weights, zeros), count, next: uniform(seed + 1000), losses: [] };
}
const zeros = values => values.map(v => (Array.isArray(v) ? zeros(v) : 0));

/** Tables are lists of rows; columns(m) is m transposed. */
const product = (a, m) => a.map(row => {
  const out = new Array(m[0].length).fill(0);
  row.forEach((v, i) => {
    const other = m[i];
    if (v !== 0) for (let j = 0; j < out.length; j++) out[j] += v * other[j];
  });
  return out;
});
const each = (f, a, b) => a.map((row, i) => row.map((v, j) => f(v, b[i][j])));
const gained = (rows, gain) => rows.map(row => row.map((v, j) => v * gain[j]));

/** The mean loss in nats over the windows that start at these places; puts its gradients into `model.grads`. */
export function loss(model, places) {
  const { kind, data, weights } = model, grads = { embed: zeros(weights.embed) };
  const letters = places.map(place => data.slice(place, place + CONTEXT));
  let x = letters.map(row => row.flatMap(letter => weights.embed[letter]));
  const read = gain => {
    const hat = normRows(kind, x, EPS);
    return { x, hat, gain, h: gained(hat, weights[gain]) };
  };
  const back = (layer, dh) => {
    grads[layer.gain] = columns(each((d, v) => d * v, dh, layer.hat)).map(sum);
    return backwardRows(kind, layer.x, gained(dh, weights[layer.gain]), EPS);
  };
  const layers = range(LAYERS, l => {
    const layer = read(`g${l}`);
    layer.active = layer.h.map(row => row.map(v => Math.max(v, 0)));
    x = each((a, b) => a + b, x, product(layer.active, weights[`w${l}`]));
    return layer;
  });
  const last = read("last");
  let total = 0;
  const d = product(last.h, weights.out).map((row, b) => {
    const goal = data[places[b] + CONTEXT], top = Math.max(...row), powers = row.map(v => Math.exp(v - top)),
      all = sum(powers);
    total += (top + Math.log(all) - row[goal]) / places.length;
    return powers.map((power, j) => (power / all - (j === goal)) / places.length);
  });
  grads.out = product(columns(last.h), d);
  let dx = back(last, product(d, columns(weights.out)));
  for (let l = LAYERS - 1; l >= 0; l--) {
    const { active } = layers[l], w = `w${l}`;
    grads[w] = product(columns(active), dx);
    const dh = each((v, a) => (a > 0 ? v : 0), product(dx, columns(weights[w])), active);
    dx = each((a, b) => a + b, dx, back(layers[l], dh));
  }
  letters.forEach((row, b) => row.forEach((letter, place) => {
    for (let i = 0; i < EACH; i++) grads.embed[letter][i] += dx[b][place * EACH + i];
  }));
  model.grads = grads;
  return total;
}

/** One step of gradient descent with momentum. The arm without a norm has no gains to learn: they stay 1. */
export function step(model, rate) {
  const descend = (w, speed, gradient) => w.forEach((v, i) => {
    if (Array.isArray(v)) return descend(v, speed[i], gradient[i]);
    speed[i] = MOMENTUM * speed[i] + gradient[i];
    w[i] -= rate * speed[i];
  });
  const places = range(BATCH, () => Math.floor(model.next() * (model.data.length - CONTEXT)));
  model.losses.push(loss(model, places));
  for (const name of Object.keys(model.weights)) if (model.kind !== "none" || !GAINS.includes(name))
    descend(model.weights[name], model.speed[name], model.grads[name]);
}
