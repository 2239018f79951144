// Integer matmuls: packed rows of weights times quantized activations.
//
// Each block of an activation vector is quantized to 16-bit integers with its own scale, so its integer dot product
// with a block of weights is exact. 8 bits would not do: a few channels of these networks are a hundred times as
// large as their neighbours, which would lose their precision to the largest one.
//
// Lane b % LANES of a float accumulator adds up blocks b, b + LANES, …, and `sum_four` reduces the lanes. Both
// kernels keep to that order, so a vector gets the same bits alone and in any batch:
// - For a few vectors, rows are read from memory one at a time: hardware prefetchers reach the memory's full
//   bandwidth with one stream, but only a third of it even with two interleaved ones (measured on Zen 4).
// - More vectors share OPENED_ROWS rows that are unpacked into the CPU cache, interleaved: every lane is a row.
//
// A block of two groups has two parts with a scale each, any other block has one: `parts` below.
#pragma once

#include "matrix.h"

typedef int16_t words __attribute__((vector_size(4 * LANES)));
typedef int8_t half_words __attribute__((vector_size(2 * LANES)));
typedef int8_t digits __attribute__((vector_size(4 * LANES)));
typedef uint8_t udigits __attribute__((vector_size(4 * LANES)));

#define WORDS (2 * LANES)         // in a SIMD vector
#define DIGIT_BLOCKS (LANES / 4)  // blocks whose packed nibbles fill a SIMD vector
#define LARGEST 32639             // 127 × 256 + 127: two signed digits of 8 bits
#define PAIR 2                    // activation vectors that share each row read from memory
#define TOGETHER 4                // activation vectors that share each load of unpacked rows

