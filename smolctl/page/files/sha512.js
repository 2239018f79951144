/** SHA-512 (FIPS 180-4), which browsers offer only over https. Seeds are derived with it, as in Python. */

const MASK = (1n << 64n) - 1n;
const PRIMES = [];
for (let number = 2; PRIMES.length < 80; number++) if (PRIMES.every((prime) => number % prime)) PRIMES.push(number);

/** The first 64 bits of a root's fractional part. */
function fraction(number, degree) {
  const wanted = BigInt(number) << (64n * degree);
  let root = 0n;
  for (let bit = 1n << 69n; bit; bit >>= 1n) if ((root | bit) ** degree <= wanted) root |= bit;
  return root & MASK;
}

const START = PRIMES.slice(0, 8).map((prime) => fraction(prime, 2n));
const ROUNDS = PRIMES.map((prime) => fraction(prime, 3n));

const turned = (word, by) => (word >> by) | ((word << (64n - by)) & MASK);

/** @param {Uint8Array} bytes @returns {Uint8Array} 64 bytes */
export function sha512(bytes) {
  const padded = new Uint8Array(Math.ceil((bytes.length + 17) / 128) * 128);
  padded.set(bytes);
  padded[bytes.length] = 0x80;
  const view = new DataView(padded.buffer);
  view.setBigUint64(padded.length - 8, BigInt(bytes.length) * 8n);
  const state = [...START];
  for (let block = 0; block < padded.length; block += 128) {
    const words = Array.from({ length: 16 }, (_, at) => view.getBigUint64(block + 8 * at));
    for (let at = 16; at < 80; at++) {
      const [early, late] = [words[at - 15], words[at - 2]];
      const first = turned(early, 1n) ^ turned(early, 8n) ^ (early >> 7n);
      const second = turned(late, 19n) ^ turned(late, 61n) ^ (late >> 6n);
      words.push((words[at - 16] + first + words[at - 7] + second) & MASK);
    }
    let [a, b, c, d, e, f, g, h] = state;
    words.forEach((word, at) => {
      const mixed = turned(e, 14n) ^ turned(e, 18n) ^ turned(e, 41n);
      const one = h + mixed + ((e & f) ^ (~e & g)) + ROUNDS[at] + word;
      const two = (turned(a, 28n) ^ turned(a, 34n) ^ turned(a, 39n)) + ((a & b) ^ (a & c) ^ (b & c));
      [a, b, c, d, e, f, g, h] = [(one + two) & MASK, a, b, c, (d + one) & MASK, e, f, g];
    });
    [a, b, c, d, e, f, g, h].forEach((word, at) => (state[at] = (state[at] + word) & MASK));
  }
  const digest = new DataView(new ArrayBuffer(64));
  state.forEach((word, at) => digest.setBigUint64(8 * at, word));
  return new Uint8Array(digest.buffer);
}
