/**
 * The worker that runs the model. It receives {load}, {generate} and {stop: number}, and sends {started}, {step},
 * {progress}, {ready}, {reading}, {token}, {done} and {fault}. Generations are numbered from 1 and run one after
 * another; messages about a generation include its number.
 */

import { PromptTooLongError, fit, openChat } from "./chat.js";
import { Fault, getBytes, getJSON, getWeights } from "./download.js";
import { createEngine, memoryNeeded } from "./engine.js";
import { Sampler, probabilities } from "./sampling.js";
import { Tokenizer } from "./tokenizer.js";

const ALTERNATIVES = 5;
const MOST_THREADS = 4;
const HELPER_MS = 5_000; // a helper that has not started by then is not used
const ROUNDS = 3; // of the measurement for choosing the number of threads
const TOKENS = 3; // per round
const GAIN = 1.1; // minimum speed-up for using more threads

let model = null; // {engine, tokenizer, render, ends, cached: ids processed in whole chunks of prompts}
let last = 0; // generations up to this number must stop
let waiting = 0; // requests that have not started
let queue = Promise.resolve();

onmessage = ({ data }) => {
  if (data.stop) last = data.stop;
  else {
    waiting += 1;
    queue = queue.then(() => handle(data));
  }
};
postMessage({ started: true });

async function handle({ load: loading, generate: request }) {
  waiting -= 1;
  try {
    if (loading) await load(loading);
    if (request) await generate(request);
  } catch (error) {
    const fault = error instanceof Fault ? error : new Fault("engine", `The model has stopped: ${error.message}`);
    postMessage({ number: request?.number, fault: { kind: fault.kind, sentence: fault.message } });
  }
}

// --- loading ---------------------------------------------------------------------------------------

/** `about` is page.json, `weights` is weights.json of the folder. */
async function load({ base, folder, about, weights, positions, threads }) {
  const place = new URL(`${folder}/`, base);
  const tokens = getJSON(new URL("tokenizer.json", place)); // downloaded concurrently
  tokens.catch(() => {}); // an error of the engine is reported first
  const engine = await allocate(base, weights, positions, threads);
  postMessage({ step: "download" });
  const tokenizer = new Tokenizer(await tokens, about.tokenizer);
  const render = about.chat ? await openChat(about.chat) : null;
  const kept = await getWeights(
    place,
    weights,
    (offset, bytes) => engine.write(offset, bytes),
    (done, fetched) => postMessage({ progress: { done, fetched, total: weights.bytes } }),
  );
  postMessage({ step: "start" });
  await engine.start();
  const choice = engine.threads > 1 && !threads ? fastest(engine) : null;
  model = { engine, tokenizer, render, ends: new Set(about.tokenizer.ends), cached: [] };
  postMessage({
    ready: { threads: engine.threads, speeds: choice, memory: engine.memoryBytes, capacity: engine.capacity, kept },
  });
  if (render) await readAhead([]);
}

/** Process a conversation while the visitor types; errors of the template are reported with the question. */
async function readAhead(messages) {
  try {
    const { ids } = promptOf([...messages, { role: "user", content: "" }], 1);
    await read(ids, async () => {
      await pause();
      return !waiting;
    });
  } catch (error) {
    if (!(error instanceof Fault)) throw error;
  }
}

/** Memory for the model, with helpers if threads are available. @throws {Fault} the browser refuses the memory */
async function allocate(base, weights, positions, threads) {
  const most = threads || Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1);
  const helpers = crossOriginIsolated && most > 1 ? await startHelpers(most - 1) : [];
  if (helpers.length) {
    const module = await WebAssembly.compile(await getBytes(new URL("engine-threads.wasm", base)));
    postMessage({ step: "memory" });
    try {
      return await createEngine({
        module,
        weights,
        positions,
        threads: helpers.length + 1,
        startThread: (memory, module, index) => helpers[index - 1].postMessage({ memory, module, index }),
      });
    } catch {
      for (const helper of helpers) helper.terminate(); // some phones refuse shared memory of any size
    }
  }
  const module = await WebAssembly.compile(await getBytes(new URL("engine.wasm", base)));
  postMessage({ step: "memory" });
  try {
    return await createEngine({ module, weights, positions });
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    const needed = Math.round(memoryNeeded(weights, positions) / 1e6);
    throw new Fault("memory", `The browser has refused the ${needed} MB of memory that the model needs.`);
  }
}

/** The helpers that could be started. @returns {Promise<Worker[]>} */
async function startHelpers(count) {
  const started = Array.from({ length: count }, () => {
    return new Promise((resolve) => {
      try {
        const helper = new Worker(new URL("thread.js", import.meta.url), { type: "module" });
        helper.onmessage = () => resolve(helper);
        helper.onerror = (event) => {
          event.preventDefault(); // otherwise it would also be reported as this worker's error
          resolve(null);
        };
        setTimeout(() => resolve(null), HELPER_MS);
      } catch {
        resolve(null);
      }
    });
  });
  return (await Promise.all(started)).filter((helper) => helper !== null);
}