// a[0] × b[0] + a[1] × b[1], a[2] × b[2] + a[3] × b[3], …
INLINE ivec multiply_words(words a, words b) {
#if defined(__AVX512BW__)
    return (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (ivec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__wasm__)
    return (ivec)wasm_i32x4_dot_i16x8((v128_t)a, (v128_t)b);
#else
    typedef int32_t wide __attribute__((vector_size(8 * LANES)));
    wide products = __builtin_convertvector(a, wide) * __builtin_convertvector(b, wide);
    return __builtin_shufflevector(products, products, 0, 2, 4, 6) + __builtin_shufflevector(products, products, 1, 3, 5, 7);
#endif
}

// CPUs with 4-byte dot products multiply the weights' bytes with the high and the low 8-bit digits of activations.
// On x86 one operand is unsigned: BIAS is added to signed weights, and `biases` subtract it from the result.
#if defined(__AVX512VNNI__)
#define HAS_DIGITS 1
#define BIAS 128
INLINE ivec add_fours(ivec total, udigits a, digits b) {
    return (ivec)_mm512_dpbusd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define HAS_DIGITS 1
#define BIAS 0
INLINE ivec add_fours(ivec total, udigits a, digits b) { return (ivec)vdotq_s32((int32x4_t)total, (int8x16_t)a, (int8x16_t)b); }
#else
#define HAS_DIGITS 0
#define BIAS 0
INLINE ivec add_fours(ivec total, udigits a, digits b) { return (void)a, (void)b, total; }
#endif

// I8MM multiplies 8 bytes of two rows with two other rows: here, two rows of weights with both digits of activations.
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define HAS_EIGHTS 1
INLINE ivec add_eights(ivec total, ivec a, ivec b) { return (ivec)vmmlaq_s32((int32x4_t)total, (int8x16_t)a, (int8x16_t)b); }
#else
#define HAS_EIGHTS 0
#endif

// ---- quantizing an activation vector ----

typedef struct {
    const int16_t *words;  // (columns): integers up to LARGEST (HAS_EIGHTS: digits, see `digits_at`)
    const int8_t *digits;  // the same integers as digits, see `digits_at`
    const float *scales;   // (columns / BLOCK, zero-padded to a multiple of 16)
    // As many as scales, for whole blocks, their first halves and their second halves, see `form_of`:
    const float *sums[3];     // of the activations, to be multiplied with offsets
    const int32_t *biases[3]; // minus what BIAS adds to the dot product with INT8 weights
} integers;

#define INTEGER_ROOM(columns) (2 * (columns) + 160)  // size in floats

// Every DIGIT_BLOCKS blocks store their digits together: the high digits of the blocks' first halves, those of their
// second halves, then the low digits in the same order. HAS_EIGHTS: `words` alternates 8 high and 8 low digits.
INLINE size_t digits_at(int block) { return (size_t)(block / DIGIT_BLOCKS) * (16 * LANES) + (size_t)(block % DIGIT_BLOCKS) * 16; }

// Index into `sums` and `biases` for a part of a block.
INLINE int form_of(int parts, int part) { return parts - 1 + part; }

static integers prepare_integers(const float *x, int columns, float *room) {
    int blocks = columns / BLOCK, padded = (blocks + 15) / 16 * 16;
    float *scales = room, *sums = room + padded;
    int32_t *biases = (int32_t *)(sums + 3 * padded);
    int8_t *bytes = (int8_t *)(biases + 3 * padded);
    int16_t *values = (int16_t *)(bytes + (size_t)(blocks + 3) / 4 * 256);
    memset(room, 0, 7 * sizeof(float) * (size_t)padded);
    if (HAS_DIGITS) memset(bytes + (size_t)(blocks / 4) * 256, 0, 256 * (blocks % 4 > 0));
    for (int block = 0; block < blocks; block++) {
        const float *from = x + block * BLOCK;
        int16_t *to = values + block * BLOCK;
        vec totals[2] = {{0}}, most = {0};
        for (int part = 0; part < PARTS; part++) {
            vec v = load(from + part * LANES);
            totals[part * LANES / HALF_BLOCK] += v;
            most = maximum(most, maximum(v, -v));
        }
        float largest = highest(most), units = largest > 1e-30f ? LARGEST / largest : 0;
        float parts[4];
        sum_four((vec[4]){totals[0] + totals[1], totals[0], totals[1], all(0)}, parts);
        for (int i = 0; i < 3; i++) sums[i * padded + block] = parts[i];
        scales[block] = (largest + 0 * parts[0]) / LARGEST;  // NaN if a value is NaN or infinite
        for (int part = 0; part < PARTS; part++) {
            const float magic = 12582912.0f;  // rounds, see `exponential`
            vec rounded = load(from + part * LANES) * units + magic - magic;
            STORE(to + part * LANES, __builtin_convertvector(rounded, shorts_vec));
        }
        if (!HAS_DIGITS) continue;
        typedef int16_t values_of_half __attribute__((vector_size(2 * HALF_BLOCK)));
        typedef int8_t digits_of_half __attribute__((vector_size(HALF_BLOCK)));
        for (int half = 0; half < 2; half++) {
            int8_t *at = bytes + digits_at(block) + half * 4 * LANES;
            values_of_half value = LOAD(values_of_half, to + half * HALF_BLOCK), high = (value + 128) >> 8;
            digits_of_half highs = __builtin_convertvector(high, digits_of_half);
            digits_of_half lows = __builtin_convertvector(value - (high << 8), digits_of_half);
            STORE(at, highs);
            STORE(at + 8 * LANES, lows);
#if HAS_EIGHTS
            typedef int64_t eights __attribute__((vector_size(16)));
            STORE(to + half * HALF_BLOCK, __builtin_shufflevector((eights)highs, (eights)lows, 0, 2));
            STORE(to + half * HALF_BLOCK + 8, __builtin_shufflevector((eights)highs, (eights)lows, 1, 3));
#endif
            int total = 0;
            for (int i = 0; i < HALF_BLOCK; i++) total += value[i];
            biases[(1 + half) * padded + block] = -BIAS * total;
        }
        biases[block] = biases[padded + block] + biases[2 * padded + block];
    }
    return (integers){values, bytes, scales, {sums, sums + padded, sums + 2 * padded},
                      {biases, biases + padded, biases + 2 * padded}};
}

// ---- unpacking rows of weights ----

typedef struct {
    int kind, parts;
    int rows, blocks, groups, blocks_a_group;
    const uint8_t *values;
    const half *scales, *offsets;
} packing;

INLINE packing packing_of(const matrix *m) {
    int parts = m->group < BLOCK ? 2 : 1;
    return (packing){m->kind, parts, m->rows, m->columns / BLOCK, groups_of(m), parts * m->group / BLOCK, m->values, m->scales, m->offsets};
}

INLINE const uint8_t *block_of(int kind, const packing *p, int row, int block) {
    return p->values + ((size_t)row * (size_t)p->blocks + (size_t)block) * (kind == INT8 ? 32 : kind == INT4 ? 16 : 20);
}

// Scales or offsets of one part of LANES blocks of a row from block `first` on; zeros past the last block.
INLINE vec widen(const half *from, int parts, int part, const packing *p, int row, int first) {
    int count = least(p->blocks - first, LANES);
    size_t at = (size_t)row * (size_t)p->groups;
    if (p->blocks_a_group == 1 && at + (size_t)(parts * (first + LANES)) <= (size_t)p->rows * (size_t)p->groups) {
        ivec lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        vec wide;  // may include values of the next rows
        if (parts == 2) {
            halves_vec own = __builtin_convertvector(LOAD(uvec, from + at + 2 * first) >> 16 * part, halves_vec);
            wide = from_half((const half *)&own);
        } else wide = from_half(from + at + first);
        return count == LANES ? wide : choose(lane < count, wide, all(0));
    }
    float to[LANES] = {0};
    int group = parts * (first / p->blocks_a_group) + part, left = p->blocks_a_group - first % p->blocks_a_group;
    for (int i = 0; i < count; i++) {
        to[i] = half_to_float(&from[at + group]);
        if (!--left) group += parts, left = p->blocks_a_group;
    }
    return load(to);
}

// Unpack a block to 16-bit integers, in the order of its columns.
INLINE void open_words(int kind, const uint8_t *block, words to[BLOCK / WORDS]) {
    if (kind == INT8) {
        for (int p = 0; p < BLOCK / WORDS; p++)
            to[p] = __builtin_convertvector(LOAD(half_words, block + p * WORDS), words);
    } else {
        typedef uint8_t packed __attribute__((vector_size(HALF_BLOCK)));
        typedef int16_t opened __attribute__((vector_size(2 * HALF_BLOCK)));
        opened both = __builtin_convertvector(LOAD(packed, block + (kind == INT5 ? 4 : 0)), opened), halves[2] = {both & 15, both >> 4};
        for (int i = 0; i < 2 && kind == INT5; i++) halves[i] |= SPREAD(opened, HALF_BLOCK, LOAD(int16_t, block + 2 * i)) & 16;
        memcpy(to, halves, sizeof halves);
    }
}

INLINE ivec all_of(const void *from) { return LOAD(int32_t, from) - (ivec){0}; }

// 16 for each value of a half block whose fifth bit is set. `bits` repeats a block's 32 fifth bits in every four bytes.
INLINE udigits fifths_of(udigits bits, int half) {
#if LANES == 16 && HAS_DIGITS
    const long long ones = 0x0101010101010101;
    __m512i own = _mm512_shuffle_epi8((__m512i)bits, _mm512_add_epi8(_mm512_set_epi64(ones, 0, ones, 0, ones, 0, ones, 0), _mm512_set1_epi8((char)(2 * half))));
    return (udigits)_mm512_maskz_set1_epi8(_mm512_test_epi8_mask(own, _mm512_set1_epi64((long long)0x8040201008040201)), 16);
#else
    udigits own, each;
    for (int i = 0; i < 4 * LANES; i++) own[i] = bits[i / 16 * 16 + half * 2 + i % 16 / 8], each[i] = (uint8_t)(1 << i % 8);
    return (udigits)((own & each) == each) & 16;
#endif
}

// Unpack DIGIT_BLOCKS blocks from `block` on to bytes, with zeros past the last block: their first halves to to[0],
// their second halves to to[1].
INLINE void open_digits(int kind, const packing *p, int row, int block, udigits to[2]) {
    const uint8_t *from = block_of(kind, p, row, block);
    udigits one, bits = {0};
#if LANES == 16 && HAS_DIGITS
    int left = least(p->blocks - block, 4), count = left * (kind == INT8 ? 8 : kind == INT4 ? 4 : 5);  // 32-bit words
#define LOAD_32S(at) \
    (left < 4 ? _mm512_maskz_loadu_epi32((__mmask16)(((1u << count) - 1) >> (at) / 4), from + (at)) : _mm512_loadu_si512(from + (at)))
    __m512i first = LOAD_32S(0);
    one = (udigits)first;
    if (kind == INT8) {
        __m512i other = LOAD_32S(64);
        const __m512i firsts = _mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0), seconds = _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2);
        to[0] = (udigits)_mm512_permutex2var_epi64(first, firsts, other) ^ BIAS;
        to[1] = (udigits)_mm512_permutex2var_epi64(first, seconds, other) ^ BIAS;
        return;
    }
    if (kind == INT5) {
        const __m512i repeated = _mm512_set_epi32(15, 15, 15, 15, 10, 10, 10, 10, 5, 5, 5, 5, 0, 0, 0, 0);
        const __m512i nibbles = _mm512_set_epi32(19, 18, 17, 16, 14, 13, 12, 11, 9, 8, 7, 6, 4, 3, 2, 1);
        bits = (udigits)_mm512_permutexvar_epi32(repeated, first);
        one = (udigits)_mm512_permutex2var_epi32(first, nibbles, _mm512_maskz_loadu_epi32((__mmask16)(left < 4 ? 0 : 15), from + 64));
    }
#undef LOAD_32S
#else
    one = LOAD(udigits, from + (kind == INT5 ? 4 : 0));
    if (kind == INT8) {
        to[0] = one, to[1] = LOAD(udigits, from + HALF_BLOCK);
        return;
    }
    if (kind == INT5) bits = (udigits)all_of(from);
#endif
    to[0] = one & 15, to[1] = one >> 4;
    for (int half = 0; half < 2 && kind == INT5; half++) to[half] |= fifths_of(bits, half);
}

