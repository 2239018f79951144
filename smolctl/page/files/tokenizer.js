/**
 * Text to token ids and back for byte-level BPE, with exactly the ids of the `tokenizers` library.
 *
 * The steps: added tokens are found; the rest of the text is normalized, divided into words, and encoded as
 * UTF-8; and the tokens of adjacent bytes are merged. The properties of each tokenizer are in page.json, written
 * by smolctl/page/tokenization.py, which refuses tokenizers that work differently.
 */

// Whitespace and word characters of the Rust library. JavaScript's \s and \w are different sets.
const SPACE = /\p{White_Space}/u;
const LETTER = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;
// Placeholders for the first characters of control tokens spelled in messages, in a private-use plane.
const STAND_INS = 0xf0000;
const MOST_WORDS = 20_000; // number of words that are cached with their ids

// The character with which byte-level BPE represents each byte: bytes printable in Latin-1 represent themselves, the
// others are numbered from U+0100.
const CHARACTERS = [];
for (let byte = 0, other = 0x100; byte < 256; byte++) {
  const printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  CHARACTERS.push(String.fromCharCode(printable ? byte : other++));
}
const BYTES = new Map(CHARACTERS.map((character, byte) => [character, byte]));
const UTF8 = new TextEncoder();

/**
 * @typedef {object} AddedToken an entry of `added_tokens` in tokenizer.json
 * @property {number} id
 * @property {string} content
 * @property {boolean} special
 * @property {boolean} normalized it is matched in the text after normalization
 * @property {boolean} single_word it is matched only if no letter or digit is next to it
 * @property {boolean} lstrip it includes the whitespace before it
 * @property {boolean} rstrip it includes the whitespace after it
 *
 * @typedef {object} TokenizerOptions `tokenizer` of page.json
 * @property {number[]} begin ids before every separately encoded text
 * @property {number[]} end ids after it
 * @property {number[]} empty ids of an empty text
 * @property {?string} normalizer a form of `String.normalize`
 * @property {{prefix: boolean, words: ?string}[]} steps how a text is divided: optionally a space is added before it,
 *     then every match of a regular expression is a word; each step divides the words of the previous one
 * @property {string[]} control tokens that control the model and must not be spelled in messages
 */
export class Tokenizer {
  #tokens = []; // by id, as in the vocabulary
  #special = new Set(); // ids that decoding omits
  #vocabulary; // token to id
  #byteIds; // by byte: the id of its token, if there is one
  #ranks = new Map(); // rank of a merge by its pair of ids, encoded as one number
  #merged = []; // by rank: the resulting id
  #wholeWords; // look a word up in the vocabulary before merging
  #known = new Map(); // word to ids
  #options;
  #steps;
  #plain; // finds added tokens in texts
  #chat; // finds them in conversations
  #control; // a regular expression for the start of a control token
  #standIns; // placeholders by the first characters of control tokens
  #characters; // the inverse

