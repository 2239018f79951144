// llama.cpp as WebAssembly. It has a worker of its own.

import { Wllama } from "/npm/wllama/esm/index.js";

export async function open({ model, threads, positions }) {
  const wllama = new Wllama({ default: "/npm/wllama/esm/wasm/wllama.wasm" }, { suppressNativeLog: true });
  const file = await (await fetch(model)).blob();
  await wllama.loadModel([file], { n_threads: threads, n_ctx: positions, n_gpu_layers: 0 });
  if (wllama.getNumThreads() !== threads) throw new Error(`it runs ${wllama.getNumThreads()} threads`);
  return async (text, count) => {
    const settings = { prompt: text, max_tokens: count, temperature: 0, cache_prompt: false, ignore_eos: true };
    const { usage } = await wllama.createCompletion(settings);
    return { read: usage.prompt_tokens, written: usage.completion_tokens };
  };
}
