/** The choice of the model's variant, its download size, and the progress of loading. */

import { announce, button, byId, grouped, make, megabytes, outward, rest } from "./dom.js";
import { Store, getJSON } from "./download.js";
import { memoryNeeded } from "./engine.js";
import { clearFault, notify } from "./notices.js";

const POSITIONS = 2_048; // tokens of context, if the model supports them and the visitor chooses no other number
const FEWEST = 512;
const STEPS = { memory: "Asking the browser for memory…", start: "Preparing the model…" };
const OTHER_TAB =
  "Another tab has this page open. Each needs memory of its own for the model; nothing is downloaded twice.";

export const base = new URL(".", location.href);

export class Loader {
  state = "idle"; // idle, loading, ready
  variant; // of about.models
  weights = null; // its weights.json
  facts = null; // the worker's information about the loaded model
  #about;
  #runner;
  #hooks;
  #began = 0;
  #keeps = true; // whether the browser allows this page to store anything
  #alone; // promises whether the page is open in no other tab

  /**
   * @param {object} about page.json
   * @param {import("./runner.js").Runner} runner
   * @param {{changed: () => void, described: () => void, fault: (fault: object) => void}} hooks
   */
  constructor(about, runner, hooks) {
    this.#about = about;
    this.#runner = runner;
    this.#hooks = hooks;
    this.variant = about.models[0];
    for (const positions of choices(about.context)) {
      byId("positions").append(make("option", { value: String(positions) }, `${grouped(positions)} tokens`));
    }
    byId("positions").value = String(Math.min(POSITIONS, about.context));
    byId("variants").hidden = about.models.length < 2;
    for (const model of about.models) byId("variants").append(this.#radio(model));
    byId("load").onclick = () => this.load();
    byId("cancel").onclick = () => this.unload();
    byId("positions").onchange = () => this.weights && this.#describe();
    byId("forget").onclick = () => this.#forget();
  }

  #radio(model) {
    const radio = make("input", { type: "radio", name: "variant", value: model.scheme });
    radio.checked = model === this.variant;
    radio.onchange = () => {
      clearFault();
      this.choose(model);
    };
    return make("label", {}, radio, make("span", {}, model.scheme), make("span", { className: "hint" }, megabytes(model.bytes)));
  }

  /** The initial state: a server's model is ready; another one loads automatically if it is stored. */
  begin() {
    this.#alone = isAlone();
    this.#runner.begin();
    return this.#about.server ? this.load() : this.choose();
  }

  /** Select the variant and the context that a link names, if they exist. */
  prefer(scheme, context) {
    const wanted = String(context);
    if ([...byId("positions").options].some((option) => option.value === wanted)) byId("positions").value = wanted;
    this.variant = this.#about.models.find((model) => model.scheme === scheme) ?? this.variant;
  }

  /** Show and hide elements according to the state. */
  render() {
    const ready = this.state === "ready";
    const loading = this.state === "loading";
    const focused = document.activeElement;
    byId("loader").hidden = ready || this.#about.server;
    byId("load").disabled = this.weights === null;
    byId("load").hidden = loading;
    for (const id of ["cancel", "progress"]) byId(id).hidden = !loading;
    byId("variants").disabled = byId("positions").disabled = loading;
    byId("change").hidden = !ready;
    if (focused === byId("load") && loading) byId("cancel").focus();
    else if (focused === byId("cancel") && ready) rest();
  }

