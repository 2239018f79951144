// From logits to a token: the same choices as smolctl/generation/sampling.py, with the same random numbers.

import { sha512 } from "./sha512.js";

const DEFAULTS = {temperature: 1, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1};
// The search for the likeliest tokens goes down from these shares of the likeliest one: few tokens reach the first
// thresholds, and usually these are enough.
const RUNGS = [0.1, 1e-2, 1e-3, 1e-4, 0];
const {fround} = Math; // NumPy computes in float32

/** Python's random number generator (Mersenne Twister), seeded like `Random(text)`. */
export class Random {
  #state = new Uint32Array(624);
  #at = 624;

  /** @param {string} text */
  static async of(text) {
    const start = new TextEncoder().encode(text);
    const digest = sha512(start);
    return new Random([...start, ...digest]);
  }

  /** @param {number[]} bytes of the seed as a number, the highest first */
  constructor(bytes) {
    const words = [];
    for (let end = bytes.length; end > 0; end -= 4)
      words.push(bytes.slice(Math.max(end - 4, 0), end).reduce((word, byte) => ((word << 8) | byte) >>> 0, 0));
    const state = this.#state;
    state[0] = 19650218;
    for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    let i = 1;
    const mix = (factor) => Math.imul(state[i - 1] ^ (state[i - 1] >>> 30), factor) ^ state[i];
    const advance = () => {
      if (++i < 624) return;
      state[0] = state[623];
      i = 1;
    };
    for (let k = 0; k < Math.max(624, words.length); k++, advance())
      state[i] = mix(1664525) + words[k % words.length] + (k % words.length);
    for (let k = 0; k < 623; k++, advance()) state[i] = mix(1566083941) - i;
    state[0] = 0x80000000;
  }

  #word() {
    const state = this.#state;
    if (this.#at === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.#at = 0;
    }
    let y = state[this.#at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  /** The next number, at least 0 and below 1. */
  next() {
    const high = this.#word() >>> 5;
    return (high * 67108864 + (this.#word() >>> 6)) / 9007199254740992;
  }
}

/** Chooses the tokens of one answer. */
export class Sampler {
  #settings;
  #random;

  /**
   * @param {object} settings temperature, top_k, top_p, min_p, repetition_penalty as in `smolctl sample`
   * @param {number | bigint | string} seed an integer, as in `smolctl sample --seed`
   * @param {number} turn number of earlier answers in the conversation
   */
  constructor(settings, seed, turn = 0) {
    this.#settings = {...DEFAULTS, ...settings};
    /** Must be awaited before the first `choose`. */
    this.ready = Random.of(`(${seed}, ${turn}, 0)`).then((random) => {
      this.#random = random;
    });
  }

  /**
   * The next token.
   * @param {Float32Array} logits
   * @param {Iterable<number>} seen tokens of the text so far, for the repetition penalty
   * @throws {RangeError} the logits are not finite
   */
  choose(logits, seen) {
    largest(logits); // throws if they are not finite
    const {temperature, repetition_penalty} = this.#settings;
    const penalized = penalize(logits, seen, fround(repetition_penalty));
    const top = largest(penalized);
    if (temperature === 0) return top;
    return draw(this.#weights(penalized, penalized[top]), this.#random.next());
  }

  /** Probabilities relative to the likeliest token, after temperature, top-k, top-p and min-p, in this order. */
  #weights(logits, top) {
    const {temperature, top_k, top_p, min_p} = this.#settings;
    const divisor = fround(temperature);
    const weights = logits.map((logit) => Math.exp(fround(fround(logit - top) / divisor)));
    if (top_k > 0 && top_k < weights.length)
      keep(weights, likeliest(weights, (some) => some.length >= top_k)[top_k - 1]);
    if (top_p < 1) keepNucleus(weights, top_p);
    if (min_p > 0) keep(weights, fround(min_p));
    return weights;
  }
}

/** The index of the largest value, the first of several. */
function largest(logits) {
  let best = 0;
  for (let id = 0; id < logits.length; id++) {
    if (logits[id] > logits[best]) best = id;
    else if (Number.isNaN(logits[id])) best = id; // kept, because no number is above NaN
  }
  if (!Number.isFinite(logits[best])) throw new RangeError("the model's output is not finite");
  return best;
}

/** Make tokens that occurred less likely: positive logits are divided, negative ones multiplied. */
function penalize(logits, seen, penalty) {
  if (penalty === 1) return logits;
  const penalized = logits.slice();
  for (const id of seen) penalized[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  return penalized;
}

function keep(weights, least) {
  weights.forEach((weight, id) => {
    if (weight < least) weights[id] = 0;
  });
}

/** The largest weights in descending order: as many as `enough` requires, or all. */
function likeliest(weights, enough) {
  let some;
  for (const rung of RUNGS) {
    some = weights.filter((weight) => weight >= rung);
    if (enough(some)) break;
  }
  return some.sort().reverse();
}

/** Set to 0 all weights outside the smallest set with a share `topP` of their sum. Of equal weights, those with lower
 * ids are added first. */
function keepNucleus(weights, topP) {
  const goal = topP * sum(weights);
  const likely = likeliest(weights, (some) => sum(some) >= goal);
  let [count, before] = [0, 0];
  while (count < likely.length && (before < goal || count === 0)) before += likely[count++];
  const least = likely[count - 1];
  let ties = likely.subarray(0, count).reduce((found, weight) => found + (weight === least), 0);
  weights.forEach((weight, id) => {
    if (weight < least || (weight === least && ties-- <= 0)) weights[id] = 0;
  });
}

function sum(weights) {
  let total = 0;
  for (let id = 0; id < weights.length; id++) total += weights[id];
  return total;
}

/** The token at which the cumulative sum of the weights exceeds the share `share` of their sum. */
function draw(weights, share) {
  const target = share * sum(weights);
  let [passed, last] = [0, 0];
  for (let id = 0; id < weights.length; id++) {
    passed += weights[id];
    if (weights[id] > 0) last = id;
    if (passed > target) return id;
  }
  return last;
}

/**
 * The probability of a token and the likeliest others, under the unmodified model: without temperature and so on.
 * @param {Float32Array} logits
 * @param {number} id the token
 * @param {number} count number of others
 * @returns {{probability: number, alternatives: [number, number][]}} alternatives: id and probability
 */
export function probabilities(logits, id, count) {
  const top = logits[largest(logits)];
  let total = 0;
  for (let other = 0; other < logits.length; other++) total += Math.exp(logits[other] - top);
  const probability = (of) => Math.exp(logits[of] - top) / total;
  const best = []; // the likeliest first, equal ones by id
  for (let other = 0; other < logits.length; other++) {
    if (other === id || (best.length === count && logits[other] <= logits[best[count - 1]])) continue;
    let place = best.length;
    while (place > 0 && logits[other] > logits[best[place - 1]]) place--;
    best.splice(place, 0, other);
    best.length = Math.min(best.length, count);
  }
  return {probability: probability(id), alternatives: best.map((other) => [other, probability(other)])};
}