/** Choose the fastest number of threads. @returns {[number, number][]} threads and tokens/s */
function fastest(engine) {
  const counts = [1, 2, 4].filter((count) => count <= engine.threads);
  const best = new Map(counts.map((count) => [count, Infinity]));
  for (let round = 0; round < ROUNDS; round++) {
    for (const count of counts) {
      engine.threads = count;
      engine.truncate(0);
      engine.forward([0]);
      const start = performance.now();
      for (let token = 0; token < TOKENS; token++) engine.forward([0]);
      best.set(count, Math.min(best.get(count), (performance.now() - start) / TOKENS));
    }
  }
  engine.truncate(0);
  let chosen = 1;
  for (const count of counts) if (best.get(count) * GAIN < best.get(chosen)) chosen = count;
  engine.threads = chosen;
  return counts.map((count) => [count, 1_000 / best.get(count)]);
}

// --- generation ------------------------------------------------------------------------------------

async function generate({ number, messages, prompt, sampling, max_tokens: most, seed }) {
  const { engine, tokenizer, ends } = model;
  const began = performance.now();
  const { ids, forgotten } = messages ? promptOf(messages, most) : { ids: tokenizer.encode(prompt), forgotten: 0 };
  if (!ids.length) throw new Fault("prompt", "There is nothing to continue: the text has no tokens.");
  if (ids.length >= engine.capacity) throw tooLong(ids.length);
  const sampler = new Sampler(sampling, seed);
  await sampler.ready;
  const stream = tokenizer.stream(ids);
  let logits = await read(ids, async (done, total) => {
    postMessage({ number, reading: { done, total, used: ids.length, forgotten } });
    await pause();
    return number > last;
  });
  const answering = performance.now();
  let count = 0;
  let answer = "";
  let reason = logits ? "" : "stopped";
  while (!reason) {
    const id = sampler.choose(logits, ids);
    const { probability, alternatives } = probabilities(logits, id, ALTERNATIVES);
    const ended = ends.has(id);
    const text = ended ? "" : stream.feed(id);
    ids.push(id);
    count += 1;
    answer += text;
    postMessage({
      number,
      token: {
        id,
        text,
        spelled: tokenizer.spell(id),
        probability,
        alternatives: alternatives.map(([other, share]) => ({ id: other, spelled: tokenizer.spell(other), share })),
      },
    });
    if (ended) reason = "stop";
    else if (count === most) reason = "length";
    else if (ids.length === engine.capacity) reason = "context";
    else {
      await pause();
      if (number <= last) reason = "stopped";
      else logits = engine.forward([id]);
    }
  }
  const now = performance.now();
  const end = stream.finish();
  postMessage({
    number,
    done: {
      reason,
      text: end,
      tokens: count,
      forgotten,
      used: ids.length,
      capacity: engine.capacity,
      first: (answering - began) / 1_000,
      seconds: (now - answering) / 1_000,
    },
  });
  if (messages) await readAhead([...messages, { role: "assistant", content: answer + end }]);
}

function promptOf(messages, most) {
  const { engine, tokenizer, render } = model;
  try {
    return fit(tokenizer, render, messages, engine.capacity, most);
  } catch (error) {
    if (error instanceof PromptTooLongError) throw tooLong(error.tokens);
    throw new Fault("prompt", `The model's chat template refuses this conversation: ${error.message}`);
  }
}

function tooLong(tokens) {
  const room = `it has ${tokens} tokens, and the context has room for ${model.engine.capacity} with the answer`;
  return new Fault("long", `This text is too long for the model: ${room}. Shorten it.`);
}

/**
 * Logits after a prompt; null if `proceed` stops it. Tokens in the KV cache are reused if they were processed in whole
 * chunks of a prompt: a prompt has the same logits, bit for bit, whatever was processed before it.
 */
async function read(ids, proceed) {
  const { engine, cached } = model;
  let same = 0;
  while (same < cached.length && same < ids.length - 1 && cached[same] === ids[same]) same++;
  same -= same % engine.chunk;
  engine.truncate(same);
  model.cached = ids.slice(0, same);
  const logits = await engine.read(ids.slice(same), (done) => proceed(done, ids.length - same));
  model.cached = ids.slice(0, engine.length - (engine.length % engine.chunk));
  return logits;
}

// Uses messages instead of timers, which fire once per second or less in a hidden tab.
const { port1, port2 } = new MessageChannel();
const pause = () =>
  new Promise((resume) => {
    port1.onmessage = () => resume();
    port2.postMessage(0);
  });
