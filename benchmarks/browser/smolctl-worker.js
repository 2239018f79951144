import { createEngine } from "/code/engine.js";
import { Tokenizer } from "/code/tokenizer.js";

let engine;
let tokenizer;

onmessage = async ({ data }) => {
  try {
    postMessage(data.options ? await load(data.options) : await continueText(data.text, data.count));
  } catch (error) {
    postMessage({ error: String(error.stack ?? error) });
  }
};

async function load({ model, threads, tokenizer: options, positions }) {
  const json = async (name) => (await fetch(`${model}/${name}`)).json();
  const weights = await json("weights.json");
  tokenizer = new Tokenizer(await json("tokenizer.json"), options);
  const module = await WebAssembly.compileStreaming(fetch(`/code/engine${threads > 1 ? "-threads" : ""}.wasm`));
  const startThread = (memory, module, index) =>
    new Worker("smolctl-thread.js", { type: "module" }).postMessage({ memory, module, index });
  engine = await createEngine({ module, weights, positions, threads, startThread });
  let offset = 0;
  for (const { file, bytes } of weights.parts) {
    engine.write(offset, new Uint8Array(await (await fetch(`${model}/${file}`)).arrayBuffer()));
    offset += bytes;
  }
  await engine.start();
  return { threads: engine.threads };
}

async function continueText(text, count) {
  const ids = tokenizer.encode(text);
  engine.truncate(0);
  let logits = await engine.read(ids, async () => true);
  let written = 1;
  for (; written < count; written++) logits = engine.forward([likeliest(logits)]);
  likeliest(logits);
  return { read: ids.length, written };
}

function likeliest(logits) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}