  #become(state) {
    this.state = state;
    this.#hooks.changed();
  }

  #folder() {
    return new URL(`${this.variant.folder}/`, base);
  }

  positions() {
    return Number(byId("positions").value);
  }

  /** Select a variant; if all its parts are stored, it loads automatically. */
  async choose(variant = this.variant, byItself = true) {
    this.variant = variant;
    this.weights = null;
    this.#hooks.changed();
    for (const radio of byId("variants").querySelectorAll("input")) radio.checked = radio.value === variant.scheme;
    try {
      const weights = await getJSON(new URL("weights.json", this.#folder()), "smolctl-weights");
      if (variant !== this.variant) return;
      this.weights = weights;
    } catch (fault) {
      this.#hooks.fault(fault);
      return;
    }
    const held = await this.#describe();
    if (variant !== this.variant) return;
    this.#hooks.described();
    if (byItself && this.state === "idle" && held === this.weights.bytes) {
      if (await this.#alone) this.load();
      else notify("tabs", OTHER_TAB);
    }
  }

  /** Show the download size. @returns {Promise<number>} bytes that this browser has already stored */
  async #describe() {
    const weights = this.weights;
    const store = await Store.open(this.#folder());
    this.#keeps = store.keeps;
    const total = weights.bytes;
    const held = await store.held(weights.parts);
    byId("forget").hidden = held === 0;
    const kept = store.keeps
      ? "kept in this browser for the next visit."
      : "at every visit: this browser keeps nothing for this address.";
    byId("cost").textContent =
      held === total
        ? `${megabytes(total)}, in this browser already.`
        : held
          ? `${megabytes(total - held)} of ${megabytes(total)} to download; the rest is in this browser already.`
          : `${megabytes(total)} to download, ${kept}`;
    byId("memory-text").textContent = `needs about ${megabytes(memoryNeeded(weights, this.positions()))} of memory.`;
    return held;
  }

  load() {
    clearFault();
    this.#began = performance.now();
    byId("progress").value = 0;
    this.#become("loading");
    announce("Loading the model");
    const threads = this.weights && remembered(this.#threadsKey());
    this.#runner.load({
      base: base.href,
      folder: this.variant.folder,
      about: this.#about,
      weights: this.weights,
      positions: this.positions(),
      threads,
    });
  }

  /** Retry the failed step. */
  retry() {
    clearFault();
    if (this.weights || this.#about.server) this.load();
    else this.choose();
  }

  /** Stop loading, or unload the model, and offer to load one. */
  unload() {
    this.#runner.begin();
    this.#become("idle");
    this.choose(this.variant, false);
  }

  /** The worker ended, and the model with it. */
  fail() {
    this.#runner.end();
    this.#become("idle");
    if (this.weights) this.#describe();
  }

  async #forget() {
    await (await Store.open(this.#folder())).clear();
    byId("forget").hidden = true;
    announce("Removed from this browser");
    if (this.state === "idle") this.choose(this.variant, false);
  }

  #threadsKey() {
    return `smolctl-threads ${this.weights.sha256.slice(0, 12)} ${navigator.hardwareConcurrency}`;
  }

  // --- messages of the worker ---

  step(step) {
    if (step !== "download") byId("cost").textContent = STEPS[step];
  }

  progress({ done, total, fetched }) {
    const rate = fetched / (performance.now() - this.#began);
    const left = rate > 0 ? (total - done) / rate / 1_000 : 0;
    const wait = left >= 2 && performance.now() - this.#began > 2_000 ? `, ${duration(left)} left` : "";
    byId("progress").value = done / total;
    byId("cost").textContent = `${megabytes(done)} of ${megabytes(total)}${wait}`;
  }

  ready(facts) {
    this.facts = facts;
    if (facts.speeds) remember(this.#threadsKey(), facts.threads);
    this.#become("ready");
    announce("The model is ready");
    if (this.#about.server) return;
    const details = [
      ["Variant", `${this.variant.scheme}, ${megabytes(this.variant.bytes)}`],
      ["Context", `${grouped(facts.capacity)} tokens`],
      ["Memory", megabytes(facts.memory)],
      ["Loaded in", `${((performance.now() - this.#began) / 1_000).toFixed(1)} s`],
      ["Threads", threadsText(facts)],
    ];
    if (!isSecureContext) {
      details.push(["Address", "without https: the browser lets the page neither check the weights nor keep them"]);
    }
    if (!crossOriginIsolated && window !== top) {
      details.push(["Faster", outward("open the page by itself", location.href)]);
    }
    byId("details").replaceChildren(...details.flatMap(([label, value]) => [make("dt", {}, label), make("dd", {}, value)]));
    byId("forget").hidden = !facts.kept;
    if (!facts.kept && this.#keeps) this.#full();
  }

  async #full() {
    const { quota = 0 } = (await navigator.storage?.estimate?.().catch(() => ({}))) ?? {};
    const room = quota ? ` (it allows this address ${megabytes(quota)})` : "";
    notify("room", `This browser has no room to keep the model${room}: it works now, and the next visit downloads it again.`);
  }

  /** Options that need less memory. @returns {HTMLElement[]} */
  smaller() {
    const fewer = choices(this.#about.context).filter((count) => count < this.positions() && count <= 1_024);
    const shorter = fewer.reverse().map((positions, index) => {
      const needed = megabytes(memoryNeeded(this.weights, positions));
      const take = () => {
        byId("positions").value = String(positions);
        this.load();
      };
      return button(`Use ${grouped(positions)} tokens of context (${needed})`, take, index ? "" : "primary");
    });
    const lighter = this.#about.models
      .filter((model) => model.bytes < this.variant.bytes)
      .map((model) => {
        const take = async () => {
          await this.choose(model, false);
          if (this.weights) this.load();
        };
        return button(`Use ${model.scheme} (${megabytes(model.bytes)})`, take, "");
      });
    return [...shorter, ...lighter];
  }
}

/** Whether the page is open in no other tab: the lock is held as long as the page is open. */
function isAlone() {
  if (!navigator.locks) return true;
  return new Promise((resolve) => {
    navigator.locks.request(`smolctl ${base.pathname}`, { ifAvailable: true }, (lock) => {
      resolve(lock !== null);
      return lock && new Promise(() => {});
    });
  });
}

/** The selectable context lengths. */
function choices(context) {
  const counts = [];
  for (let count = FEWEST; count < context; count *= 2) counts.push(count);
  return [...counts, context];
}

function threadsText({ threads, speeds }) {
  if (!crossOriginIsolated) return "1: only a page that is isolated from others may use more";
  if (!speeds) return `${threads}`;
  const measured = speeds.map(([count, rate]) => `${count}: ${Math.round(rate)}`).join(", ");
  return `${threads}, by a measurement here (tokens/s with ${measured})`;
}

const duration = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`);

/** The number that an earlier visit stored under a name; 0: none. */
function remembered(name) {
  try {
    return Number(localStorage.getItem(name)) || 0;
  } catch {
    return 0; // the visitor forbids storage
  }
}

function remember(name, number) {
  try {
    localStorage.setItem(name, String(number));
  } catch {
    // It is measured again at the next visit.
  }
}
