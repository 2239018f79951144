/** Downloads a model in parts: each is verified, and stored in this browser for the next visit. */

const PAUSES_MS = [500, 2_000]; // before the second and the third attempt
const STALLED_MS = 30_000; // without a byte; then the next attempt starts
const CACHE = "smolctl-weights";

/** An error with a message for the visitor. `kind` determines the remedies that the page offers. */
export class Fault extends Error {
  /** @param {string} kind @param {string} sentence @param {boolean} [lasting] an immediate retry would not help */
  constructor(kind, sentence, lasting = false) {
    super(sentence);
    this.kind = kind;
    this.lasting = lasting;
  }
}

/**
 * A JSON file of the page.
 * @param {URL} url
 * @param {string} [format] that it must declare, in version 1
 * @throws {Fault} it cannot be downloaded, or has another format
 */
export async function getJSON(url, format) {
  const name = nameOf(url);
  const response = await get(url, name, {});
  let value;
  try {
    value = await response.json();
  } catch {
    throw new Fault("format", `${name} is damaged: the server sends something that is not JSON.`);
  }
  if (format && value?.format !== format) throw new Fault("format", `${name} is not a file of this page.`);
  if (format && value.version !== 1) {
    const sentence = `${name} was written by a later version of smolctl than the rest of this page.`;
    throw new Fault("version", `${sentence} Reload the page; if that does not help, it has to be published again.`);
  }
  return value;
}

/** @param {URL} url @returns {Promise<ArrayBuffer>} @throws {Fault} */
export async function getBytes(url) {
  return (await get(url, nameOf(url), {})).arrayBuffer();
}

/** The parts of a folder of weights that this browser has stored, by SHA-256. */
export class Store {
  #cache;
  #folder;
  #full = false;

  /** @param {Cache | null} cache null: this browser stores nothing @param {URL} folder */
  constructor(cache, folder) {
    this.#cache = cache;
    this.#folder = folder;
  }

  /** @param {URL} folder */
  static async open(folder) {
    try {
      return new Store(await caches.open(CACHE), folder);
    } catch {
      return new Store(null, folder); // no https, or the visitor forbids storage
    }
  }

  get keeps() {
    return this.#cache !== null && !this.#full;
  }

  #key(part) {
    return new URL(part.sha256, this.#folder).href;
  }

  /** @returns {Promise<number>} bytes of the stored parts */
  async held(parts) {
    const keys = new Set((await this.#keys()).map((request) => request.url));
    return parts.reduce((sum, part) => sum + (keys.has(this.#key(part)) ? part.bytes : 0), 0);
  }

  /** @returns {Promise<Uint8Array | null>} null: it is missing or damaged */
  async get(part) {
    try {
      const response = await this.#cache?.match(this.#key(part));
      if (!response) return null;
      const bytes = new Uint8Array(await response.arrayBuffer());
      return (await isPart(bytes, part)) ? bytes : null;
    } catch {
      return null;
    }
  }

  /** Store a part. After the browser has refused once, nothing more is stored. */
  async put(part, bytes) {
    try {
      if (this.keeps) await this.#cache.put(this.#key(part), new Response(bytes));
    } catch {
      this.#full = true;
    }
  }

  /** Delete this folder's data, except some parts. */
  async clear(except = []) {
    const keep = new Set(except.map((part) => this.#key(part)));
    for (const request of await this.#keys()) {
      if (request.url.startsWith(this.#folder.href) && !keep.has(request.url)) await this.#cache?.delete(request);
    }
  }

  async #keys() {
    return (await this.#cache?.keys()) ?? [];
  }
}

/**
 * Read all weights in parts, from this browser's storage if they are in it.
 * @param {URL} folder
 * @param {{parts: {file: string, bytes: number, sha256: string}[]}} weights
 * @param {(offset: number, bytes: Uint8Array) => void} write
 * @param {(done: number, fetched: number) => void} onProgress bytes available, and bytes downloaded
 * @returns {Promise<boolean>} whether this browser has stored all parts
 * @throws {Fault}
 */
export async function getWeights(folder, weights, write, onProgress) {
  const store = await Store.open(folder);
  let offset = 0;
  let fetched = 0;
  for (const part of weights.parts) {
    let bytes = await store.get(part);
    if (!bytes) {
      bytes = await fetchPart(new URL(part.file, folder), part, (here) => onProgress(offset + here, fetched + here));
      fetched += bytes.length;
      await store.put(part, bytes);
    }
    write(offset, bytes);
    offset += bytes.length;
    onProgress(offset, fetched);
  }
  if (store.keeps) await store.clear(weights.parts); // parts of an earlier model at this address
  return store.keeps;
}

async function fetchPart(url, part, onBytes) {
  for (let tries = 0; ; tries++) {
    try {
      return await fetchOnce(url, part, onBytes);
    } catch (fault) {
      onBytes(0);
      if (fault.lasting || tries === PAUSES_MS.length) throw fault;
      await new Promise((resume) => setTimeout(resume, PAUSES_MS[tries]));
    }
  }
}

async function fetchOnce(url, part, onBytes) {
  const stop = new AbortController();
  let timer = setTimeout(() => stop.abort(), STALLED_MS);
  const bytes = new Uint8Array(part.bytes);
  let here = 0;
  try {
    // The page stores parts itself; the browser's HTTP cache would store them twice, including damaged ones.
    const response = await get(url, part.file, { cache: "no-store", signal: stop.signal });
    const reader = response.body.getReader();
    for (let chunk; !(chunk = await reader.read()).done; ) {
      clearTimeout(timer);
      timer = setTimeout(() => stop.abort(), STALLED_MS);
      if (here + chunk.value.length > bytes.length) {
        stop.abort();
        throw new Fault("corrupt", `${part.file} is longer than it should be.`);
      }
      bytes.set(chunk.value, here);
      here += chunk.value.length;
      onBytes(here);
    }
  } catch (error) {
    if (error instanceof Fault) throw error;
    throw new Fault("network", `The connection broke while ${part.file} was being downloaded.`);
  } finally {
    clearTimeout(timer);
  }
  if (here < bytes.length) {
    throw new Fault("cut", `The server ended ${part.file} after ${here} of its ${bytes.length} bytes.`);
  }
  if (!(await isPart(bytes, part))) {
    throw new Fault("corrupt", `${part.file} arrives damaged: its SHA-256 is not the published one.`);
  }
  return bytes;
}

/** Without https a browser computes no hash; then only the length is checked. */
async function isPart(bytes, part) {
  if (bytes.length !== part.bytes) return false;
  if (!globalThis.crypto?.subtle) return true;
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("") === part.sha256;
}

/** Check a response. @throws {Fault} */
async function get(url, name, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Fault("network", `${name} could not be downloaded: there is no connection to the server.`);
  }
  if (!response.ok) {
    const lasting = response.status >= 400 && response.status < 500 && ![408, 429].includes(response.status);
    throw new Fault("missing", `${name} could not be downloaded: the server answers ${response.status}.`, lasting);
  }
  return response;
}

const nameOf = (url) => url.pathname.split("/").pop();
