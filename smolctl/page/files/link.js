/** An answer as a link: everything that determines its text, in the fragment, which is not sent to servers. */

import { Fault } from "./download.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "context"];

/**
 * @typedef {object} Linked
 * @property {string} prompt to be answered or continued
 * @property {[string, string][]} turns questions and answers before it
 * @property {string} system
 * @property {string} scheme of the model's variant
 * @property {string} weights start of their SHA-256
 * @property {Record<string, number>} settings under the names in NUMBERS
 */

/** @param {Linked} linked @returns {string} a fragment without its # */
export function writeLink({ prompt, turns, system, scheme, weights, settings }) {
  const fields = new URLSearchParams({ prompt });
  for (const name of NUMBERS) fields.set(name, String(settings[name]));
  if (system) fields.set("system", system);
  if (turns.length) fields.set("turns", JSON.stringify(turns));
  fields.set("model", scheme);
  fields.set("weights", weights);
  return fields.toString();
}

/**
 * @param {string} fragment
 * @returns {Linked | null} null: there is no fragment
 * @throws {Fault} it is damaged
 */
export function readLink(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  const prompt = fields.get("prompt");
  if (prompt === null) return null;
  const settings = Object.fromEntries(NUMBERS.map((name) => [name, Number(fields.get(name) || NaN)]));
  const turns = pairs(fields.get("turns"));
  if (!turns || Object.values(settings).some((value) => !Number.isFinite(value))) {
    throw new Fault("link", "The address of this page holds a link to an answer, but part of it is missing.");
  }
  const [system, scheme, weights] = ["system", "model", "weights"].map((name) => fields.get(name) ?? "");
  return { prompt, turns, system, scheme, weights, settings };
}

function pairs(text) {
  if (text === null) return [];
  try {
    const value = JSON.parse(text);
    const isPair = (pair) => Array.isArray(pair) && pair.length === 2 && pair.every((one) => typeof one === "string");
    return Array.isArray(value) && value.every(isPair) ? value : null;
  } catch {
    return null;
  }
}
