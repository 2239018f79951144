// What trial.html does, for machines without a browser: the page's engine and tokenizer under Node.
// Usage: node trial.mjs FOLDER, with the request on stdin; the result goes to stdout.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const load = (name) => import(pathToFileURL(join(folder, name)).href);
const json = async (...path) => JSON.parse(await readFile(join(folder, ...path), "utf-8"));

async function trial(request) {
  const began = performance.now();
  const { createEngine } = await load("engine.js");
  const { Sampler } = await load("sampling.js");
  const { Tokenizer } = await load("tokenizer.js");
  const { chatPrompt, openChat } = await load("chat.js");
  const page = await json("page.json");
  const model = request.load.folder;
  const weights = await json(model, "weights.json");
  const tokenizer = new Tokenizer(await json(model, "tokenizer.json"), page.tokenizer);
  const module = await WebAssembly.compile(await readFile(join(folder, "engine.wasm")));
  const engine = await createEngine({ module, weights, positions: request.load.positions });
  let offset = 0;
  for (const part of weights.parts) {
    engine.write(offset, await readFile(join(folder, model, part.file)));
    offset += part.bytes;
  }
  await engine.start();
  const start_s = (performance.now() - began) / 1000;
  const { messages, prompt, sampling, max_tokens, seed } = request.generate;
  const before = messages ? chatPrompt(tokenizer, await openChat(page.chat), messages) : tokenizer.encode(prompt);
  const sampler = new Sampler(sampling, seed);
  await sampler.ready;
  const stream = tokenizer.stream(before);
  const ids = [];
  let text = "";
  let next = before;
  while (ids.length < max_tokens) {
    const logits = await engine.read(next, async () => true);
    const id = sampler.choose(logits, [...before, ...ids]);
    ids.push(id);
    if (page.tokenizer.ends.includes(id)) break;
    text += stream.feed(id);
    next = [id];
  }
  text += stream.finish();
  return { ids, text, start_s, answer_s: (performance.now() - began) / 1000 - start_s };
}

let input = "";
for await (const piece of process.stdin) input += piece;
console.log(JSON.stringify(await trial(JSON.parse(input))));