// ---- a few vectors (GEMV): one row at a time ----

// Sum every four lanes of four vectors: lane 4 × i + j is the sum of the i-th four lanes of v[j].
INLINE ivec add_quads(const ivec v[4]) {
    ivec ab = FIRST(v[0], v[1]) + LAST(v[0], v[1]), cd = FIRST(v[2], v[3]) + LAST(v[2], v[3]);
    return FIRST_PAIRS(ab, cd) + LAST_PAIRS(ab, cd);
}

// Finish the horizontal sums of LANES vectors that `add_quads` began, four at a time: lane i is the sum of vector i.
INLINE ivec add_lanes(const ivec fours[LANES / 4]) {
#if LANES == 16
    ivec ab = EVEN_FOURS(fours[0], fours[1]) + ODD_FOURS(fours[0], fours[1]);
    ivec cd = EVEN_FOURS(fours[2], fours[3]) + ODD_FOURS(fours[2], fours[3]);
    return EVEN_FOURS(ab, cd) + ODD_FOURS(ab, cd);
#elif LANES == 8
    return EVEN_FOURS(fours[0], fours[1]) + ODD_FOURS(fours[0], fours[1]);
#else
    return fours[0];
#endif
}

// Zero the lanes of 16-bit products that belong to the other part of the block, if it has two.
INLINE ivec in_part(int parts, int part, int vector, ivec products) {
    ivec own;
    for (int i = 0; i < LANES; i++) own[i] = -(parts == 1 || (vector * WORDS + 2 * i) / HALF_BLOCK == part);
    return products & own;
}

