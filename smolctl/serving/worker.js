/**
 * Replaces the page's own worker.js: the model runs on the server that sent the page, and answers over OpenAI's API.
 * It handles the same messages.
 */

const ALTERNATIVES = 5;
const running = new Map(); // abort controllers of running generations, by number
let capacity = 0; // tokens of a prompt and its answer

onmessage = ({ data: { load, generate: request, stop } }) => {
  if (load) {
    capacity = load.about.context;
    postMessage({ ready: { capacity } });
  }
  if (request) generate(request);
  for (const [number, controller] of running) if (number <= stop) controller.abort();
};
postMessage({ started: true });

async function generate({ number, messages, prompt, sampling, max_tokens, seed }) {
  const controller = new AbortController();
  running.set(number, controller);
  const began = performance.now();
  const asked = { ...sampling, max_tokens, seed, stream: true, stream_options: { include_usage: true } };
  const done = { number, reason: "stopped", text: "", tokens: 0, forgotten: 0, used: 0, capacity };
  let first = began; // time of the first token
  try {
    const answer = messages
      ? await chat(asked, [...messages], done, controller.signal)
      : await post("v1/completions", { ...asked, prompt, logprobs: ALTERNATIVES }, controller.signal);
    postMessage({ number, reading: { done: 0, total: 0, used: 0, forgotten: done.forgotten } });
    for await (const { choices, usage, error } of events(answer.body)) {
      if (error) throw new Error(error.message);
      if (usage) done.used = usage.total_tokens;
      for (const choice of choices) {
        const token = described(choice);
        if (token && !done.tokens++) first = performance.now();
        if (token) postMessage({ number, token });
        else done.text += choice.delta?.content ?? choice.text ?? "";
        done.reason = choice.finish_reason ?? done.reason;
      }
    }
    if (done.reason === "length" && done.used >= capacity) done.reason = "context";
  } catch (error) {
    if (!controller.signal.aborted) {
      const lost = error instanceof TypeError; // raised by fetch
      const sentence = lost ? "The server does not answer; it may have been stopped." : error.message;
      postMessage({ number, fault: { kind: lost ? "server" : "prompt", sentence } });
      return;
    }
  } finally {
    running.delete(number);
  }
  const seconds = (performance.now() - first) / 1_000;
  postMessage({ number, done: { ...done, first: (first - began) / 1_000, seconds } });
}

/** Send a chat; the oldest turns are dropped until the others fit. */
async function chat(asked, messages, done, signal) {
  for (;;) {
    try {
      return await post("v1/chat/completions", { ...asked, messages, logprobs: true, top_logprobs: ALTERNATIVES }, signal);
    } catch (error) {
      const oldest = messages.findIndex(({ role }) => role === "user");
      if (error.code !== "context_length_exceeded" || oldest === messages.length - 1) throw error;
      messages.splice(oldest, 2);
      done.forgotten += 1;
    }
  }
}

async function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (response.ok) return response;
  const { error } = await response.json();
  throw Object.assign(new Error(error.message), { code: error.code });
}

/** The events of a stream; its comments are passed on as signs of life. */
async function* events(body) {
  let held = "";
  for await (const text of read(body.pipeThrough(new TextDecoderStream()))) {
    const lines = (held + text).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) postMessage({ waiting: true });
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

/** The chunks of a stream; Safari cannot iterate over one. */
async function* read(stream) {
  const reader = stream.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

/** A choice's token in the page's form; null: it has none. The API does not provide its id. */
function described({ delta, text, logprobs }) {
  if (!logprobs) return null;
  const [token] = logprobs.content ?? logprobs.tokens.map((token) => ({ token }));
  const shares = logprobs.content
    ? token.top_logprobs.map((one) => [one.token, Math.exp(one.logprob)])
    : Object.entries(logprobs.top_logprobs[0]).map(([other, value]) => [other, Math.exp(value)]);
  return {
    id: null,
    text: delta?.content ?? text ?? "",
    spelled: token.token,
    probability: Math.exp(token.logprob ?? logprobs.token_logprobs[0]),
    alternatives: shares.filter(([other]) => other !== token.token).map(([spelled, share]) => ({ spelled, share })),
  };
}
