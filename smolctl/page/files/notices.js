/** Messages above the input field: notices that can be dismissed, and one error. */

import { button, byId, make, rest } from "./dom.js";

/** @param {string} name of its kind; a new notice replaces it @param {string} text */
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

/** @param {string} sentence @param {HTMLElement[]} waysOn the visitor's options */
export function showFault(sentence, waysOn) {
  byId("fault").replaceChildren(make("p", {}, sentence), make("div", { className: "actions" }, ...waysOn));
}

export function clearFault() {
  byId("fault").replaceChildren();
}

export const reload = () => button("Reload the page", () => location.reload(), "primary");