// Integer dot products of `count` blocks of a row with each vector, one result per part: block first + i in lane i.
INLINE void multiply_blocks(int kind, int parts, int tokens, const packing *p, int row, int first, int count,
                            const integers *x, ivec out[][2]) {
    if (HAS_DIGITS) {
        ivec sums[PAIR][2][4] = {0};
#pragma clang loop unroll(full)
        for (int i = 0; i < 4; i++) {
            int block = first + i * DIGIT_BLOCKS;
            if (i * DIGIT_BLOCKS >= count && LANES > 4) break;
            if (i * DIGIT_BLOCKS >= count) continue;  // 4 lanes: clang does not unroll a loop with a second exit
            udigits w[2];
            open_digits(kind, p, row, block, w);
            for (int t = 0; t < tokens; t++) {
                const digits *v = (const digits *)(x[t].digits + digits_at(block));
                ivec upper[2] = {{0}}, lower[2] = {{0}};
                for (int half = 0; half < 2; half++) {
                    upper[half * (parts - 1)] = add_fours(upper[half * (parts - 1)], w[half], v[half]);
                    lower[half * (parts - 1)] = add_fours(lower[half * (parts - 1)], w[half], v[2 + half]);
                }
                for (int part = 0; part < parts; part++) sums[t][part][i] = (upper[part] << 8) + lower[part];
            }
        }
        for (int t = 0; t < tokens; t++)
            for (int part = 0; part < parts; part++) {
                ivec own = add_quads(sums[t][part]);
#if LANES == 16
                own = __builtin_shufflevector(own, own, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#endif
                if (BIAS && kind == INT8) own += LOAD(ivec, x[t].biases[form_of(parts, part)] + first);
                out[t][part] = own;
            }
        return;
    }
    ivec fours[PAIR][2][LANES / 4] = {0};
#pragma clang loop unroll(full)
    for (int four = 0; four < LANES / 4; four++) {
        if (4 * four >= count) break;
        ivec sums[PAIR][2][4] = {0};
#pragma clang loop unroll(full)
        for (int i = 0; i < 4; i++) {
            int block = first + 4 * four + i;
            if (4 * four + i >= count) break;
            words w[BLOCK / WORDS];
            open_words(kind, block_of(kind, p, row, block), w);
            for (int t = 0; t < tokens; t++)
                for (int vector = 0; vector < BLOCK / WORDS; vector++) {
                    ivec products = multiply_words(w[vector], LOAD(words, x[t].words + block * BLOCK + vector * WORDS));
                    for (int part = 0; part < parts; part++) sums[t][part][i] += in_part(parts, part, vector, products);
                }
        }
        for (int t = 0; t < tokens; t++)
            for (int part = 0; part < parts; part++) fours[t][part][four] = add_quads(sums[t][part]);
    }
    for (int t = 0; t < tokens; t++)
        for (int part = 0; part < parts; part++) out[t][part] = add_lanes(fours[t][part]);
}

INLINE void add_blocks(int kind, int parts, int tokens, const packing *p, int row, int first, int count, const integers *x,
                       vec total[]) {
    ivec products[PAIR][2];
    multiply_blocks(kind, parts, tokens, p, row, first, count, x, products);
    for (int part = 0; part < parts; part++) {
        vec scale = widen(p->scales, parts, part, p, row, first);
        vec offset = kind == INT8 ? all(0) : widen(p->offsets, parts, part, p, row, first);
        for (int t = 0; t < tokens; t++) {
            if (kind != INT8) total[t] += offset * load(x[t].sums[form_of(parts, part)] + first);
            total[t] += __builtin_convertvector(products[t][part], vec) * (scale * load(x[t].scales + first));
        }
    }
}

INLINE void direct_row(int kind, int parts, int tokens, const packing *p, int row, const integers *x, vec total[]) {
    int first = 0;
    for (int t = 0; t < tokens; t++) total[t] = all(0);
    for (; first + LANES <= p->blocks; first += LANES) add_blocks(kind, parts, tokens, p, row, first, LANES, x, total);
    if (p->blocks - first > 4) add_blocks(kind, parts, tokens, p, row, first, p->blocks - first, x, total);
    else if (p->blocks > first) add_blocks(kind, parts, tokens, p, row, first, least(4, p->blocks - first), x, total);
}

INLINE void direct_rows(int kind, int parts, const packing *p, int first, int last, const integers *x, int tokens, float *y, size_t stride) {
    for (int row = first; row < last; row += 4)
        for (int token = 0; token < tokens; token += PAIR) {
            vec sums[PAIR][4] = {0}, own[PAIR];
            int count = least(PAIR, tokens - token), rows = least(4, last - row);
            for (int r = 0; r < rows; r++) {
                if (!token) read_ahead(block_of(kind, p, row + r, 0), (int)(block_of(kind, p, 1, 0) - p->values));
                if (count == PAIR) direct_row(kind, parts, PAIR, p, row + r, x + token, own);
                else direct_row(kind, parts, 1, p, row + r, x + token, own);
                for (int t = 0; t < count; t++) sums[t][r] = own[t];
            }
            for (int t = 0; t < count; t++) {
                float four[4];
                sum_four(sums[t], four);
                for (int r = 0; r < rows; r++) y[(size_t)(token + t) * stride + (size_t)(row + r - first)] = four[r];
            }
        }
}

// ---- more vectors (GEMM): OPENED_ROWS rows at a time ----

#define UNIT (HAS_DIGITS ? 4 : 2)  // adjacent columns that stay together when rows are interleaved
#define UNITS (BLOCK / UNIT)       // per block
#define OPENED(columns) (OPENED_ROWS * ((columns) + 128))  // size of the unpacked rows in floats

// The scales of a part of unpacked rows. Behind the scales of the last part, the offsets follow.
INLINE float *opened_scales(const packing *p, float *panel, int part) {
    return panel + ((size_t)(p->blocks + 3) * UNITS + (size_t)(part * filled_to(p->blocks, LANES))) * OPENED_ROWS;
}

INLINE ivec add_digits(ivec total, ivec w, ivec x) { return add_fours(total, (udigits)w, (digits)x); }
INLINE ivec add_words(ivec total, ivec w, ivec x) { return total + multiply_words((words)w, (words)x); }

// Unpack a block of LANES rows to digits and interleave them. Loads of 16 bytes put rows i, i + 4, … side by side, which
// takes fewer shuffles than unpacking row by row.
INLINE void open_block(int kind, const uint8_t *const rows[LANES], size_t at, int32_t *to) {
    typedef int32_t four __attribute__((vector_size(16)));
    ivec opened[4], parts[4];
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 4 && (!half || kind != INT4); i++) {
            four own[LANES / 4];
            udigits bits;
            for (int j = 0; j < LANES / 4; j++) {
                const uint8_t *from = rows[4 * j + i] + at;
                own[j] = LOAD(four, from + (kind == INT8 ? half * HALF_BLOCK : kind == INT5 ? 4 : 0));
                for (int k = 0; k < 4 && kind == INT5; k++) memcpy((char *)&bits + 16 * j + 4 * k, from, 4);
            }
            memcpy(&opened[i], own, sizeof own);
            if (kind == INT8) opened[i] ^= (int32_t)(BIAS * 0x01010101u);
            if (kind == INT5) opened[i] = (opened[i] >> 4 * half & 0x0F0F0F0F) | (ivec)fifths_of(bits, half);
        }
        if (!half || kind != INT4) interleave_four(opened, HAS_EIGHTS, parts);
        for (int part = 0; part < 4; part++)
            STORE(to + (4 * half + part) * OPENED_ROWS, kind == INT4 ? parts[part] >> 4 * half & 0x0F0F0F0F : parts[part]);
    }
}

