/** The controls for how tokens are chosen, with the model's own values as what they start from. */

import { byId, make } from "./dom.js";

const CONTROLS = [
  ["temperature", "Temperature", 0, 2, 0.05, "0 always takes the likeliest token; higher values surprise more."],
  ["top_p", "Top-p", 0.01, 1, 0.01, "Keeps the likeliest tokens that have this probability together."],
  ["max_tokens", "Longest answer, in tokens", 1, null, 1, "The answer ends here if the model does not end it."],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 1, "The same seed gives the same text. Empty: a new one for every answer."],
  ["top_k", "Top-k", 0, 1_000, 1, "Keeps this many of the likeliest tokens; 0 keeps all."],
  ["min_p", "Min-p", 0, 1, 0.01, "Keeps tokens at least this share as likely as the likeliest one."],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.01, "Above 1, tokens that are already there become less likely."],
];
const MORE = new Set(["top_k", "min_p", "repetition_penalty"]); // of which few visitors need to know
const SLIDERS = new Set(["temperature", "top_p", "min_p", "repetition_penalty"]);

export class Settings {
  #inputs = new Map();
  #own;

  /** @param {Record<string, number>} own the model's values @param {number} context its positions */
  constructor(own, context) {
    this.#own = own;
    for (const [name, label, least, most, step, hint] of CONTROLS) {
      const limits = { min: least, max: most ?? context, step };
      const input = make("input", { type: "number", id: name, inputMode: "decimal", ...limits });
      input.setAttribute("aria-describedby", `${name}-hint`);
      input.step = "any"; // the arrows of the keyboard follow the slider's step below
      if (Number.isInteger(step)) Object.assign(input, { step: 1, inputMode: "numeric" });
      const slider = SLIDERS.has(name) ? make("input", { type: "range", ...limits, tabIndex: -1 }) : null;
      const show = () => slider && (slider.value = input.value);
      input.onchange = () => {
        this.#put(name, input.value === "" ? undefined : Number(input.value));
      };
      input.oninput = show;
      if (slider) {
        slider.setAttribute("aria-hidden", "true"); // the number beside it says and does the same
        slider.oninput = () => (input.value = slider.value);
      } else if (name === "seed") input.placeholder = "random";
      this.#inputs.set(name, { input, show, least, most: most ?? context });
      const row = make("div", { className: "control" }, make("label", { for: name }, label), input);
      if (slider) row.append(slider);
      row.append(make("p", { id: `${name}-hint`, className: "hint" }, hint));
      byId(MORE.has(name) ? "more" : "controls").append(row);
    }
    this.reset();
  }

  reset() {
    for (const name of this.#inputs.keys()) this.#put(name, this.#own[name]);
  }

  /** @param {Record<string, number>} values */
  set(values) {
    for (const name of this.#inputs.keys()) if (name in values) this.#put(name, values[name]);
  }

  /** @returns {{sampling: Record<string, number>, max_tokens: number, seed: number | null}} seed null: a new one */
  get() {
    const value = (name) => this.#inputs.get(name).input.value;
    const sampling = {};
    for (const name of ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]) {
      sampling[name] = Number(value(name));
    }
    const seed = value("seed");
    return { sampling, max_tokens: Number(value("max_tokens")), seed: seed === "" ? null : Number(seed) };
  }

  /** Show a value within its limits; the model's own where it is no number. */
  #put(name, value) {
    const { input, show, least, most } = this.#inputs.get(name);
    const taken = Number.isFinite(value) ? value : this.#own[name];
    const whole = input.step === "1" ? Math.round(taken) : taken;
    input.value = taken === undefined ? "" : String(Math.min(Math.max(whole, least), most));
    show();
  }
}
