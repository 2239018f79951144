/** The controls for sampling, which start with the model's own values. */

import { byId, make } from "./dom.js";

// Names as in page.json and in the worker. Limits: minimum, maximum (null: the
// model's context) and step. Few visitors need the controls in `more`.
const CONTROLS = {
  temperature: {
    label: "Temperature",
    limits: [0, 2, 0.05],
    hint: "0 always takes the likeliest token; higher values make the text more varied.",
    slider: true,
  },
  top_p: {
    label: "Top-p",
    limits: [0.01, 1, 0.01],
    hint: "Keeps the likeliest tokens up to this total probability.",
    slider: true,
  },
  max_tokens: {
    label: "Longest answer",
    limits: [1, null, 1],
    hint: "Maximum number of tokens in an answer.",
  },
  seed: {
    label: "Seed",
    limits: [0, Number.MAX_SAFE_INTEGER, 1],
    hint: "The same seed gives the same text. Empty: a new one for every answer.",
  },
  top_k: {
    label: "Top-k",
    limits: [0, 1_000, 1],
    hint: "Keeps this many of the likeliest tokens; 0 keeps all.",
    more: true,
  },
  min_p: {
    label: "Min-p",
    limits: [0, 1, 0.01],
    hint: "Drops tokens below this fraction of the likeliest one's probability.",
    slider: true,
    more: true,
  },
  repetition_penalty: {
    label: "Repetition penalty",
    limits: [0.5, 2, 0.01],
    hint: "Above 1, repeated tokens become less likely.",
    slider: true,
    more: true,
  },
};

export class Settings {
  #own;
  #context;
  #sliders = {};

  /** @param {Record<string, number>} own the model's values @param {number} context its positions */
  constructor(own, context) {
    this.#own = own;
    this.#context = context;
    for (const name of Object.keys(CONTROLS)) this.#draw(name);
    this.reset();
  }

  reset() {
    for (const name of Object.keys(CONTROLS)) this.#put(name, this.#own[name]);
  }

  /** @param {Record<string, number>} values */
  set(values) {
    for (const name of Object.keys(CONTROLS)) if (name in values) this.#put(name, values[name]);
  }

  /** @returns {{sampling: Record<string, number>, max_tokens: number, seed: number | null}} seed null: a random one */
  get() {
    const values = Object.fromEntries(Object.keys(CONTROLS).map((name) => [name, Number(byId(name).value)]));
    const { max_tokens, seed, ...sampling } = values;
    return { sampling, max_tokens, seed: byId("seed").value === "" ? null : seed };
  }

  #draw(name) {
    const { label, limits, hint, slider, more } = CONTROLS[name];
    const [min, most, step] = limits;
    const range = { min, max: most ?? this.#context, step };
    const about = `${name}-hint`;
    const input = make("input", { type: "number", id: name, "aria-describedby": about, ...range });
    input.inputMode = Number.isInteger(step) ? "numeric" : "decimal";
    input.placeholder = name === "seed" ? "random" : "";
    input.onchange = () => this.#put(name, input.value === "" ? undefined : Number(input.value));
    const row = make("div", { className: "control" }, make("label", { for: name }, label), input);
    if (slider) {
      // Only for the mouse: the number field above it has the same label and function.
      const bar = make("input", { type: "range", tabIndex: -1, "aria-hidden": "true", ...range });
      bar.oninput = () => (input.value = bar.value);
      input.oninput = () => (bar.value = input.value);
      this.#sliders[name] = bar;
      row.append(bar);
    }
    row.append(make("p", { id: about, className: "hint" }, hint));
    byId(more ? "more" : "controls").append(row);
  }

  /** Show a value within its limits; the model's own if it is not a number. */
  #put(name, value) {
    const [least, most, step] = CONTROLS[name].limits;
    const taken = Number.isFinite(value) ? value : this.#own[name];
    const within = Math.min(Math.max(taken, least), most ?? this.#context);
    const input = byId(name);
    input.value = taken === undefined ? "" : String(Number.isInteger(step) ? Math.round(within) : within);
    if (this.#sliders[name]) this.#sliders[name].value = input.value;
  }
}
