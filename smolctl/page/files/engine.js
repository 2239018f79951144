// The compiled engine (forward.c as WebAssembly) for a model whose file is in its memory unchanged.

const INTERFACE = 6; // of forward.c; includes the structures below
const PAGE = 65536;
const LIMIT = 65535 * PAGE; // some browsers refuse 4 GiB
const STATIC = 2 * PAGE; // maximum size of the compiled code's own stack and constants
const STACK = 65536; // of every additional thread: STACK_BYTES of threads.h
const FLOAT32 = 0; // a kind of matrix
const BLOCK = 32; // rows are padded to a multiple of it: vector.h
const KEYS = 16; // positions in a tile of keys: attention.h
const SPLIT = 128; // positions per part of a long context, for a few tokens: forward.c
const EXACT = 16; // maximum tokens per call that may all get the bits of a call of their own: forward.c
const CHUNK = 64; // tokens per call of a prompt: many, because every call unpacks all weights
const CALL_MS = 100; // maximum duration of a call, so that "stop" is noticed
const HELPERS_MS = 1000; // to wait for helper threads
const OUTCOMES = ["done", "too little memory", "a call is under way", "cancelled"];

const filled = (size, piece) => Math.ceil(size / piece) * piece;

/** Sizes in bytes of everything that the engine needs besides the weights. */
function sizes({layout}, positions, threads) {
  const {heads, kv_heads, head_dim, layers, hidden_size, intermediate_size} = layout;
  const capacity = filled(positions, KEYS);
  const stride = filled(head_dim, KEYS);
  const cached = layers.length * kv_heads * capacity * (layout.half_precision ? 2 : 4);
  const [C, A, F] = [hidden_size, heads * head_dim, intermediate_size].map((size) => filled(size, BLOCK));
  const widest = Math.max(C, A, F);
  const rows = CHUNK * (2 * C + A + F + (heads + 2 * kv_heads) * head_dim + 2 * widest + 165);
  const scratch = threads * (25 * widest + 1152 + 16 * (CHUNK + 4 * EXACT)); // `scratch_size` of forward.c
  const most = Math.max(EXACT * Math.ceil(capacity / SPLIT), 3 * CHUNK); // tokens × splits of `forward` in forward.c
  return {
    capacity,
    stride,
    keys: cached * head_dim,
    values: cached * stride,
    rotary: layout.frequencies ? 4 * capacity * head_dim : 0,
    work: 4 * (rows + scratch + most * heads * (stride + 3)) + threads * STACK,
    // Tensors that are converted to floats, the structures, and the rounding of each size.
    floats: 4 * (layers.length * (2 * C + (heads + 2 * kv_heads + 2) * head_dim + 7 * BLOCK) + C + BLOCK)
      + (layout.positions ? 4 * layout.max_positions * C : 0),
    structures: 4 * (57 * layers.length + layout.vocab_size) + 64 * (14 * layers.length + 40),
  };
}

/**
 * The bytes of WebAssembly memory that a model needs.
 * @param {object} weights content of weights.json
 * @param {number} positions tokens of context
 * @param {number} threads
 */
export function memoryNeeded(weights, positions, threads = 1) {
  const {keys, values, rotary, work, floats, structures} = sizes(weights, positions, threads);
  return filled(STATIC + weights.bytes + keys + values + rotary + work + floats + structures, PAGE);
}

class Engine {
  #exports;
  #memory;
  #weights;
  #start; // (index): starts a helper thread
  #most; // maximum number of threads
  #asked; // requested number of threads
  #next; // start of free memory
  #base; // start of the weights file
  #context = 0; // of forward.c
  #batch; // address of that structure, and of the arrays it points to
  #ids;
  #places;
  #wanted;
  #logits;
  #pace = 0; // milliseconds per prompt token and layer