// Unpack and interleave LANES rows from `row` on, repeating the last row past the end.
INLINE void open_rows(int kind, int parts, const packing *p, int row, int last, float *panel) {
    const uint8_t *rows[LANES];
    for (int r = 0; r < LANES; r++) rows[r] = block_of(kind, p, least(row + r, last - 1), 0);
    for (int b = 0; b < p->blocks; b++) {
        size_t at = (size_t)(block_of(kind, p, 0, b) - p->values);
        int32_t *to = (int32_t *)panel + (size_t)b * UNITS * OPENED_ROWS;
        if (HAS_DIGITS) open_block(kind, rows, at, to);
        for (int v = 0; v < BLOCK / WORDS && !HAS_DIGITS; v++) {
            ivec opened[LANES];
            for (int r = 0; r < LANES; r++) {
                words w[BLOCK / WORDS];
                open_words(kind, rows[r] + at, w);
                opened[r] = (ivec)w[v];
            }
            interleave(opened, 4, 0, to + v * LANES * OPENED_ROWS);
        }
    }
    for (int part = 0; part < parts * (kind == INT8 ? 1 : 2); part++) {
        const half *from = part < parts ? p->scales : p->offsets;
        for (int first = 0; first < p->blocks; first += LANES) {
            ivec wide[LANES];
            for (int r = 0; r < LANES; r++) wide[r] = (ivec)widen(from, parts, part % parts, p, least(row + r, last - 1), first);
            interleave(wide, 4, 0, (int32_t *)opened_scales(p, panel, part) + first * OPENED_ROWS);
        }
    }
}