  /**
   * @param {object} json content of tokenizer.json
   * @param {TokenizerOptions} options
   */
  constructor(json, options) {
    const { vocab, merges, ignore_merges: wholeWords } = json.model;
    const added = json.added_tokens ?? [];
    this.#options = options;
    this.#vocabulary = new Map(Object.entries(vocab));
    for (const [token, id] of this.#vocabulary) this.#tokens[id] = token;
    this.#byteIds = CHARACTERS.map((character) => this.#vocabulary.get(character));
    for (const [rank, merge] of merges.entries()) {
      const [left, right] = typeof merge === "string" ? merge.split(" ") : merge;
      this.#ranks.set(this.#pair(this.#vocabulary.get(left), this.#vocabulary.get(right)), rank);
      this.#merged.push(this.#vocabulary.get(left + right));
    }
    this.#wholeWords = Boolean(wholeWords);
    for (const { id, content, special } of added) {
      this.#tokens[id] = content;
      if (!special) continue;
      this.#special.add(id);
      this.#vocabulary.delete(content); // no word of a text is a special token
    }
    this.#steps = options.steps.map(({ prefix, words }) => ({ prefix, words: words && new RegExp(words, "gu") }));

    const control = new Set(options.control);
    const finders = (isRaw) => ({
      raw: finder(added.filter(isRaw)),
      normalized: finder(added.filter((token) => !isRaw(token)), (text) => this.#normalize(text)),
    });
    this.#plain = finders((token) => !token.normalized);
    this.#chat = finders((token) => !token.normalized || control.has(token.content));
    this.#control = new RegExp(`(?=${anyOf(options.control)}).`, "gsu");
    const first = [...new Set(options.control.map((token) => String.fromCodePoint(token.codePointAt(0))))].sort();
    const pairs = first.map((character, number) => [character, String.fromCodePoint(STAND_INS + number)]);
    this.#standIns = new Map(pairs);
    this.#characters = new Map(pairs.map(([character, standIn]) => [standIn, character]));
  }

  /**
   * Ids of a text to continue, including special tokens spelled in it. Never empty if the tokenizer has a token
   * that starts texts.
   * @param {string} text
   * @returns {number[]}
   */
  encode(text) {
    const ids = [...this.#options.begin, ...this.#encode(text, this.#plain), ...this.#options.end];
    return ids.length ? ids : [...this.#options.empty];
  }

  /**
   * A message whose control tokens are not read as tokens: their first characters are replaced by placeholders, which
   * `encodeConversation` reads as the original characters.
   * @param {string} text
   * @returns {string}
   */
  hide(text) {
    return text.replace(this.#control, (character) => this.#standIns.get(character));
  }

  /**
   * Ids of a conversation that was rendered from messages of `hide`, without tokens around it.
   * @param {string} text
   * @returns {number[]}
   */
  encodeConversation(text) {
    const show = (part) => part.replace(/[\u{f0000}-\u{ffffd}]/gu, (one) => this.#characters.get(one) ?? one);
    return show(text) === text ? this.#encode(text, this.#plain) : this.#encode(text, this.#chat, show);
  }

  /**
   * An incremental decoder, which never returns part of a character. Special tokens are omitted.
   * @returns {{feed: (id: number) => string, finish: () => string}} `feed` returns the complete text so far;
   *     `finish` the rest after the last id: U+FFFD for an incomplete character
   */
  stream() {
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      feed: (id) => (this.#special.has(id) ? "" : utf8.decode(this.#bytes(id), { stream: true })),
      finish: () => utf8.decode(),
    };
  }

  /**
   * The displayed text of a single id; bytes that are only part of a character as `\xE2\x96`.
   * @param {number} id
   * @returns {string}
   */
  spell(id) {
    const bytes = this.#bytes(id);
    try {
      return new TextDecoder("utf-8", { ignoreBOM: true, fatal: true }).decode(bytes);
    } catch {
      return Array.from(bytes, (byte) => `\\x${byte.toString(16).toUpperCase().padStart(2, "0")}`).join("");
    }
  }

  /** The bytes of an id, for an added token its name; empty if there is no such id. */
  #bytes(id) {
    const token = this.#tokens[id] ?? "";
    const bytes = Array.from(token, (character) => BYTES.get(character));
    return bytes.includes(undefined) ? UTF8.encode(token) : Uint8Array.from(bytes);
  }

  #normalize(text) {
    return this.#options.normalizer ? text.normalize(this.#options.normalizer) : text;
  }

  #encode(text, finders, show = (part) => part) {
    const ids = [];
    for (const part of split(text, finders.raw)) {
      if (typeof part === "number") {
        ids.push(part);
        continue;
      }
      for (const piece of split(this.#normalize(show(part)), finders.normalized)) {
        if (typeof piece === "number") ids.push(piece);
        else for (const word of this.#words(piece)) for (const id of this.#idsOfWord(word)) ids.push(id);
      }
    }
    return ids;
  }

  #words(text) {
    let words = [text];
    for (const step of this.#steps) {
      if (step.prefix) words = words.map((word) => (word.startsWith(" ") ? word : ` ${word}`));
      if (step.words) words = words.flatMap((word) => word.match(step.words) ?? []);
    }
    return words;
  }

  #idsOfWord(word) {
    let ids = this.#known.get(word);
    if (ids === undefined) {
      ids = this.#lookUp(UTF8.encode(word));
      if (this.#known.size >= MOST_WORDS) this.#known.clear();
      this.#known.set(word, ids);
    }
    return ids;
  }

  #lookUp(bytes) {
    if (this.#wholeWords) {
      const id = this.#vocabulary.get(Array.from(bytes, (byte) => CHARACTERS[byte]).join(""));
      if (id !== undefined) return [id];
    }
    // As in the library, a byte without a token is dropped, and its neighbours may merge.
    return this.#merge(Array.from(bytes, (byte) => this.#byteIds[byte]).filter((id) => id !== undefined));
  }

  /**
   * Merge the pair with the lowest rank, of equal ones the leftmost, until no pair can be merged. `ids` is
   * changed. A merged pair keeps the place of its left part; `next` and `previous` link the used places.
   */
  #merge(ids) {
    const length = ids.length;
    const next = Int32Array.from(ids, (_, place) => place + 1);
    const previous = Int32Array.from(ids, (_, place) => place - 1);
    const rankAt = (place) => {
      const right = next[place];
      return right < length ? this.#ranks.get(this.#pair(ids[place], ids[right])) : undefined;
    };
    // Rank and place as one number, which sorts them.
    const waiting = new Heap();
    const enqueue = (place) => {
      const rank = rankAt(place);
      if (rank !== undefined) waiting.push(rank * length + place);
    };
    for (let place = 0; place < length; place++) enqueue(place);
    while (waiting.size) {
      const entry = waiting.pop();
      const place = entry % length;
      const rank = (entry - place) / length;
      if (ids[place] < 0 || rankAt(place) !== rank) continue; // already merged with another token
      const right = next[place];
      ids[place] = this.#merged[rank];
      ids[right] = -1;
      next[place] = next[right];
      if (next[place] < length) previous[next[place]] = place;
      if (previous[place] >= 0) enqueue(previous[place]);
      enqueue(place);
    }
    return ids.filter((id) => id >= 0);
  }

  #pair(left, right) {
    return left * 0x1000000 + right; // like smolctl's MAX_VOCABULARY
  }
}

/** A binary heap of numbers: `pop` returns the smallest. */
class Heap {
  #items = [];