  constructor(exports, memory, weights, positions, threads, start) {
    [this.#exports, this.#memory, this.#weights, this.#start] = [exports, memory, weights, start];
    [this.#most, this.#asked] = [threads, threads];
    this.capacity = positions;
    this.length = 0;
    this.#base = filled(exports.__heap_base.value, 64);
    this.#next = this.#base + weights.bytes;
  }

  get memoryBytes() {
    return this.#memory.buffer.byteLength;
  }

  /** Threads in use: helpers count as soon as they run. Assign a smaller number to use fewer. */
  get threads() {
    return this.#exports.smolctl_threads(this.#asked);
  }

  set threads(count) {
    this.#asked = count;
  }

  /** The maximum tokens per call. */
  get chunk() {
    return CHUNK;
  }

  /** Copy bytes of model.safetensors to their place in memory. */
  write(offset, bytes) {
    if (offset + bytes.length > this.#weights.bytes) throw new RangeError("more bytes than the model has");
    new Uint8Array(this.#memory.buffer, this.#base + offset, bytes.length).set(bytes);
  }

  /**
   * After all bytes were written: create the model's structures, and start its threads. Waits a few seconds for the
   * threads; those that start later are used too, and the engine also works without them.
   */
  async start() {
    const {layout} = this.#weights;
    const {capacity, stride, keys, values} = sizes(this.#weights, this.capacity, this.#most);
    const rotary = layout.frequencies ? this.#rotary(layout.frequencies, capacity) : 0;
    const norm = this.#floats(layout.norm);
    const positions = layout.positions ? this.#floats(layout.positions) : 0;
    const layers = layout.layers.flatMap((layer) => layer.flatMap((part) => this.#part(part)));
    const model = this.#integers([
      layout.layers.length,
      layout.hidden_size,
      layout.heads,
      layout.kv_heads,
      layout.head_dim,
      layout.intermediate_size,
      bits(layout.eps),
      bits(layout.residual_scale),
      this.#integers(layers),
      ...this.#matrix(layout.table),
      ...this.#matrix(layout.head),
      norm,
      positions,
      rotary,
      capacity,
    ]);
    this.#ids = this.#allocate(4 * CHUNK);
    this.#places = this.#allocate(4 * CHUNK);
    this.#wanted = this.#allocate(4);
    this.#logits = this.#allocate(4 * layout.vocab_size);
    const sequences = this.#integers(new Array(CHUNK).fill(0));
    const cancelled = this.#integers([0]);
    const cache = [this.#allocate(keys), this.#allocate(values), 0, 0, layout.half_precision ? 1 : 0, 1, capacity, stride];
    this.#batch = this.#integers(
      [0, this.#ids, sequences, this.#places, ...cache, 1, this.#wanted, this.#logits, cancelled]);
    this.#exports.smolctl_heap(this.#next);
    this.#context = this.#exports.smolctl_create(model, CHUNK, this.#most);
    if (!this.#context) throw new RangeError(OUTCOMES[1]);
    for (let index = 1; index < this.#most; index++) this.#start(index);
    const end = performance.now() + HELPERS_MS;
    while (this.threads < this.#most && performance.now() < end) await new Promise((done) => setTimeout(done, 5));
  }

  /** Drop everything after the first `length` tokens. */
  truncate(length) {
    this.length = Math.min(length, this.length);
  }

  /**
   * Process at most `chunk` tokens, after those already processed.
   * @param {ArrayLike<number>} ids
   * @returns {Float32Array} logits of the next token, valid until the next call
   */
  forward(ids) {
    this.#give(ids);
    this.#run(0, this.#weights.layout.layers.length);
    return this.#took(ids);
  }

  /**
   * `forward` for a prompt with any number of tokens, in calls of about a tenth of a second.
   * @param {number[]} ids
   * @param {(done: number) => Promise<boolean>} proceed is awaited before each call, with the number of tokens
   *     processed; false stops the prompt, and `length` is then the number of processed tokens
   * @returns {Promise<Float32Array | null>} logits of the next token; null if it was stopped
   */
  async read(ids, proceed) {
    const last = this.#weights.layout.layers.length;
    let logits = null;
    for (let at = 0; at < ids.length; at += CHUNK) {
      const part = ids.slice(at, at + CHUNK);
      for (let layer = 0, most; layer < last; layer += most) {
        if (!(await proceed(at))) return null;
        if (!layer) this.#give(part);
        most = Math.min(Math.max(Math.floor(CALL_MS / (this.#pace * part.length || CALL_MS)), 1), last - layer);
        const began = performance.now();
        this.#run(layer, layer + most);
        this.#pace = (performance.now() - began) / (most * part.length);
      }
      logits = this.#took(part);
    }
    return logits;
  }

  /** Fill in the structure for the tokens of a call. */
  #give(ids) {
    const count = ids.length;
    if (!count || count > CHUNK) throw new RangeError(`${count} tokens in a call`);
    if (this.length + count > this.capacity) throw new RangeError("the context is full");
    const {vocab_size} = this.#weights.layout;
    for (const id of ids) if (!(id >= 0 && id < vocab_size)) throw new RangeError("a token is outside the vocabulary");
    this.#view(this.#ids, count).set(ids);
    this.#view(this.#places, count).forEach((_, at, places) => (places[at] = this.length + at));
    this.#view(this.#batch, 1)[0] = count;
    this.#view(this.#wanted, 1)[0] = count - 1;
  }

  /** Run some layers on them, and after the last layer the head. */
  #run(first, last) {
    this.#exports.smolctl_threads(this.#asked);
    this.#exports.smolctl_layers(this.#context, first, last);
    const outcome = this.#exports.smolctl_forward(this.#context, this.#batch);
    if (outcome) throw new RangeError(OUTCOMES[outcome]);
  }

  #took(ids) {
    this.length += ids.length;
    return new Float32Array(this.#memory.buffer, this.#logits, this.#weights.layout.vocab_size);
  }

  #view(at, count) {
    return new Int32Array(this.#memory.buffer, at, count);
  }

  #allocate(bytes) {
    const at = filled(this.#next, 64);
    this.#next = at + bytes;
    if (this.#next > this.memoryBytes) throw new RangeError(OUTCOMES[1]);
    return at;
  }

  #integers(values) {
    const at = this.#allocate(4 * values.length);
    this.#view(at, values.length).set(values);
    return at;
  }

  #matrix([kind, rows, columns, group, ...offsets]) {
    return [kind, rows, columns, group, ...offsets.map((offset) => offset && this.#base + offset)];
  }

  /** A part of a layer: a matrix, the address of a tensor as floats, or a plain number. */
  #part(part) {
    if (typeof part === "number") return [part];
    return part.length === 7 ? this.#matrix(part) : [this.#floats(part)];
  }

  /** The address of a tensor as floats. */
  #floats(tensor) {
    const width = tensor[7];
    const matrix = this.#matrix(tensor.slice(0, 7));
    if (matrix[0] === FLOAT32) return matrix[4];
    const at = this.#allocate(4 * (matrix[1] * width + BLOCK));
    this.#exports.smolctl_unpack(this.#integers(matrix), width, at);
    return at;
  }

  /** cos and sin of each position's angles, (2, positions, D / 2). */
  #rotary(frequencies, positions) {
    const count = frequencies.length;
    const at = this.#allocate(8 * positions * count);
    const table = new Float32Array(this.#memory.buffer, at, 2 * positions * count);
    for (let position = 0; position < positions; position++)
      frequencies.forEach((frequency, pair) => {
        const angle = Math.fround(position * frequency);
        table[position * count + pair] = Math.cos(angle);
        table[(positions + position) * count + pair] = Math.sin(angle);
      });
    return at;
  }
}

/** The bits of a number as float32. */
function bits(number) {
  return new Int32Array(Float32Array.of(number).buffer)[0];
}

/**
 * Create an engine whose weights have not been written yet.
 * @param {object} options
 * @param {WebAssembly.Module} options.module engine.wasm, or engine-threads.wasm for several threads
 * @param {object} options.weights content of weights.json
 * @param {number} options.positions tokens of context
 * @param {number} [options.threads]
 * @param {(memory: WebAssembly.Memory, module: WebAssembly.Module, index: number) => void} [options.startThread]
 *     makes another worker call `runThread`
 * @throws {RangeError} the browser does not have enough memory
 */
export async function createEngine({module, weights, positions, threads = 1, startThread}) {
  if (positions > weights.layout.max_positions) throw new RangeError("more positions than the model has");
  const needed = memoryNeeded(weights, positions, threads);
  if (needed > LIMIT) throw new RangeError("a page's memory is below 4 GiB");
  const pages = needed / PAGE;
  const memory = new WebAssembly.Memory({initial: pages, maximum: pages, shared: threads > 1});
  const {exports} = await WebAssembly.instantiate(module, {env: {memory}});
  if (exports.smolctl_interface() !== INTERFACE) throw new Error("engine.js and the compiled engine are of different versions");
  return new Engine(exports, memory, weights, positions, threads, (index) => startThread(memory, module, index));
}

/**
 * The work of a helper thread; it does not return before the worker ends.
 * @param {WebAssembly.Memory} memory
 * @param {WebAssembly.Module} module
 * @param {number} index
 */
export async function runThread(memory, module, index) {
  const {exports} = await WebAssembly.instantiate(module, {env: {memory}});
  exports.__stack_pointer.value = exports.smolctl_stack(index);
  exports.smolctl_help();
}
