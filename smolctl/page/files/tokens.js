/** The tokens of an answer: streamed text, and each token's probability with its alternatives. */

import { announce, button, make, percent } from "./dom.js";

const MARGIN = 8; // pixels between the card and the edge of the text

/** An answer's text while it is generated. A piece is one token, or several that together form whole characters. */
export class TokenText {
  #pieces = [];
  #waiting = []; // tokens with incomplete characters
  #tokens = [];
  #card = null;
  #at = 0; // index of the token on the card
  #legend = make("p", { className: "hint" }, "The stronger the colour of a token, the less likely it was. Press one for its alternatives.");
  shown = false; // whether the tokens are buttons

  constructor() {
    this.text = "";
    this.element = make("p", { className: "text" });
    this.frame = make("div", { className: "answer-text" }, this.element);
    this.element.onclick = ({ target }) => {
      if (document.getSelection().isCollapsed && target.className === "token") this.#openPiece(target);
    };
    this.frame.onkeydown = (event) => this.#key(event);
  }

  get length() {
    return this.#tokens.length;
  }

  /** @param {{text: string, spelled: string, probability: number, alternatives: any[], last: boolean}} token */
  add(token) {
    this.#tokens.push(token);
    this.#waiting.push(this.#tokens.length - 1);
    if (token.text) this.#append(token.text);
  }

  /** @param {string} text the text that was held back until the end */
  finish(text) {
    if (text) this.#append(text);
    else if (this.#waiting.length && this.#pieces.length) this.#pieces.at(-1).tokens.push(...this.#waiting);
    this.#waiting = [];
    if (this.shown) this.show(true);
  }

  /** Make every token a button that can be reached with the arrow keys, tinted by its improbability. */
  show(shown) {
    this.shown = shown;
    if (shown) this.frame.append(this.#legend);
    else this.#legend.remove();
    this.element.classList.toggle("shown", shown);
    if (shown) {
      this.element.setAttribute("role", "group");
      this.element.setAttribute("aria-label", "Tokens of the answer. The arrow keys go from one to the next.");
    } else {
      this.element.removeAttribute("role");
      this.element.removeAttribute("aria-label");
      this.close();
    }
    this.#pieces.forEach((piece, index) => this.#dress(piece, index === 0));
  }

  close() {
    this.#card?.remove();
    this.#card = null;
    this.element.querySelector(".open")?.classList.remove("open");
  }

  #append(text) {
    const span = make("span", { className: "token" }, text);
    const piece = { span, tokens: this.#waiting };
    this.#waiting = [];
    this.#pieces.push(piece);
    this.text += text;
    this.element.append(span);
    if (this.shown) this.#dress(piece, this.#pieces.length === 1);
  }

  #dress({ span, tokens }, first) {
    if (!this.shown) {
      for (const name of ["role", "tabindex", "aria-label"]) span.removeAttribute(name);
      span.style.removeProperty("--doubt");
      return;
    }
    const likely = tokens.reduce((product, index) => product * this.#tokens[index].probability, 1);
    const spelled = tokens.map((index) => name(this.#tokens[index].spelled)).join(" ");
    span.setAttribute("role", "button");
    span.setAttribute("tabindex", first ? "0" : "-1");
    span.setAttribute("aria-label", `${spelled}, ${percent(likely)}`);
    span.style.setProperty("--doubt", String(Math.round(100 * (1 - likely)) / 100));
  }

  #openPiece(span) {
    const piece = this.#pieces.find((one) => one.span === span);
    if (piece?.tokens.length) this.#open(piece.tokens[0]);
  }

  #key(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
    const inCard = this.#card?.contains(event.target);
    const onToken = event.target.getAttribute("role") === "button";
    if (event.key === "Escape" && this.#card) {
      this.close();
      if (inCard) this.#spanOf(this.#at)?.focus();
    } else if (inCard && event.key in steps) this.#go(this.#at + steps[event.key]);
    else if (onToken && event.key in steps) this.#focusBeside(event.target, steps[event.key]);
    else if (onToken && (event.key === "Enter" || event.key === " ")) this.#openPiece(event.target);
    else return;
    event.preventDefault();
  }

  #focusBeside(span, step) {
    const index = this.#pieces.findIndex((piece) => piece.span === span) + step;
    const next = this.#pieces[Math.min(Math.max(index, 0), this.#pieces.length - 1)].span;
    span.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  #spanOf(index) {
    return this.#pieces.find((piece) => piece.tokens.includes(index))?.span;
  }

  #go(index) {
    if (index >= 0 && index < this.#tokens.length) this.#open(index);
  }

  #open(index) {
    const wanted = this.#spanOf(index) ?? this.#pieces.at(-1)?.span;
    if (!wanted) return;
    const before = this.#card?.contains(document.activeElement) ? document.activeElement.textContent : null;
    this.close();
    this.#at = index;
    this.#card = this.#draw(index);
    wanted.classList.add("open");
    this.frame.append(this.#card);
    this.#place(wanted);
    const again = [...this.#card.querySelectorAll("button")].find((one) => one.textContent === before);
    (again && !again.disabled ? again : this.#card).focus({ preventScroll: true });
    this.#card.scrollIntoView({ block: "nearest" });
    const token = this.#tokens[index];
    announce(`${name(token.spelled)}, ${percent(token.probability)}`);
  }

  #draw(index) {
    const { id, spelled, probability, alternatives } = this.#tokens[index];
    const rows = alternatives.map((one) => [one.spelled, one.share, one.id === id]);
    if (!rows.some(([, , chosen]) => chosen)) rows.unshift([spelled, probability, true]);
    const rest = Math.max(0, 1 - rows.reduce((sum, [, share]) => sum + share, 0));
    const list = make("ol", { className: "shares" });
    for (const [text, share, chosen] of rows) list.append(row(name(text), share, chosen));
    if (rest > 0.0005) list.append(row("all others", rest, false, true));
    const earlier = button("Previous", () => this.#go(index - 1));
    const later = button("Next", () => this.#go(index + 1));
    earlier.disabled = index === 0;
    later.disabled = index === this.#tokens.length - 1;
    const close = button("Close", () => {
      this.close();
      this.#spanOf(index)?.focus();
    });
    const place = make("p", { className: "hint" }, `Token ${index + 1} of ${this.#tokens.length}${id === null ? "" : `, id ${id}`}`);
    const label = `The token ${name(spelled)} and its alternatives`;
    const about = { className: "card", role: "dialog", tabIndex: -1, "aria-label": label };
    return make("div", about, list, place, make("div", { className: "actions" }, earlier, later, close));
  }

  /** Below the token, and within the width of the text. */
  #place(span) {
    const box = span.getClientRects()[0];
    const frame = this.frame.getBoundingClientRect();
    const most = Math.max(frame.width - this.#card.offsetWidth - MARGIN, 0);
    this.#card.style.left = `${Math.min(Math.max(box.left - frame.left - MARGIN, 0), most)}px`;
    this.#card.style.top = `${box.bottom - frame.top + MARGIN}px`;
  }
}

function row(text, share, chosen, rest = false) {
  const bar = make("span", { className: "bar", "aria-hidden": "true" });
  bar.style.width = `${100 * share}%`;
  const label = make("span", { className: rest ? "hint" : "spelled" }, text);
  const said = chosen ? [make("span", { className: "visually-hidden" }, " (chosen)")] : [];
  return make("li", { className: chosen ? "chosen" : "" }, bar, label, ...said, make("span", {}, percent(share)));
}

/** A token's text with visible spaces and line breaks. */
const name = (spelled) => spelled.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "(empty)";
