// Products with a matrix whose rows are floats or packed integers (see sources/packed.py).
#pragma once

#include "vector.h"

enum kind { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };

typedef struct {
    int32_t kind;
    int32_t rows;
    int32_t columns;  // filled up to a multiple of BLOCK
    int32_t group;    // columns that share a scale; the last group of a row may be shorter
    const void *values;
    const half *scales;   // (rows, groups) of INT8 and INT4
    const half *offsets;  // (rows, groups) of INT4
} matrix;

#define TILE 4          // rows of the matrix that a product of many tokens reads together: `sum_four`
// Tokens with them: as many as registers hold the sums of.
#if defined(__AVX512F__) || defined(__aarch64__)
#define TOKENS 4  // 32 registers
#else
#define TOKENS 2  // 16, also behind WebAssembly
#endif
#define MAX_BLOCKS 256  // blocks of a row whose scales are converted at once

INLINE int groups_of(const matrix *m) { return (m->columns + m->group - 1) / m->group; }

INLINE const uint8_t *row_of(const matrix *m, int row) {
    static const int bits[] = {32, 16, 16, 8, 4};
    return (const uint8_t *)m->values + (size_t)row * (size_t)m->columns * (size_t)bits[m->kind] / 8;
}

// Part `part` of block `block` of a row, as floats. Scales are not applied.
INLINE vec load_part(int kind, const uint8_t *row, int block, int part) {
    size_t at = (size_t)block * BLOCK + (size_t)part * LANES;
    switch (kind) {
    case FLOAT32: return load((const float *)row + at);
    case BFLOAT16: return (vec)(__builtin_convertvector(LOAD(halves_vec, row + 2 * at), uvec) << 16);
    case FLOAT16: return from_half((const half *)row + at);
    case INT8: return __builtin_convertvector(LOAD(bytes_vec, row + at), vec);
    default: {  // byte i of 16 holds column i low and column i + 16 high
        const uint8_t *bytes = row + (size_t)block * 16 + (part * LANES) % 16;
        ivec wide = __builtin_convertvector(LOAD(ubytes_vec, bytes), ivec);
        return __builtin_convertvector(part * LANES < 16 ? wide & 15 : wide >> 4, vec);
    }
    }
}

// ---- a few tokens: every row is read once, straight from memory, and multiplied with each ----
//
// One row after the other: the processor's prefetchers follow one stream at the memory's full speed, and
// four interleaved ones at a third of it (measured on Zen 4).

// A vector in the forms that the kinds of rows want; see `prepare_vector`.
typedef struct {
    const float *values;  // (columns), filled up with zeros
    const float *pairs;   // (columns): in the order of `dot_pairs`
    const int16_t *integers;  // (columns): each block as integers up to 32,767 …
    const float *scales;      // (columns / BLOCK): … of these units
    const float *sums;    // (columns / BLOCK): of each block's values, for the offsets of INT4
} vector_in;

#define VECTOR_ROOM 3  // floats a column that `prepare_vector` wants
#define FEW 4          // tokens up to which this is faster than to unpack the rows; native_engine.py knows it too

// All forms of a vector; `room` holds VECTOR_ROOM × columns floats.
static vector_in prepare_vector(const float *x, int columns, float *room) {
    int blocks = columns / BLOCK;
    float *pairs = room, *sums = room + columns, *scales = sums + blocks;
    int16_t *integers = (int16_t *)(room + 2 * columns);
    for (int at = 0; at < columns; at += 2 * LANES)
        for (int i = 0; i < LANES; i++) {
            pairs[at + i] = x[at + 2 * i];
            pairs[at + LANES + i] = x[at + 2 * i + 1];
        }
    for (int block = 0; block < blocks; block++) {
        const float *from = x + block * BLOCK;
        vec total = load(from), most = maximum(total, -total);
        for (int part = 1; part < PARTS; part++) {
            vec v = load(from + part * LANES);
            total += v;
            most = maximum(most, maximum(v, -v));
        }
        float largest = highest(most), units = largest > 0 ? 32767.0f / largest : 0;
        sums[block] = sum(total);
        scales[block] = largest / 32767.0f;
        for (int part = 0; part < PARTS; part++) {
            const float magic = 12582912.0f;  // rounds, see `exponential`
            vec rounded = load(from + part * LANES) * units + magic - magic;
            STORE(integers + block * BLOCK + part * LANES, __builtin_convertvector(rounded, shorts_vec));
        }
    }
    return (vector_in){x, pairs, integers, scales, sums};
}

