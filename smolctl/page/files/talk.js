/** The conversation, or the texts that the model continues: questions, answers, and the actions on them. */

import { announce, button, byId, copied, grouped, make } from "./dom.js";
import { TokenText } from "./tokens.js";

const SEEDS = 1_000_000; // short ones are easier to read and to copy
const NEAR_END = 80; // distance in pixels within which the view follows the text
const ENDS = {
  length: "stopped at the longest answer",
  context: "stopped: the context is full",
  stopped: "stopped by you",
  fault: "interrupted",
};

/**
 * @typedef {object} Turn
 * @property {string} question
 * @property {string} answer its text so far
 * @property {object | null} how what determines the answer's text: the request to the worker, and the seed
 * @property {HTMLElement} element
 */

export class Talk {
  /** @type {Turn[]} */ turns = [];
  #current = null; // the turn that is being answered
  #number = 0; // number of its generation
  #follows = true; // whether the view follows the text, until the visitor scrolls away from its end
  #frame = 0; // animation frame in which the view will scroll
  #before = null; // turns to restore if no answer comes
  #hooks;
  #chats;

  /**
   * @param {boolean} chats false: every text is continued independently
   * @param {{request: () => object, send: (request: object) => void, stop: (number: number) => void,
   *          link: (turn: Turn, before: Turn[]) => string, changed: () => void}} hooks
   */
  constructor(chats, hooks) {
    this.#chats = chats;
    this.#hooks = hooks;
    byId("scroll").addEventListener("scroll", ({ target }) => {
      this.#follows = target.scrollHeight - target.scrollTop - target.clientHeight < NEAR_END;
    });
  }

  get busy() {
    return this.#current !== null;
  }

  /** A turn that was answered elsewhere. */
  restore(question, answer) {
    const turn = this.#add(question, make("p", { className: "text" }, answer));
    turn.answer = answer;
    turn.element.append(make("p", { className: "meta" }, "This turn came with the link."));
  }

  ask(question) {
    this.#answer(this.turns.length, question, null);
  }

  clear() {
    this.stop();
    this.#current = null;
    this.#keep([]);
  }

  stop() {
    if (this.busy) this.#hooks.stop(this.#number);
  }

  // --- messages of the worker ---

  /** Whether a message of the worker belongs to the current answer. */
  awaits(number) {
    return this.busy && number === this.#number;
  }

  reading({ done, total, used, forgotten }) {
    const turn = this.#current;
    if (total) turn.meta.textContent = `Reading ${grouped(done)} of ${grouped(total)} tokens`; // 0: it is not known
    turn.used = used;
    this.#mark(forgotten);
  }

  token(token) {
    const turn = this.#current;
    turn.began ??= performance.now();
    turn.text.add(token);
    const rate = (turn.text.length - 1) / ((performance.now() - turn.began) / 1_000);
    turn.meta.textContent = `${tokens(turn.text.length)}${rate > 0 ? ` · ${speed(rate)}` : ""}`;
    this.#scroll();
    return turn.used && turn.used + turn.text.length; // 0: it is not known
  }

  /** @param {{reason: string, text: string, tokens: number, seconds: number}} result */
  done(result) {
    const turn = this.#current;
    this.#current = null;
    turn.text.finish(result.text);
    turn.answer = turn.text.text;
    turn.element.classList.remove("running");
    if (!turn.text.length) return this.#undo(turn);
    const rate = result.tokens > 1 ? [speed((result.tokens - 1) / result.seconds)] : [];
    const parts = [tokens(turn.text.length), ...rate, `seed ${turn.how.seed}`];
    if (ENDS[result.reason]) parts.push(ENDS[result.reason]);
    turn.meta.textContent = parts.join(" · ");
    if (!turn.answer) turn.text.element.append(make("span", { className: "hint" }, "The model ended its answer at once."));
    this.#offer(turn);
    this.#scroll();
    announce(result.reason === "stopped" ? "Stopped" : `Answer complete, ${tokens(turn.text.length)}`);
    this.#hooks.changed();
  }

  /** The current answer ends here. */
  fail() {
    if (this.busy) this.done({ reason: "fault", text: "", tokens: 0, seconds: 0 });
  }

  // --- actions of the visitor ---

