/** What the page says above the field for a message: notices that can be dismissed, and one fault. */

import { button, byId, make, rest } from "./dom.js";

/** @param {string} name of its kind; a new one takes its place @param {string} text */
export function notify(name, text) {
  const id = `notice-${name}`;
  byId(id)?.remove();
  const notice = make("div", { id, className: "notice" }, make("p", {}, text), button("Dismiss", () => {
    notice.remove();
    rest();
  }));
  byId("notices").append(notice);
}

export function clearNotices() {
  for (const notice of document.querySelectorAll(".notice")) notice.remove();
}

/** @param {string} sentence @param {HTMLElement[]} waysOn what the visitor can do about it */
export function showFault(sentence, waysOn) {
  byId("fault").replaceChildren(make("p", {}, sentence), make("div", { className: "actions" }, ...waysOn));
}

export function clearFault() {
  byId("fault").replaceChildren();
}

export const reload = () => button("Reload the page", () => location.reload(), "primary");