// Add to each lane, which is a row, the dot products of block `b` of unpacked rows with `tokens` vectors.
INLINE void add_opened(int parts, int tokens, const packing *p, float *panel, int b, const integers *x,
                       vec lane[VECTORS][TOGETHER]) {
    const int units = UNITS / parts;
    for (int part = 0; part < parts; part++) {
        const int form = form_of(parts, part);
        const float *scales = opened_scales(p, panel, part) + b * OPENED_ROWS, *offsets = opened_scales(p, panel, parts + part) + b * OPENED_ROWS;
        const float *w = panel + (size_t)b * UNITS * OPENED_ROWS;
        ivec sums[VECTORS][TOGETHER], upper[VECTORS][TOGETHER];
        EACH_OF(tokens, t) {
            int bias = BIAS && p->kind == INT8 ? x[t].biases[form][b] : 0;
            EACH_OF(VECTORS, v) sums[v][t] = bias - (ivec){0}, upper[v][t] = (ivec){0};
        }
#if HAS_EIGHTS
        for (int u = part * units; u < (part + 1) * units; u += 2)
            EACH_OF(tokens, t) {
                ivec own = LOAD(ivec, x[t].words + b * BLOCK + u * UNIT);
                EACH_OF(VECTORS, v) {
                    upper[v][t] = add_eights(upper[v][t], LOAD(ivec, w + u * OPENED_ROWS + v * LANES), own);
                    sums[v][t] = add_eights(sums[v][t], LOAD(ivec, w + (u + 1) * OPENED_ROWS + v * LANES), own);
                }
            }
        // The lanes are rows 0, 0, 1, 1 and 2, 2, 3, 3, with high and low digits alternating: separate the digits.
        EACH_OF(VECTORS, v) EACH_OF(tokens, t) {
            ivec rows_01 = upper[v][t], rows_23 = sums[v][t];
            upper[v][t] = __builtin_shufflevector(rows_01, rows_23, 0, 2, 4, 6);
            sums[v][t] = __builtin_shufflevector(rows_01, rows_23, 1, 3, 5, 7);
        }
#elif defined(__ARM_FEATURE_DOTPROD)
// Load four units of activations at once: the instruction can multiply with one lane of a vector.
#define EACH_PRODUCT(to, digits_from) \
    for (int u = part * units; u < (part + 1) * units; u += 4) { \
        ivec four[TOGETHER]; \
        EACH_OF(tokens, t) four[t] = LOAD(ivec, x[t].digits + digits_at(b) + u * UNIT + digits_from); \
        EACH_OF(4, i) EACH_OF(tokens, t) EACH_OF(VECTORS, v) \
            to[v][t] = add_digits(to[v][t], LOAD(ivec, w + (u + i) * OPENED_ROWS + v * LANES), four[t][i] - (ivec){0}); \
    }
        EACH_PRODUCT(upper, 0)
        EACH_PRODUCT(sums, 8 * LANES)
#else
#define EACH_PRODUCT(to, multiply, from) \
    for (int u = part * units; u < (part + 1) * units; u++) \
        EACH_OF(tokens, t) { \
            ivec own = all_of(from); \
            EACH_OF(VECTORS, v) to[v][t] = multiply(to[v][t], LOAD(ivec, w + u * OPENED_ROWS + v * LANES), own); \
        }
        if (HAS_DIGITS) {
            EACH_PRODUCT(upper, add_digits, x[t].digits + digits_at(b) + u / 4 * 4 * LANES + u % 4 * 4)
            EACH_PRODUCT(sums, add_digits, x[t].digits + digits_at(b) + u / 4 * 4 * LANES + u % 4 * 4 + 8 * LANES)
        } else EACH_PRODUCT(sums, add_words, x[t].words + b * BLOCK + u * UNIT)
#endif
#undef EACH_PRODUCT
        if (p->kind != INT8)
            EACH_OF(VECTORS, v) EACH_OF(tokens, t)
                lane[v][t] += load(offsets + v * LANES) * x[t].sums[form][b];
        EACH_OF(VECTORS, v) EACH_OF(tokens, t) {
            vec scale = load(scales + v * LANES) * x[t].scales[b];
            lane[v][t] += __builtin_convertvector((upper[v][t] << 8) + sums[v][t], vec) * scale;
        }
    }
}