  get size() {
    return this.#items.length;
  }

  push(item) {
    const items = this.#items;
    let at = items.length;
    for (let up; at && items[(up = (at - 1) >> 1)] > item; at = up) items[at] = items[up];
    items[at] = item;
  }

  pop() {
    const items = this.#items;
    const least = items[0];
    const item = items.pop();
    const size = items.length;
    if (!size) return least;
    let at = 0;
    for (let down; (down = 2 * at + 1) < size; at = down) {
      if (down + 1 < size && items[down + 1] < items[down]) down++;
      if (items[down] >= item) break;
      items[at] = items[down];
    }
    items[at] = item;
    return least;
  }
}

/** A regular expression that finds tokens in a text, at each place the longest. */
function anyOf(tokens) {
  const longest = tokens.filter(Boolean).sort((one, other) => other.length - one.length);
  return longest.map((token) => token.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")).join("|") || "(?!)";
}

/** The arguments of `split` for added tokens whose content is `spelled` in the text. */
function finder(added, spelled = (content) => content) {
  const tokens = new Map(added.map((token) => [spelled(token.content), token]));
  return { tokens, pattern: new RegExp(anyOf([...tokens.keys()]), "gu") };
}

/** The parts of a text: ids of added tokens, and the texts between them. */
function* split(text, { tokens, pattern }) {
  let start = 0;
  for (const { 0: content, index } of text.matchAll(pattern)) {
    const { id, single_word: alone, lstrip, rstrip } = tokens.get(content);
    let from = index;
    let to = index + content.length;
    // A character has at most two units. ($ instead of `at` misses some of two units in V8.)
    const before = [...text.slice(Math.max(0, from - 2), from)].at(-1) ?? "";
    if (alone && (LETTER.test(before) || LETTER.test(text.slice(to, to + 2)))) continue;
    while (lstrip && from > start && SPACE.test(text[from - 1])) from--;
    while (rstrip && to < text.length && SPACE.test(text[to])) to++;
    if (from > start) yield text.slice(start, from);
    yield id;
    start = to;
  }
  if (start < text.length) yield text.slice(start);
}
