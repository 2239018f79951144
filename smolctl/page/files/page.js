/** What a visitor sees and does before and around the conversation. */

import { announce, button, byId, grouped, make, megabytes, rest } from "./dom.js";
import { Fault, Store, getJSON } from "./download.js";
import { memoryNeeded } from "./engine.js";
import { readLink, writeLink } from "./link.js";
import { Runner, checkBrowser } from "./runner.js";
import { Settings } from "./settings.js";
import { Talk, sends } from "./talk.js";

const POSITIONS = 2_048; // tokens of context, where the model has as many and the visitor takes no others
const FEWEST = 512;
const TALLEST = 200; // pixels of the field for a message
const WIDE = matchMedia("(min-width: 1080px)"); // as in style.css: the panel stands beside the conversation

const base = new URL(".", location.href);

class Page {
  #about;
  #settings;
  #talk;
  #runner;
  #link = null;
  #state = "idle"; // idle, loading, ready
  #variant; // of about.models
  #weights = null; // its weights.json
  #facts = null; // what the worker said of the loaded model
  #began = 0;
  #keeps = true; // whether the browser lets this address keep anything
  #alone; // promises whether no other tab has this page

  constructor(about) {
    this.#about = about;
    this.#settings = new Settings({ ...about.sampling }, about.context);
    this.#variant = about.models[0];
    this.#runner = new Runner((message) => this.#hear(message), (fault) => this.#fault(fault));
    this.#talk = new Talk(about.chat !== null, {
      request: () => {
        this.#clearFault();
        const system = byId("system-row").hidden ? "" : byId("system").value.trim();
        return { ...this.#settings.get(), system };
      },
      send: (request) => this.#runner.generate(request),
      stop: (number) => this.#runner.stop(number),
      link: (turn, before) => this.#address(turn, before),
      changed: () => this.#render(),
    });
  }

  async begin() {
    this.#write();
    this.#listen();
    this.#render();
    const { server } = this.#about;
    try {
      if (!server) checkBrowser();
      this.#link = readLink(location.hash);
    } catch (fault) {
      this.#fault(fault);
      if (fault.kind === "browser") return;
    }
    if (this.#link) this.#follow(this.#link);
    this.#alone = isAlone();
    this.#runner.begin();
    if (server) this.#load();
    else await this.#choose();
  }

  // --- what stands on the page ---

  #write() {
    const { title, summary, facts, links, examples, models, chat, context, server } = this.#about;
    for (const id of ["privacy", "here"]) byId(id).hidden = server;
    document.title = title;
    document.body.classList.toggle("completion", !chat);
    byId("title").textContent = title;
    byId("headline").textContent = chat ? `Talk to ${title}` : `Write with ${title}`;
    byId("summary").textContent = summary;
    const words = chat
      ? ["Your message", "Ask something", "Send", "Enter sends, Shift+Enter starts a new line"]
      : ["Text to continue", "Begin a text", "Continue", "Enter continues the text, Shift+Enter starts a new line"];
    [byId("text-label").textContent, byId("text").placeholder, byId("send").textContent, byId("hint").textContent] = words;
    byId("new").textContent = chat ? "New chat" : "Clear";
    byId("system-row").hidden = !chat?.takes_system;
    byId("system").placeholder = chat?.system || "none";
    for (const [label, value] of facts) byId("facts").append(make("dt", {}, label), make("dd", {}, value));
    for (const { scheme, verdict } of models) if (verdict) byId("verdicts").append(make("li", {}, verdict));
    for (const [label, address] of links) byId("links").append(make("li", {}, outward(label, address)));
    byId("examples").hidden = examples.length === 0;
    for (const text of examples) byId("example-list").append(button(text, () => this.#take(text), "example"));
    for (const positions of choices(context)) {
      byId("positions").append(make("option", { value: String(positions) }, `${grouped(positions)} tokens`));
    }
    byId("positions").value = String(Math.min(POSITIONS, context));
    byId("variants").hidden = models.length < 2;
    for (const model of models) byId("variants").append(this.#radio(model));
  }

  #radio(model) {
    const radio = make("input", { type: "radio", name: "variant", value: model.scheme });
    radio.checked = model === this.#variant;
    radio.onchange = () => {
      this.#clearFault();
      this.#choose(model);
    };
    return make("label", {}, radio, make("span", {}, model.scheme), make("span", { className: "hint" }, megabytes(model.bytes)));
  }

  #listen() {
    byId("load").onclick = () => this.#load();
    byId("cancel").onclick = () => {
      this.#runner.begin();
      this.#become("idle");
      this.#choose(this.#variant, false);
    };
    byId("positions").onchange = () => this.#weights && this.#describe();
    byId("change").onclick = () => {
      this.#talk.stop();
      this.#talk.fail();
      this.#runner.begin();
      this.#become("idle");
      this.#choose(this.#variant, false);
      byId("load").focus();
      this.#panel(false);
    };
    byId("forget").onclick = async () => {
      await (await Store.open(this.#folder())).clear();
      byId("forget").hidden = true;
      announce("Removed from this browser");
      if (this.#state === "idle") this.#choose(this.#variant, false);
    };
    byId("new").onclick = () => {
      this.#talk.clear();
      rest();
    };
    byId("reset").onclick = () => {
      this.#settings.reset();
      byId("system").value = "";
      announce("Settings are reset to the model's own");
    };
    byId("stop").onclick = () => this.#talk.stop();
    byId("open-panel").onclick = () => this.#panel(true);
    byId("close-panel").onclick = () => this.#panel(false);
    WIDE.onchange = () => this.#panel(false);
    byId("composer").onsubmit = (event) => {
      event.preventDefault();
      this.#ask();
    };
    const text = byId("text");
    text.oninput = () => this.#fitText();
    text.onkeydown = (event) => {
      if (event.key === "Escape") this.#talk.stop();
      if (!sends(event)) return;
      event.preventDefault();
      this.#ask();
    };
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && byId("panel").classList.contains("open")) this.#panel(false);
    });
    // A keyboard on the screen covers the page on iOS instead of making it lower.
    visualViewport?.addEventListener("resize", () => {
      if (visualViewport.scale !== 1) return;
      document.documentElement.style.setProperty("--height", `${visualViewport.height}px`);
    });
    addEventListener("hashchange", () => location.reload());
  }

  /** Show and hide what the state decides. */
  #render() {
    const { turns, busy } = this.#talk;
    const ready = this.#state === "ready";
    for (const id of ["headline", "summary", "examples"]) byId(id).hidden = turns.length > 0;
    if (!this.#about.examples.length) byId("examples").hidden = true;
    byId("welcome").classList.toggle("small", turns.length > 0);
    byId("new").hidden = turns.length === 0;
    byId("loader").hidden = ready || this.#about.server;
    byId("load").disabled = this.#weights === null;
    const loading = this.#state === "loading";
    const focused = document.activeElement;
    byId("load").hidden = loading;
    for (const id of ["cancel", "progress"]) byId(id).hidden = !loading;
    byId("variants").disabled = byId("positions").disabled = loading;
    byId("send").disabled = !ready;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    byId("change").hidden = !ready;
    if (focused === byId("send") && busy) byId("stop").focus();
    else if (focused === byId("stop") && !busy) rest();
    else if (focused === byId("load") && loading) byId("cancel").focus();
    else if (focused === byId("cancel") && ready) rest();
    document.body.classList.toggle("busy", busy);
    this.#fitText();
  }

  #become(state) {
    this.#state = state;
    this.#render();
  }

  #panel(open) {
    byId("panel").classList.toggle("open", open);
    byId("open-panel").setAttribute("aria-expanded", String(open));
    for (const part of document.querySelectorAll("header, main")) part.inert = open;
    if (open) byId("close-panel").focus();
    else if (byId("panel").contains(document.activeElement) && !WIDE.matches) byId("open-panel").focus();
  }

  #fitText() {
    const text = byId("text");
    text.style.height = "auto";
    text.style.height = `${Math.min(text.scrollHeight, TALLEST)}px`;
  }

  // --- loading ---

  #folder() {
    return new URL(`${this.#variant.folder}/`, base);
  }

  /** Take a variant; one whose parts are all here loads by itself. */
  async #choose(variant = this.#variant, byItself = true) {
    this.#variant = variant;
    this.#weights = null;
    this.#render();
    for (const radio of byId("variants").querySelectorAll("input")) radio.checked = radio.value === variant.scheme;
    try {
      const weights = await getJSON(new URL("weights.json", this.#folder()), "smolctl-weights");
      if (variant !== this.#variant) return;
      this.#weights = weights;
    } catch (fault) {
      this.#fault(fault);
      return;
    }
    const held = await this.#describe();
    if (variant !== this.#variant) return;
    this.#render();
    if (this.#link) this.#promise();
    if (byItself && this.#state === "idle" && held === this.#weights.bytes) {
      if (await this.#alone) this.#load();
      else this.#notice("tabs", OTHER_TAB);
    }
  }

  /** Say what loading costs. @returns {Promise<number>} bytes that this browser keeps already */
  async #describe() {
    const weights = this.#weights;
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
    byId("memory-text").textContent = `needs about ${megabytes(memoryNeeded(weights, this.#positions()))} of memory.`;
    return held;
  }

  #positions() {
    return Number(byId("positions").value);
  }

  #load() {
    this.#clearFault();
    this.#began = performance.now();
    byId("progress").value = 0;
    this.#become("loading");
    announce("Loading the model");
    const threads = this.#weights && remembered(this.#threadsKey());
    this.#runner.load({
      base: base.href,
      folder: this.#variant.folder,
      about: this.#about,
      weights: this.#weights,
      positions: this.#positions(),
      threads,
    });
  }

  #threadsKey() {
    return `smolctl-threads ${this.#weights.sha256.slice(0, 12)} ${navigator.hardwareConcurrency}`;
  }

  #hear({ number, step, progress, ready, reading, token, done }) {
    if (step && step !== "download") byId("cost").textContent = STEPS[step];
    if (progress) this.#progress(progress);
    if (ready) this.#ready(ready);
    if (!this.#talk.awaits(number)) return;
    if (reading) this.#talk.reading(reading);
    if (token) this.#context(this.#talk.token(token));
    if (done) {
      this.#context(done.used);
      this.#talk.done(done);
    }
  }

  #progress({ done, total, fetched }) {
    const rate = fetched / (performance.now() - this.#began);
    const left = rate > 0 ? (total - done) / rate / 1_000 : 0;
    const wait = left >= 2 && performance.now() - this.#began > 2_000 ? `, ${duration(left)} left` : "";
    byId("progress").value = done / total;
    byId("cost").textContent = `${megabytes(done)} of ${megabytes(total)}${wait}`;
  }

  #ready(facts) {
    this.#facts = facts;
    if (facts.speeds) remember(this.#threadsKey(), facts.threads);
    this.#become("ready");
    this.#context(0);
    announce("The model is ready");
    if (this.#about.server) return;
    const details = [
      ["Variant", `${this.#variant.scheme}, ${megabytes(this.#variant.bytes)}`],
      ["Context", `${grouped(facts.capacity)} tokens`],
      ["Memory", megabytes(facts.memory)],
      ["Loaded in", `${((performance.now() - this.#began) / 1_000).toFixed(1)} s`],
      ["Threads", threadsText(facts)],
    ];
    if (!isSecureContext) {
      details.push(["Address", "without https: the browser lets the page neither check the weights nor keep them"]);
    }
    byId("details").replaceChildren(...details.flatMap(([label, value]) => [make("dt", {}, label), make("dd", {}, value)]));
    if (!crossOriginIsolated && window !== top) {
      byId("details").append(make("dt", {}, "Faster"), make("dd", {}, outward("open the page by itself", location.href)));
    }
    byId("forget").hidden = !facts.kept;
    if (!facts.kept && this.#keeps) this.#full();
  }

  async #full() {
    const { quota = 0 } = (await navigator.storage?.estimate?.().catch(() => ({}))) ?? {};
    const room = quota ? ` (it allows this address ${megabytes(quota)})` : "";
    this.#notice("room", `This browser has no room to keep the model${room}: it works now, and the next visit downloads it again.`);
  }

  // --- asking ---

  #ask() {
    const text = byId("text");
    if (this.#state !== "ready" || this.#talk.busy || !text.value.trim()) return;
    const question = text.value;
    text.value = "";
    for (const notice of document.querySelectorAll(".notice")) notice.remove();
    this.#talk.ask(question);
  }

  #take(example) {
    byId("text").value = example;
    if (this.#state === "ready") this.#ask();
    this.#fitText();
    rest();
  }

  #context(used) {
    const { capacity } = this.#facts;
    byId("context").textContent = used ? `${grouped(used)} of ${grouped(capacity)} tokens of context` : "";
    byId("context").classList.toggle("full", used > 0.9 * capacity);
  }

  // --- links ---

  #address({ how, question }, before) {
    const { sampling, max_tokens, seed, system } = how;
    const linked = {
      prompt: question,
      turns: before.map((turn) => [turn.question, turn.answer]),
      system: this.#about.chat ? system : "",
      scheme: this.#variant.scheme,
      weights: this.#weights?.sha256.slice(0, 12) ?? "",
      settings: { ...sampling, max_tokens, seed, context: this.#facts.capacity },
    };
    return `${location.href.split("#")[0]}#${writeLink(linked)}`;
  }

  /** Fill the page with what a link holds. */
  #follow({ prompt, turns, system, scheme, settings }) {
    this.#settings.set(settings);
    byId("system").value = system;
    byId("text").value = prompt;
    const wanted = String(settings.context);
    if ([...byId("positions").options].some((option) => option.value === wanted)) byId("positions").value = wanted;
    this.#variant = this.#about.models.find((model) => model.scheme === scheme) ?? this.#variant;
    for (const [question, answer] of this.#about.chat ? turns : []) this.#talk.restore(question, answer);
  }

  #promise() {
    const { weights, settings } = this.#link;
    const same = this.#weights.sha256.startsWith(weights || "-") && this.#positions() === settings.context;
    const what = this.#about.chat ? "answer" : "continuation";
    this.#notice(
      "link",
      same
        ? `This link holds a text, its settings and seed ${settings.seed}: the model writes the same ${what} again.`
        : `This link holds a text and its settings, but was made with another model or context: the ${what} may differ.`,
    );
  }

  // --- notices and faults ---

  /** @param {string} name of its kind; a new one takes its place @param {string} text */
  #notice(name, text) {
    const id = `notice-${name}`;
    byId(id)?.remove();
    const notice = make("div", { id, className: "notice" }, make("p", {}, text), button("Dismiss", () => {
      notice.remove();
      rest();
    }));
    byId("notices").append(notice);
  }

  #clearFault() {
    byId("fault").replaceChildren();
  }

  #fault(fault) {
    const { kind, number } = fault;
    const sentence = fault.sentence ?? fault.message;
    const ends = number === undefined || kind === "engine"; // whether the model is gone with it
    this.#talk.fail();
    if (ends && kind !== "link") {
      this.#runner.end();
      this.#become("idle");
      if (this.#weights) this.#describe();
    }
    byId("fault").replaceChildren(make("p", {}, sentence), make("div", { className: "actions" }, ...this.#waysOn(kind)));
  }

  /** What a visitor can do about a kind of fault. @returns {HTMLElement[]} */
  #waysOn(kind) {
    const again = () => {
      this.#clearFault();
      if (this.#weights || this.#about.server) this.#load();
      else this.#choose();
    };
    if (kind === "browser" || kind === "worker") return [];
    if (["link", "long", "prompt"].includes(kind)) return [button("Dismiss", () => this.#clearFault())];
    if (kind === "version" || kind === "format") return [button("Reload the page", () => location.reload(), "primary")];
    if (kind === "engine") return [button("Load the model again", again, "primary")];
    if (kind === "memory") return [...this.#smaller(), button("Try again", again)];
    return [button("Try again", again, "primary")];
  }

  /** Ways to need less memory. */
  #smaller() {
    const fewer = choices(this.#about.context).filter((count) => count < this.#positions() && count <= 1_024);
    const shorter = fewer.reverse().map((positions, index) => {
      const needed = megabytes(memoryNeeded(this.#weights, positions));
      const take = () => {
        byId("positions").value = String(positions);
        this.#load();
      };
      return button(`Use ${grouped(positions)} tokens of context (${needed})`, take, index ? "" : "primary");
    });
    const lighter = this.#about.models
      .filter((model) => model.bytes < this.#variant.bytes)
      .map((model) => {
        const take = async () => {
          await this.#choose(model, false);
          if (this.#weights) this.#load();
        };
        return button(`Use ${model.scheme} (${megabytes(model.bytes)})`, take, "");
      });
    return [...shorter, ...lighter];
  }
}

const OTHER_TAB =
  "Another tab has this page open. Each needs memory of its own for the model; nothing is downloaded twice.";
const STEPS = { memory: "Asking the browser for memory…", start: "Preparing the model…" };

/** Whether no other tab has this page: the lock is held as long as the page is open. */
function isAlone() {
  if (!navigator.locks) return true;
  return new Promise((resolve) => {
    navigator.locks.request(`smolctl ${base.pathname}`, { ifAvailable: true }, (lock) => {
      resolve(lock !== null);
      return lock && new Promise(() => {});
    });
  });
}

/** Numbers of tokens that a context can have here. */
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

const outward = (label, address) =>
  /^https?:/.test(address)
    ? make("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, label)
    : make("span", {}, label);

/** The number that an earlier visit has kept under a name; 0: none. */
function remembered(name) {
  try {
    return Number(localStorage.getItem(name)) || 0;
  } catch {
    return 0; // the visitor allows no storage
  }
}

function remember(name, number) {
  try {
    localStorage.setItem(name, String(number));
  } catch {
    // It is measured again at the next visit.
  }
}

byId("boot").hidden = true;
byId("app").hidden = false;
try {
  await new Page(await getJSON(new URL("page.json", base), "smolctl-page")).begin();
} catch (fault) {
  byId("fault").replaceChildren(
    make("p", {}, fault.message),
    make("div", { className: "actions" }, button("Reload the page", () => location.reload(), "primary")),
  );
}
