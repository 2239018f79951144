/**
 * Text to token ids and back for byte-level BPE, with exactly the ids of the `tokenizers` library.
 *
 * A text passes through these steps: added tokens are found, the rest is normalized, divided into words, written
 * as UTF-8, and the tokens of neighbouring bytes are merged. What differs from tokenizer to tokenizer stands in
 * page.json, which was written by smolctl/page/tokenization.py; it refuses tokenizers that work otherwise.
 */

// What the Rust library calls whitespace and word characters. JavaScript's \s and \w are other sets.
const SPACE = /\p{White_Space}/u;
const LETTER = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;
// Stand-ins for the first characters of control tokens that messages spell, in a plane for private use.
const STAND_INS = 0xf0000;
const MOST_WORDS = 20_000; // that are remembered with their ids

// The character that byte-level BPE writes for each byte: bytes that Latin-1 prints stand for themselves, the
// others are counted up from U+0100.
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
 * @property {boolean} normalized it is looked for in the text after normalization
 * @property {boolean} single_word it is found only where no letter or digit touches it
 * @property {boolean} lstrip it takes the whitespace before it
 * @property {boolean} rstrip it takes the whitespace after it
 *
 * @typedef {object} TokenizerOptions `tokenizer` of page.json
 * @property {number[]} begin ids before every text that is encoded by itself
 * @property {number[]} end ids after it
 * @property {number[]} empty ids of an empty text
 * @property {?string} normalizer a form that `String.normalize` knows
 * @property {{prefix: boolean, words: ?string}[]} steps how a text is divided: a space is put before it, then
 *   every match of a regular expression is a word; each step divides the words of the one before
 * @property {string[]} control tokens that steer the model and that a message must not spell
 */
export class Tokenizer {
  #tokens = []; // by id, as the vocabulary spells it
  #special = new Set(); // ids that decoding leaves out
  #vocabulary; // token to id
  #byteIds; // by byte: the id of its token; undefined where there is none
  #ranks = new Map(); // a pair of ids as one number, to the rank of its merge
  #merged = []; // by rank: the id that the merge gives
  #wholeWords; // look a word up in the vocabulary before merging
  #known = new Map(); // word to ids
  #options;
  #steps;
  #plain; // what finds added tokens in texts
  #chat; // what finds them in conversations
  #control; // a regular expression that finds where a control token begins
  #standIns; // first character of a control token to its stand-in
  #characters; // and back

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
   * Ids of a text to continue, with the special tokens that it spells. Never empty where the tokenizer has a token
   * that begins texts.
   * @param {string} text
   * @returns {number[]}
   */
  encode(text) {
    const ids = [...this.#options.begin, ...this.#encode(text, this.#plain), ...this.#options.end];
    return ids.length ? ids : [...this.#options.empty];
  }

  /**
   * A message in which control tokens are not read as tokens: their first characters are replaced by stand-ins, which
   * `encodeConversation` reads as these characters.
   * @param {string} text
   * @returns {string}
   */
  hide(text) {
    return text.replace(this.#control, (character) => this.#standIns.get(character));
  }

  /**
   * Ids of a conversation that was written around messages from `hide`; nothing is put around it.
   * @param {string} text
   * @returns {number[]}
   */
  encodeConversation(text) {
    const show = (part) => part.replace(/[\u{f0000}-\u{ffffd}]/gu, (one) => this.#characters.get(one) ?? one);
    return show(text) === text ? this.#encode(text, this.#plain) : this.#encode(text, this.#chat, show);
  }

  /**
   * A decoder that is fed ids one by one and never shows half a character. Special tokens are left out.
   * @returns {{feed: (id: number) => string, finish: () => string}} `feed` gives the text that can be shown now;
   *   `finish` what is left when no more ids come: U+FFFD for a character that was never completed
   */
  stream() {
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      feed: (id) => (this.#special.has(id) ? "" : utf8.decode(this.#bytes(id), { stream: true })),
      finish: () => utf8.decode(),
    };
  }

  /**
   * What to show for a single id: its text, or its bytes as `\xE2\x96` where they are only a part of a character.
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

  /** The bytes that an id stands for, an added token by its name; none when there is no such id. */
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
    // As in the library, a byte that has no token vanishes, and its neighbours may merge.
    return this.#merge(Array.from(bytes, (byte) => this.#byteIds[byte]).filter((id) => id !== undefined));
  }

  /**
   * Merge the pair of the lowest rank, of equal ones the leftmost, until no pair is left that merges. `ids` is
   * changed. A merged pair keeps the place of its left part; `next` and `previous` link the places in use.
   */
  #merge(ids) {
    const length = ids.length;
    const next = Int32Array.from(ids, (_, place) => place + 1);
    const previous = Int32Array.from(ids, (_, place) => place - 1);
    const rankAt = (place) => {
      const right = next[place];
      return right < length ? this.#ranks.get(this.#pair(ids[place], ids[right])) : undefined;
    };
    // A rank and a place as one number, which orders them.
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
      if (ids[place] < 0 || rankAt(place) !== rank) continue; // merged otherwise meanwhile
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
    return left * 0x1000000 + right; // as smolctl's MAX_VOCABULARY
  }
}

/** A binary heap of numbers: `pop` gives the least. */
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

/** A regular expression that finds tokens in a text, of several at one place the longest. */
function anyOf(tokens) {
  const longest = tokens.filter(Boolean).sort((one, other) => other.length - one.length);
  return longest.map((token) => token.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")).join("|") || "(?!)";
}

/** What `split` needs to find added tokens, whose content is `spelled` in the text. */
function finder(added, spelled = (content) => content) {
  const tokens = new Map(added.map((token) => [spelled(token.content), token]));
  return { tokens, pattern: new RegExp(anyOf([...tokens.keys()]), "gu") };
}

/** Parts of a text: the ids of added tokens that are found in it, and the texts between them. */
function* split(text, { tokens, pattern }) {
  let start = 0;
  for (const { 0: content, index } of text.matchAll(pattern)) {
    const { id, single_word: alone, lstrip, rstrip } = tokens.get(content);
    let from = index;
    let to = index + content.length;
    // A character has two units at most. ($ in place of `at` misses some of two units in V8.)
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
