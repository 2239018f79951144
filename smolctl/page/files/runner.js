/** The page's side of the worker that runs the model, with a timeout for its messages. */

import { Fault } from "./download.js";

const BROWSERS = "Chrome 110, Edge 110, Firefox 114, Safari 16.4 and later ones can run this page";
// Seconds without a message, by activity, after which the worker counts as lost: a browser that runs out of memory may
// never report it. Downloads have their own limit.
const PATIENCE = { begin: 20, memory: 20, start: 60, generate: 120 };
const SILENT = {
  begin: ["worker", `The worker that runs the model did not start: the browser is too old, or a file of this page is missing. ${BROWSERS}.`],
  memory: ["memory", "The browser did not respond to the request for the memory that the model needs."],
  start: ["memory", "The browser did not finish preparing the model; it may be out of memory."],
  generate: ["engine", "The model has not answered for two minutes; the browser may be out of memory."],
};

/** @throws {Fault} the browser cannot run any model */
export function checkBrowser() {
  // A function that creates a vector: the smallest module that needs SIMD.
  const type = [1, 5, 1, 0x60, 0, 1, 0x7b];
  const body = [10, 8, 1, 6, 0, 0x41, 0, 0xfd, 0x0f, 0x0b];
  const module = new Uint8Array([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, ...type, 3, 2, 1, 0, ...body]);
  if (!globalThis.WebAssembly?.validate(module)) {
    throw new Fault("browser", `This browser has no WebAssembly with SIMD, or has it switched off. ${BROWSERS}.`);
  }
}

export class Runner {
  #worker = null;
  #doing = "";
  #silence = 0;
  #onMessage;
  #onFault;

  /**
   * @param {(message: any) => void} onMessage messages of the worker, except errors
   * @param {(fault: {kind: string, sentence: string}) => void} onFault
   */
  constructor(onMessage, onFault) {
    this.#onMessage = onMessage;
    this.#onFault = onFault;
    // Counts ticks instead of reading a clock, so that a suspended tab does not lose time.
    setInterval(() => this.#tick(), 1_000);
  }

  begin() {
    this.end();
    this.#expect("begin");
    try {
      this.#worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    } catch {
      return this.#fail(...SILENT.begin);
    }
    this.#worker.onmessage = ({ data }) => this.#hear(data);
    this.#worker.onerror = (event) => {
      event.preventDefault();
      if (this.#doing === "begin") this.#fail(...SILENT.begin);
      else this.#fail("engine", `The model has stopped: ${event.message ?? "its worker has failed"}.`);
    };
  }

  /** Free everything that belongs to the model, including its memory. */
  end() {
    this.#worker?.terminate();
    this.#worker = null;
    this.#doing = "";
  }

  load(request) {
    if (!this.#worker) this.begin();
    this.#worker?.postMessage({ load: request });
  }

  generate(request) {
    this.#expect("generate");
    this.#worker?.postMessage({ generate: request });
  }

  /** @param {number} number of the generation to stop, together with those before it */
  stop(number) {
    this.#worker?.postMessage({ stop: number });
  }

  #expect(doing) {
    this.#doing = doing;
    this.#silence = 0;
  }

  #hear(data) {
    this.#silence = 0;
    if (data.fault) {
      this.#doing = "";
      this.#onFault({ number: data.number, ...data.fault });
      return;
    }
    if (data.step) this.#expect(data.step);
    if (data.started || data.ready || data.done) this.#doing = "";
    this.#onMessage(data);
  }

  #tick() {
    if (!(this.#doing in PATIENCE) || document.hidden) return;
    this.#silence += 1;
    if (this.#silence > PATIENCE[this.#doing]) this.#fail(...SILENT[this.#doing]);
  }

  #fail(kind, sentence) {
    this.end();
    this.#onFault({ kind, sentence });
  }
}