INLINE vec block_product(int kind, const uint8_t *row, int block, const float *x) {
    vec products = load_part(kind, row, block, 0) * load(x + block * BLOCK);
    for (int part = 1; part < PARTS; part++)
        products += load_part(kind, row, block, part) * load(x + block * BLOCK + part * LANES);
    return products;
}

INLINE float dot_floats(int kind, const uint8_t *row, int columns, const float *x) {
    vec even = {0}, odd = {0};
    int block = 0;
    for (; block + 2 <= columns / BLOCK; block += 2) {
        even += block_product(kind, row, block, x);
        odd += block_product(kind, row, block + 1, x);
    }
    if (block < columns / BLOCK) even += block_product(kind, row, block, x);
    return sum(even + odd);
}

// bfloat16 in pairs: two values lie in every 32 bits, and masks take them apart without a shuffle.
// x comes in the order that this gives.
INLINE float dot_pairs(const uint8_t *row, int columns, const float *x) {
    vec even = {0}, odd = {0};
    for (int at = 0; at < columns; at += 2 * LANES) {
        uvec both = LOAD(uvec, row + 2 * at);
        even += (vec)(both << 16) * load(x + at);
        odd += (vec)(both & 0xFFFF0000u) * load(x + at + LANES);
    }
    return sum(even + odd);
}

// The sum of offset × sum of its group's values.
static float dot_offsets(const half *offsets, int groups, int blocks_a_group, int blocks, const float *sums) {
    if (blocks_a_group == 1) {
        vec total = {0};
        int g = 0;
        for (; g + LANES <= groups; g += LANES) total += from_half(offsets + g) * load(sums + g);
        float rest = 0;
        for (; g < groups; g++) rest += half_to_float(&offsets[g]) * sums[g];
        return sum(total) + rest;
    }
    float total = 0;
    for (int block = 0; block < blocks; block++) total += half_to_float(&offsets[block / blocks_a_group]) * sums[block];
    return total;
}

// Integers of a block times those of the vector, summed up over lanes in part. 16-bit products need a third
// of the instructions of floats, and 16 bits a value of x lose nothing that could be seen.
INLINE accumulator block_integers(int kind, const uint8_t *row, int block, const int16_t *x) {
    accumulator total = {0};
    x += block * BLOCK;
    if (kind == INT8)
        for (int at = 0; at < BLOCK; at += PAIRED)
            total += multiply_pairs(__builtin_convertvector(LOAD(paired_bytes, row + block * BLOCK + at), paired),
                                    LOAD(paired, x + at));
    else
        for (int at = 0; at < BLOCK / 2; at += PAIRED) {
            paired both = __builtin_convertvector(LOAD(paired_ubytes, row + block * (BLOCK / 2) + at), paired);
            total += multiply_pairs(both & 15, LOAD(paired, x + at));
            total += multiply_pairs(both >> 4, LOAD(paired, x + BLOCK / 2 + at));
        }
    return total;
}