  #answer(index, question, seed) {
    if (this.busy) return;
    const request = this.#hooks.request();
    const before = this.turns.slice(0, index);
    const how = { ...request, seed: seed ?? request.seed ?? Math.floor(Math.random() * SEEDS) };
    if (!this.#chats) how.prompt = question;
    else {
      how.messages = how.system ? [{ role: "system", content: how.system }] : [];
      for (const turn of before) {
        how.messages.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.answer });
      }
      how.messages.push({ role: "user", content: question });
    }
    this.#before = this.turns;
    this.#keep(before);
    const text = new TokenText();
    const turn = this.#add(question, text.frame);
    const meta = make("p", { className: "meta" }, "…");
    Object.assign(turn, { text, how, meta, used: 0 });
    turn.element.append(make("div", { className: "foot" }, meta));
    turn.element.classList.add("running");
    this.#current = turn;
    this.#number += 1;
    this.#hooks.send({ ...how, number: this.#number });
    announce("Generating");
    this.#hooks.changed();
    this.#follows = true;
    this.#scroll();
  }

  /** No token came: restore everything, and put a new question back into the input field. */
  #undo(turn) {
    const again = this.#before.length > this.turns.length - 1;
    this.#keep(this.#before);
    announce("Stopped");
    if (!again && !byId("text").value) byId("text").value = turn.question;
    this.#hooks.changed();
  }

  #add(question, answer) {
    const asked = make("div", { className: "question" }, make("p", { className: "text" }, question));
    const [you, it] = this.#chats ? ["You", "Model"] : ["Text", "Continuation"];
    const title = (text) => make("h2", { className: "visually-hidden" }, text);
    const element = make("article", { className: "turn" }, title(you), asked, title(it), answer);
    const turn = { question, answer: "", how: null, element };
    asked.append(button("Edit", () => this.#edit(turn), "quiet edit"));
    this.turns = [...this.turns, turn];
    byId("turns").append(element);
    this.#hooks.changed();
    return turn;
  }

  #edit(turn) {
    if (this.busy) return;
    const asked = turn.element.querySelector(".question");
    const kept = [...asked.childNodes];
    const box = make("textarea", { value: turn.question, rows: 3, "aria-label": "Edit the text" });
    const back = () => {
      asked.replaceChildren(...kept);
      asked.classList.remove("editing");
      asked.querySelector("button").focus();
    };
    const resend = () => {
      if (!box.value.trim() || this.busy) return;
      back();
      this.#answer(this.turns.indexOf(turn), box.value, null);
      byId("stop").focus();
    };
    box.onkeydown = (event) => {
      if (event.key === "Escape") back();
      if (sends(event)) {
        event.preventDefault();
        resend();
      }
    };
    const later = this.turns.length - 1 - this.turns.indexOf(turn);
    const warning = this.#chats && later ? `The ${later === 1 ? "turn" : `${later} turns`} after it will be removed.` : "";
    const actions = [button("Send again", resend, "primary"), button("Cancel", back)];
    const row = make("div", { className: "actions" }, ...actions, make("span", { className: "hint" }, warning));
    asked.classList.add("editing");
    asked.replaceChildren(box, row);
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }

  #offer(turn) {
    const actions = make("div", { className: "actions" });
    const copy = button("Copy", async () => {
      const whole = this.#chats ? turn.answer : turn.question + turn.answer;
      tell(copy, (await copied(whole)) ? "Copied" : "Not allowed here");
    });
    const again = button("Regenerate", () => {
      this.#answer(this.turns.indexOf(turn), turn.question, Math.floor(Math.random() * SEEDS));
      byId("stop").focus();
    });
    again.classList.add("latest");
    const show = button("Tokens", () => {
      turn.text.show(!turn.text.shown);
      show.setAttribute("aria-pressed", String(turn.text.shown));
    });
    show.setAttribute("aria-pressed", "false");
    const link = button("Copy link", async () => {
      const before = this.#chats ? this.turns.slice(0, this.turns.indexOf(turn)) : [];
      const address = this.#hooks.link(turn, before);
      history.replaceState(null, "", address);
      tell(link, (await copied(address)) ? "Link copied" : "Link is in the address bar");
    });
    actions.append(copy, again);
    if (!this.#chats) {
      actions.append(button("Continue", () => this.ask(turn.question + turn.answer)));
    }
    actions.append(show, link);
    turn.element.querySelector(".foot").append(actions);
  }

  #keep(turns) {
    for (const turn of this.turns) if (!turns.includes(turn)) turn.element.remove();
    for (const turn of turns) if (!turn.element.isConnected) byId("turns").append(turn.element);
    this.turns = turns;
    this.#mark(0);
    this.#hooks.changed();
  }

  /** Mark the turns that the model no longer reads. */
  #mark(forgotten) {
    byId("turns").querySelector(".forgotten")?.remove();
    if (!forgotten || !this.turns[forgotten]) return;
    const what = forgotten === 1 ? "turn above is" : `${forgotten} turns above are`;
    const text = `The context is full: the ${what} no longer read by the model.`;
    this.turns[forgotten].element.before(make("p", { className: "forgotten" }, text));
  }

  /** At most once per frame, because the browser has to lay out the text for it. */
  #scroll() {
    if (!this.#follows || this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      byId("scroll").scrollTop = byId("scroll").scrollHeight;
    });
  }
}

/**
 * Whether a key sends a text. Enter may also confirm a character of an input method, which Safari reports only with the
 * code 229; on a touch screen it starts a new line.
 */
export const sends = (event) =>
  event.key === "Enter" &&
  !event.shiftKey &&
  !event.isComposing &&
  event.keyCode !== 229 &&
  !matchMedia("(pointer: coarse)").matches;

function tell(pressed, text) {
  const label = pressed.dataset.label ?? pressed.textContent;
  pressed.dataset.label = label;
  pressed.textContent = text;
  announce(text);
  setTimeout(() => (pressed.textContent = label), 1_500);
}

const tokens = (count) => `${grouped(count)} ${count === 1 ? "token" : "tokens"}`;
const speed = (rate) => `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`;
