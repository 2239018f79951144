// ONNX Runtime Web on a graph with a KV cache, as onnxruntime-genai's builder writes it.

import * as ort from "/npm/onnxruntime-web/dist/ort.wasm.min.mjs";
import { Tokenizer } from "/code/tokenizer.js";

export async function open({ model, threads, tokenizer: options, tokenizerJson, kvHeads, headSize }) {
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = "/npm/onnxruntime-web/dist/";
  const tokenizer = new Tokenizer(await (await fetch(tokenizerJson)).json(), options);
  const bytes = new Uint8Array(await (await fetch(model)).arrayBuffer());
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  const integers = (values) =>
    new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const range = (from, to) => Array.from({ length: to - from }, (_, index) => from + index);

  return async (text, count) => {
    const ids = tokenizer.encode(text);
    let cache = Object.fromEntries(
      session.inputNames
        .filter((name) => name.startsWith("past_key_values"))
        .map((name) => [name, new ort.Tensor("float32", new Float32Array(0), [1, kvHeads, 0, headSize])]),
    );
    let next = ids;
    let length = 0;
    for (let written = 0; written < count; written++) {
      const feeds = { input_ids: integers(next), attention_mask: integers(range(0, length + next.length).fill(1)) };
      if (session.inputNames.includes("position_ids")) {
        feeds.position_ids = integers(range(length, length + next.length));
      }
      const results = await session.run({ ...feeds, ...cache });
      length += next.length;
      cache = Object.fromEntries(
        Object.keys(cache).map((name) => [name, results[name.replace("past_key_values", "present")]]),
      );
      const [, rows, size] = results.logits.dims;
      const last = results.logits.data.subarray((rows - 1) * size);
      let best = 0;
      for (let id = 1; id < size; id++) if (last[id] > last[best]) best = id;
      next = [best];
    }
    return { read: ids.length, written: count };
  };
}
