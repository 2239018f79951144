/** The page around the conversation. */

import { announce, button, byId, grouped, make, outward, rest } from "./dom.js";
import { getJSON } from "./download.js";
import { readLink, writeLink } from "./link.js";
import { Loader, base } from "./loader.js";
import { clearFault, clearNotices, notify, reload, showFault } from "./notices.js";
import { Runner, checkBrowser } from "./runner.js";
import { Settings } from "./settings.js";
import { Talk, sends } from "./talk.js";

const TALLEST = 200; // pixels of the input field
const WIDE = matchMedia("(min-width: 1080px)"); // as in panel.css: the panel is next to the conversation

class Page {
  #about;
  #settings;
  #talk;
  #runner;
  #loader;
  #link = null;

  constructor(about) {
    this.#about = about;
    this.#settings = new Settings({ ...about.sampling }, about.context);
    this.#runner = new Runner((message) => this.#hear(message), (fault) => this.#fault(fault));
    this.#talk = new Talk(about.chat !== null, {
      request: () => {
        clearFault();
        const system = byId("system-row").hidden ? "" : byId("system").value.trim();
        return { ...this.#settings.get(), system };
      },
      send: (request) => this.#runner.generate(request),
      stop: (number) => this.#runner.stop(number),
      link: (turn, before) => this.#address(turn, before),
      changed: () => this.#render(),
    });
    this.#loader = new Loader(about, this.#runner, {
      changed: () => this.#render(),
      described: () => {
        this.#render();
        if (this.#link) this.#promise();
      },
      fault: (fault) => this.#fault(fault),
    });
  }

  async begin() {
    this.#write();
    this.#listen();
    this.#render();
    try {
      if (!this.#about.server) checkBrowser();
      this.#link = readLink(location.hash);
    } catch (fault) {
      this.#fault(fault);
      if (fault.kind === "browser") return;
    }
    if (this.#link) this.#follow(this.#link);
    await this.#loader.begin();
  }

  // --- elements of the page ---

  #write() {
    const { title, summary, facts, links, examples, models, chat, server } = this.#about;
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
  }

  #listen() {
    byId("change").onclick = () => {
      this.#talk.stop();
      this.#talk.fail();
      this.#loader.unload();
      byId("load").focus();
      this.#panel(false);
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
    // On iOS an on-screen keyboard covers the page instead of reducing its height.
    visualViewport?.addEventListener("resize", () => {
      if (visualViewport.scale !== 1) return;
      document.documentElement.style.setProperty("--height", `${visualViewport.height}px`);
    });
    addEventListener("hashchange", () => location.reload());
  }

  /** Show and hide elements according to the state. */
  #render() {
    const { turns, busy } = this.#talk;
    this.#loader.render();
    for (const id of ["headline", "summary", "examples"]) byId(id).hidden = turns.length > 0;
    if (!this.#about.examples.length) byId("examples").hidden = true;
    byId("welcome").classList.toggle("small", turns.length > 0);
    byId("new").hidden = turns.length === 0;
    const focused = document.activeElement;
    byId("send").disabled = this.#loader.state !== "ready";
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    if (focused === byId("send") && busy) byId("stop").focus();
    else if (focused === byId("stop") && !busy) rest();
    document.body.classList.toggle("busy", busy);
    this.#fitText();
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

  #hear({ number, step, progress, ready, reading, token, done }) {
    if (step) this.#loader.step(step);
    if (progress) this.#loader.progress(progress);
    if (ready) {
      this.#loader.ready(ready);
      this.#context(0);
    }
    if (!this.#talk.awaits(number)) return;
    if (reading) this.#talk.reading(reading);
    if (token) this.#context(this.#talk.token(token));
    if (done) {
      this.#context(done.used);
      this.#talk.done(done);
    }
  }

  // --- asking ---

  #ask() {
    const text = byId("text");
    if (this.#loader.state !== "ready" || this.#talk.busy || !text.value.trim()) return;
    const question = text.value;
    text.value = "";
    clearNotices();
    this.#talk.ask(question);
  }

  #take(example) {
    byId("text").value = example;
    if (this.#loader.state === "ready") this.#ask();
    this.#fitText();
    rest();
  }

  #context(used) {
    const { capacity } = this.#loader.facts;
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
      scheme: this.#loader.variant.scheme,
      weights: this.#loader.weights?.sha256.slice(0, 12) ?? "",
      settings: { ...sampling, max_tokens, seed, context: this.#loader.facts.capacity },
    };
    return `${location.href.split("#")[0]}#${writeLink(linked)}`;
  }

  /** Fill the page with the content of a link. */
  #follow({ prompt, turns, system, scheme, settings }) {
    this.#settings.set(settings);
    byId("system").value = system;
    byId("text").value = prompt;
    this.#loader.prefer(scheme, settings.context);
    for (const [question, answer] of this.#about.chat ? turns : []) this.#talk.restore(question, answer);
  }

  #promise() {
    const { weights, settings } = this.#link;
    const sameModel = this.#loader.weights.sha256.startsWith(weights || "-");
    const same = sameModel && this.#loader.positions() === settings.context;
    const what = this.#about.chat ? "answer" : "continuation";
    notify(
      "link",
      same
        ? `This link holds a text, its settings and seed ${settings.seed}: the model writes the same ${what} again.`
        : `This link holds a text and its settings, but was made with another model or context: the ${what} may differ.`,
    );
  }

  // --- errors ---

  #fault(fault) {
    const { kind, number } = fault;
    const ends = number === undefined || kind === "engine"; // whether it also ends the model
    this.#talk.fail();
    if (ends && kind !== "link") this.#loader.fail();
    showFault(fault.sentence ?? fault.message, this.#waysOn(kind));
  }

  /** The visitor's options after a kind of error. @returns {HTMLElement[]} */
  #waysOn(kind) {
    const again = (label, className) => button(label, () => this.#loader.retry(), className);
    if (kind === "browser" || kind === "worker") return [];
    if (["link", "long", "prompt"].includes(kind)) return [button("Dismiss", clearFault)];
    if (kind === "version" || kind === "format") return [reload()];
    if (kind === "engine") return [again("Load the model again", "primary")];
    if (kind === "memory") return [...this.#loader.smaller(), again("Try again")];
    return [again("Try again", "primary")];
  }
}

byId("boot").hidden = true;
byId("app").hidden = false;
try {
  await new Page(await getJSON(new URL("page.json", base), "smolctl-page")).begin();
} catch (fault) {
  showFault(fault.message, [reload()]);
}