INLINE float dot_integers(int kind, const matrix *m, int index, const uint8_t *row, vector_in x) {
    int blocks = m->columns / BLOCK, blocks_a_group = m->group / BLOCK, groups = groups_of(m);
    const half *from = m->scales + (size_t)index * (size_t)groups;
    float scales[MAX_BLOCKS];
    paired_floats even = {0}, odd = {0};
    for (int first = 0; first < blocks; first += MAX_BLOCKS) {
        int some = blocks - first < MAX_BLOCKS ? blocks - first : MAX_BLOCKS, b = 0;
        if (blocks_a_group == 1)
            for (; b + LANES <= some; b += LANES)
                store(scales + b, from_half(from + first + b) * load(x.scales + first + b));
        for (; b < some; b++) scales[b] = half_to_float(&from[(first + b) / blocks_a_group]) * x.scales[first + b];
        for (b = 0; b + 2 <= some; b += 2) {
            even += __builtin_convertvector(block_integers(kind, row, first + b, x.integers), paired_floats) * scales[b];
            odd += __builtin_convertvector(block_integers(kind, row, first + b + 1, x.integers), paired_floats) * scales[b + 1];
        }
        if (b < some)
            even += __builtin_convertvector(block_integers(kind, row, first + b, x.integers), paired_floats) * scales[b];
    }
    float product = sum_paired(even + odd);
    if (kind == INT4) {
        const half *offsets = m->offsets + (size_t)index * (size_t)groups;
        product += dot_offsets(offsets, groups, blocks_a_group, blocks, x.sums);
    }
    return product;
}

// y[token × stride + i] = row first + i of m, times x[token], for first..last.
static void dot_rows(const matrix *m, int first, int last, const vector_in *x, int tokens, float *y, int stride) {
#define EACH_ROW(value) \
    for (int i = first; i < last; i++) { \
        const uint8_t *row = row_of(m, i); \
        for (int t = 0; t < tokens; t++) y[(size_t)t * (size_t)stride + (size_t)(i - first)] = value; \
    } \
    break
    switch (m->kind) {
    case FLOAT32: EACH_ROW(dot_floats(FLOAT32, row, m->columns, x[t].values));
    case BFLOAT16: EACH_ROW(dot_pairs(row, m->columns, x[t].pairs));
    case FLOAT16: EACH_ROW(dot_floats(FLOAT16, row, m->columns, x[t].values));
    case INT8: EACH_ROW(dot_integers(INT8, m, i, row, x[t]));
    default: EACH_ROW(dot_integers(INT4, m, i, row, x[t]));
    }
#undef EACH_ROW
}

// ---- one row of weights as floats ----

INLINE void unpack_kind(int kind, const matrix *m, int row, float *out) {
    const uint8_t *values = row_of(m, row);
    int groups = groups_of(m), blocks_a_group = m->group / BLOCK;
    for (int block = 0; block < m->columns / BLOCK; block++) {
        float scale = 1, offset = 0;
        if (kind == INT8 || kind == INT4) scale = half_to_float(&m->scales[(size_t)row * groups + block / blocks_a_group]);
        if (kind == INT4) offset = half_to_float(&m->offsets[(size_t)row * groups + block / blocks_a_group]);
        for (int part = 0; part < PARTS; part++)
            store(out + block * BLOCK + part * LANES, load_part(kind, values, block, part) * scale + offset);
    }
}

static void unpack_row(const matrix *m, int row, float *out) {
    switch (m->kind) {
    case FLOAT32: unpack_kind(FLOAT32, m, row, out); break;
    case BFLOAT16: unpack_kind(BFLOAT16, m, row, out); break;
    case FLOAT16: unpack_kind(FLOAT16, m, row, out); break;
    case INT8: unpack_kind(INT8, m, row, out); break;
    default: unpack_kind(INT4, m, row, out); break;
    }
}

// ---- many tokens: rows of weights are unpacked into the cache and used for all tokens ----

// y[t][r] = w[r] · x[t] over `columns`, for TILE rows and TOKENS tokens.
INLINE void tile_floats(const float *const w[TILE], const float *const x[TOKENS], int columns,
                        float y[TOKENS][TILE]) {
    vec total[TOKENS][TILE] = {0};
    for (int at = 0; at < columns; at += LANES) {
        vec weights[TILE];
        for (int r = 0; r < TILE; r++) weights[r] = load(w[r] + at);
        for (int t = 0; t < TOKENS; t++) {
            vec v = load(x[t] + at);
            for (int r = 0; r < TILE; r++) total[t][r] += weights[r] * v;
        }
    }
    for (int t = 0; t < TOKENS; t++) sum_four(total[t], y[t]);
}

