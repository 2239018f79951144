/**
 * A conversation as the token ids that a chat model was trained on.
 *
 * Most templates put the same text between two messages whatever stands in these. smolctl/page/chat.py proves it
 * of a model's template and ships these texts. Other templates are filled by the Jinja library beside the page,
 * which differs from Python's in one known thing: `trim` leaves U+001C to U+001F and U+0085, and takes U+FEFF.
 */

// When the context is full, the oldest turns go until this share of it is free: what follows them must be read
// again, and not at every turn.
const FREE_SHARE = 0.25;

/** What Python's `str.strip` removes; JavaScript's `trim` removes other characters. */
const SPACE = /[\p{White_Space}\x1c-\x1f]/u;

/** A conversation leaves no room for an answer, even without its oldest turns. */
export class PromptTooLongError extends Error {
  /**
   * @param {number} tokens of the prompt
   * @param {number} capacity tokens that the model can hold
   */
  constructor(tokens, capacity) {
    super(`The prompt has ${tokens} tokens; the model can hold ${capacity}.`);
    this.name = "PromptTooLongError";
    this.tokens = tokens;
    this.capacity = capacity;
  }
}

/**
 * @typedef {{role: "system" | "user" | "assistant", content: string}} Message
 * @typedef {(messages: Message[]) => string} Render fills the template, up to where the answer begins
 */

/**
 * Prepare a model's chat template.
 * @param {object} chat `chat` of page.json
 * @returns {Promise<Render>} it throws where the template refuses the messages
 * @throws the Jinja library does not fill this template as Python's does
 */
export async function openChat(chat) {
  if (chat.kind === "pieces") return (messages) => join(chat, messages);
  const { Template } = await import("./jinja.js");
  const template = new Template(chat.template);
  const empty = { tools: null, documents: null };
  const render = (messages) => template.render({ ...chat.tokens, ...empty, messages, add_generation_prompt: true });
  if (chat.example && render(chat.example.messages) !== chat.example.text) {
    throw new Error("The model's chat template does not give the same text here as in Python.");
  }
  return render;
}

function join({ between, strip }, messages) {
  let text = "";
  let before = "start";
  for (const { role, content } of [...messages, { role: "answer", content: "" }]) {
    const piece = between[before]?.[role];
    if (piece === undefined) throw new Error(`The conversation has ${role} after ${before}.`);
    text += piece + (strip.includes(role) ? stripped(content) : content);
    before = role;
  }
  return text;
}

function stripped(text) {
  let from = 0;
  let to = text.length;
  while (from < to && SPACE.test(text[from])) from++;
  while (from < to && SPACE.test(text[to - 1])) to--;
  return text.slice(from, to);
}

/**
 * Ids of a conversation with the beginning of its answer. Special tokens that a message spells are text.
 * @param {import("./tokenizer.js").Tokenizer} tokenizer
 * @param {Render} render from `openChat`
 * @param {Message[]} messages
 * @returns {number[]}
 */
export function chatPrompt(tokenizer, render, messages) {
  const hidden = messages.map(({ role, content }) => ({ role, content: tokenizer.hide(content) }));
  return tokenizer.encodeConversation(render(hidden));
}

/**
 * Ids of a conversation from which the oldest turns were taken until it and its answer fit.
 * @param {import("./tokenizer.js").Tokenizer} tokenizer
 * @param {Render} render from `openChat`
 * @param {Message[]} messages a system message or none, then questions with their answers, then a question
 * @param {number} capacity tokens that the model can hold
 * @param {number} maxTokens of the answer; half of the capacity at most is kept free for it
 * @returns {{ids: number[], forgotten: number}} and how many questions were forgotten with their answers
 * @throws {PromptTooLongError} not even the last question fits
 */
export function fit(tokenizer, render, messages, capacity, maxTokens) {
  const system = messages.filter(({ role }) => role === "system");
  const turns = messages.slice(system.length);
  const prompt = (forgotten) => chatPrompt(tokenizer, render, [...system, ...turns.slice(2 * forgotten)]);
  let free = Math.min(maxTokens, Math.floor(capacity / 2));
  const whole = prompt(0);
  if (whole.length + free <= capacity) return { ids: whole, forgotten: 0 };

  free = Math.max(free, Math.floor(capacity * FREE_SHARE));
  const every = turns.length >> 1;
  // By halves: a thousand turns are not tokenized a thousand times.
  let [low, high] = [Math.min(1, every), every];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (prompt(middle).length + free <= capacity) high = middle;
    else low = middle + 1;
  }
  const ids = prompt(low);
  if (ids.length >= capacity) throw new PromptTooLongError(ids.length, capacity);
  return { ids, forgotten: low };
}
