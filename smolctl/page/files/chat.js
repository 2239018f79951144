/**
 * A conversation as the token ids that a chat model was trained on.
 *
 * Most templates write the same text between two messages whatever the messages contain. smolctl/page/chat.py
 * verifies this for a model's template and ships these texts. Other templates are rendered by the page's Jinja library,
 * which is known to differ from Python's in one point: `trim` keeps U+001C to U+001F and U+0085, and removes U+FEFF.
 */

// When the context is full, the oldest turns are dropped until this share of it is free: the turns after them must be
// processed again, which should not happen at every turn.
const FREE_SHARE = 0.25;

/** The characters that Python's `str.strip` removes; JavaScript's `trim` removes others. */
const SPACE = /[\p{White_Space}\x1c-\x1f]/u;

/** A conversation leaves no room for an answer, even without its oldest turns. */
export class PromptTooLongError extends Error {
  /**
   * @param {number} tokens of the prompt
   * @param {number} capacity tokens that the KV cache can hold
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
 * @typedef {(messages: Message[]) => string} Render renders the template up to the start of the answer
 */

/**
 * Prepare a model's chat template.
 * @param {object} chat `chat` of page.json
 * @returns {Promise<Render>} throws if the template refuses the messages
 * @throws the Jinja library renders this template differently from Python's
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
 * Ids of a conversation with the header of its answer. Special tokens spelled in messages are read as text.
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
 * Ids of a conversation whose oldest turns were dropped until it and its answer fit.
 * @param {import("./tokenizer.js").Tokenizer} tokenizer
 * @param {Render} render from `openChat`
 * @param {Message[]} messages an optional system message, then questions with their answers, then a question
 * @param {number} capacity tokens that the KV cache can hold
 * @param {number} maxTokens of the answer; at most half of the capacity is kept free for it
 * @returns {{ids: number[], forgotten: number}} with the number of dropped questions and their answers
 * @throws {PromptTooLongError} even the last question does not fit
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
  // Binary search: a conversation of a thousand turns must not be tokenized a thousand times.
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