// Where the processor multiplies pairs of bfloat16 into float32, products of many tokens use it, except
// for float32 weights, which stay exact.
#if defined(__AVX512BF16__)
#define HAS_BF16_PRODUCTS 1
INLINE void tile_bf16(const uint16_t *const w[TILE], const uint16_t *const x[TOKENS], int columns,
                      float y[TOKENS][TILE]) {
    vec total[TOKENS][TILE] = {0};
    for (int at = 0; at < columns; at += BLOCK) {
        __m512bh weights[TILE];
        for (int r = 0; r < TILE; r++) weights[r] = LOAD(__m512bh, w[r] + at);
        for (int t = 0; t < TOKENS; t++) {
            __m512bh v = LOAD(__m512bh, x[t] + at);
            for (int r = 0; r < TILE; r++) total[t][r] = (vec)_mm512_dpbf16_ps((__m512)total[t][r], weights[r], v);
        }
    }
    for (int t = 0; t < TOKENS; t++) sum_four(total[t], y[t]);
}

static void to_bf16(const float *from, int count, uint16_t *to) {
    for (int at = 0; at < count; at += BLOCK) {
        __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + at + 16), _mm512_loadu_ps(from + at));
        STORE(to + at, both);
    }
}
#else
#define HAS_BF16_PRODUCTS 0
INLINE void tile_bf16(const uint16_t *const w[TILE], const uint16_t *const x[TOKENS], int columns,
                      float y[TOKENS][TILE]) {
    (void)w, (void)x, (void)columns, (void)y;
}
static void to_bf16(const float *from, int count, uint16_t *to) { (void)from, (void)count, (void)to; }
#endif

INLINE int uses_bf16(const matrix *m) { return HAS_BF16_PRODUCTS && m->kind != FLOAT32; }

// y[token × stride + row - first] = row of m · token, for rows first..last.
// `floats` is (tokens, columns), `narrow` the same in bfloat16; `panel` holds TILE × columns floats.
static void multiply(const matrix *m, int first, int last, const float *floats, const uint16_t *narrow, int tokens,
                     float *panel, float *y, int stride) {
    int columns = m->columns, pairs = uses_bf16(m);
    for (int row = first; row < last; row += TILE) {
        const void *w[TILE];
        for (int r = 0; r < TILE; r++) {
            int index = row + r < last ? row + r : last - 1;
            if (m->kind == (pairs ? BFLOAT16 : FLOAT32)) {
                w[r] = row_of(m, index);
                continue;
            }
            float *unpacked = panel + r * columns;
            unpack_row(m, index, unpacked);
            if (pairs) to_bf16(unpacked, columns, (uint16_t *)unpacked);
            w[r] = unpacked;
        }
        for (int token = 0; token < tokens; token += TOKENS) {
            float tile[TOKENS][TILE];
            size_t at[TOKENS];
            for (int t = 0; t < TOKENS; t++)
                at[t] = (size_t)(token + t < tokens ? token + t : tokens - 1) * (size_t)columns;
            if (pairs) {
                const uint16_t *x[TOKENS];
                for (int t = 0; t < TOKENS; t++) x[t] = narrow + at[t];
                tile_bf16((const uint16_t *const *)w, x, columns, tile);
            } else {
                const float *x[TOKENS];
                for (int t = 0; t < TOKENS; t++) x[t] = floats + at[t];
                tile_floats((const float *const *)w, x, columns, tile);
            }
            for (int t = 0; t < TOKENS && token + t < tokens; t++)
                for (int r = 0; r < TILE && row + r < last; r++)
                    y[(size_t)(token + t) * (size_t)stride + (size_t)(row + r - first)] = tile[t][r];
        }
    }
}