// y[t × stride + r] = vector t · unpacked row r, for the first `rows` rows. Meanwhile, prefetches the rows at `next`.
INLINE void multiply_opened(int parts, int tokens, const packing *p, float *panel, int rows, const integers *x, float *y,
                            size_t stride, const uint8_t *next, int lines) {
    vec sum[VECTORS][TOGETHER], pair[2][VECTORS][TOGETHER], lane[VECTORS][TOGETHER];
    for (int i = 0; i < LANES; i++) {  // lanes in the order of `sum_four`: (0 + 2) + (1 + 3), and so on
        int first = i / 4 * 4 + i % 4 / 2 + i % 2 * 2;
        for (int v = 0; v < VECTORS; v++)
            for (int t = 0; t < tokens; t++) lane[v][t] = all(0);
        for (int b = first; b < p->blocks; b += LANES) {
            for (int line = 0; line < lines; line++) __builtin_prefetch(next + (b * lines + line) * 64);
            add_opened(parts, tokens, p, panel, b, x, lane);
        }
        for (int v = 0; v < VECTORS; v++)
            for (int t = 0; t < tokens; t++) {
                vec *to = &pair[i % 4 / 2][v][t];
                *to = i % 2 ? *to + lane[v][t] : lane[v][t];
                if (i % 4 < 3) continue;
                vec four = pair[0][v][t] + pair[1][v][t];
                sum[v][t] = i > 3 ? sum[v][t] + four : four;
            }
    }
    for (int v = 0; v * LANES < rows; v++)
        for (int t = 0; t < tokens; t++)
            memcpy(y + (size_t)t * stride + v * LANES, &sum[v][t], sizeof(float) * (size_t)least(LANES, rows - v * LANES));
}

