/** Creates elements without HTML strings, so that text of models and visitors always stays text. */

/** @param {string} id @returns {any} */
export const byId = (id) => document.getElementById(id);

/**
 * An element with properties, such as `className` or `onclick`, and children, which may be texts.
 * @param {string} tag
 * @param {Record<string, unknown>} [properties]
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, String(value));
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** @param {string} label @param {() => void} onclick @param {string} [className] */
export const button = (label, onclick, className = "quiet") =>
  make("button", { type: "button", className, onclick }, label);

/** A link to another site; plain text if it is not a web address. @param {string} label @param {string} address */
export const outward = (label, address) =>
  /^https?:/.test(address)
    ? make("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, label)
    : make("span", {}, label);

/** Announce an event to screen readers. Only this uses the live region: streamed text would be read in fragments. */
export const announce = (text) => {
  byId("status").textContent = text;
};

/** Move the focus after a button disappears; not on a touch screen, where the keyboard would cover the text. */
export const rest = () =>
  byId(matchMedia("(pointer: coarse)").matches ? "scroll" : "text").focus({ preventScroll: true });

/** @param {number} number */
export const grouped = (number) => number.toLocaleString("en-US");

/** @param {number} bytes @returns {string} in MB of 1,000,000 bytes */
export const megabytes = (bytes) =>
  `${bytes < 10e6 ? (bytes / 1e6).toFixed(1) : grouped(Math.round(bytes / 1e6))} MB`;

/** @param {number} share @returns {string} as a percentage; 0 % and 100 % only for exactly these values */
export function percent(share) {
  if (share < 0.001) return "<0.1 %";
  if (share > 0.999 && share < 1) return ">99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}

/** Copy to the clipboard. @param {string} text @returns {Promise<boolean>} false: the browser forbids it */
export async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