#define BY_KIND(kind, call) \
    if ((kind) == INT8) call(INT8); \
    else if ((kind) == INT4) call(INT4); \
    else call(INT5);

// y[token × stride + row - first] = row of m · x[token], for rows first..last. `panel` holds OPENED(columns) floats.
static void multiply_integers(const matrix *m, int first, int last, const integers *x, int tokens, float *panel, float *y,
                              size_t stride) {
    const packing p = packing_of(m);
    if (tokens <= FEW) {
#define DIRECT(kind) (p.parts == 1 ? direct_rows(kind, 1, &p, first, last, x, tokens, y, stride) : direct_rows(kind, 2, &p, first, last, x, tokens, y, stride))
        BY_KIND(m->kind, DIRECT)
        return;
    }
    // Cache lines to prefetch per block of the next rows, shared among several calls so that memory keeps up.
    const int lines = OPENED_ROWS * BLOCK / (m->kind == INT8 ? 64 : 128), shares = tokens > 3 * TOGETHER ? 4 : tokens > TOGETHER ? 2 : 1;
    for (int row = first; row < last; row += OPENED_ROWS) {
        int rows = least(OPENED_ROWS, last - row), some;
        float *to = y + (row - first);
        const uint8_t *next = row + OPENED_ROWS < last ? block_of(m->kind, &p, row + OPENED_ROWS, 0) : NULL;
        for (int v = 0; v < VECTORS; v++) {
            float *own = panel + v * LANES;
#define OPEN(kind) (p.parts == 1 ? open_rows(kind, 1, &p, row + v * LANES, last, own) : open_rows(kind, 2, &p, row + v * LANES, last, own))
            BY_KIND(m->kind, OPEN)
        }
        for (int t = 0; t < tokens; t += some) {
            const int fetched = next && t < shares * TOGETHER ? lines / shares : 0;
#define OF_PARTS(parts, count) \
    multiply_opened(parts, count, &p, panel, rows, x + t, to + (size_t)t * stride, stride, \
                    next + (size_t)(t / TOGETHER * fetched * p.blocks * 64), fetched)
#define SOME(count) (some = count, p.parts == 1 ? OF_PARTS(1, count) : OF_PARTS(2, count))
            if (tokens - t >= TOGETHER) SOME(TOGETHER);
            else if (tokens - t >= 2) SOME(2);
            else SOME(1);
        }
    }
}
