// Products with a matrix whose rows are floats or packed integers (see sources/packed.py).
#pragma once

#include "vector.h"

enum kind { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, INT5 };

#define HALF_BLOCK (BLOCK / 2)  // the smallest group: columns of a block that may have a scale of their own

typedef struct {
    int32_t kind;
    int32_t rows;
    int32_t columns;  // filled up to a multiple of BLOCK
    int32_t group;    // columns that share a scale: HALF_BLOCK, or blocks; the last group of a row may be shorter
    const void *values;
    const half *scales;   // (rows, groups) of integers
    const half *offsets;  // (rows, groups) of INT4 and INT5
} matrix;

#define TILE 4          // rows of the matrix that a product of many tokens reads together: `sum_four`
// Tokens with them: as many as registers hold the sums of.
#if defined(__AVX512F__) || defined(__aarch64__)
#define TOKENS 4  // 32 registers
#else
#define TOKENS 2  // 16, also behind WebAssembly
#endif
#define MAX_UNITS 256  // blocks of a row, or halves of blocks, whose scales are converted at once

INLINE int groups_of(const matrix *m) { return (m->columns + m->group - 1) / m->group; }

INLINE const uint8_t *row_of(const matrix *m, int row) {
    static const int bits[] = {32, 16, 16, 8, 4, 5};
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
    default: {  // byte i of 16 holds column i low and column i + 16 high; bit i of 32 before them is its fifth
        const uint8_t *from = row + (size_t)block * (kind == INT5 ? 20 : 16), *bytes = from + (kind == INT5 ? 4 : 0);
        ivec wide = __builtin_convertvector(LOAD(ubytes_vec, bytes + (part * LANES) % HALF_BLOCK), ivec);
        wide = part * LANES < HALF_BLOCK ? wide & 15 : wide >> 4;
        if (kind == INT5) wide |= SPREAD(ivec, LANES, LOAD(int32_t, from) >> part * LANES) & 16;
        return __builtin_convertvector(wide, vec);
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
    // Of blocks and, second, of their halves:
    const float *scales[2];   // … of these units,
    const float *sums[2];     // and the sums of their values, for offsets
} vector_in;

#define VECTOR_ROOM 3  // floats a column that `prepare_vector` wants
#define FEW 4          // tokens up to which this is faster than to unpack the rows; native_engine.py knows it too

// All forms of a vector; `room` holds VECTOR_ROOM × columns floats.
static vector_in prepare_vector(const float *x, int columns, float *room) {
    int blocks = columns / BLOCK;
    float *pairs = room, *sums = room + columns, *half_sums = sums + blocks;
    float *scales = half_sums + 2 * blocks, *half_scales = scales + blocks;
    int16_t *integers = (int16_t *)(room + 2 * columns);
    for (int at = 0; at < columns; at += 2 * LANES)
        for (int i = 0; i < LANES; i++) {
            pairs[at + i] = x[at + 2 * i];
            pairs[at + LANES + i] = x[at + 2 * i + 1];
        }
    for (int block = 0; block < blocks; block++) {
        const float *from = x + block * BLOCK;
        vec totals[2] = {{0}}, most = {0};
        for (int part = 0; part < PARTS; part++) {
            vec v = load(from + part * LANES);
            totals[part * LANES / HALF_BLOCK] += v;
            most = maximum(most, maximum(v, -v));
        }
        float largest = highest(most), units = largest > 0 ? 32767.0f / largest : 0;
        for (int i = 0; i < 2; i++) {
            half_sums[2 * block + i] = sum(totals[i]);
            half_scales[2 * block + i] = largest / 32767.0f;
        }
        sums[block] = half_sums[2 * block] + half_sums[2 * block + 1];
        scales[block] = largest / 32767.0f;
        for (int part = 0; part < PARTS; part++) {
            const float magic = 12582912.0f;  // rounds, see `exponential`
            vec rounded = load(from + part * LANES) * units + magic - magic;
            STORE(integers + block * BLOCK + part * LANES, __builtin_convertvector(rounded, shorts_vec));
        }
    }
    return (vector_in){x, pairs, integers, {scales, half_scales}, {sums, half_sums}};
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

// The sum of offset × sum of its group's values. A unit is what `sums` has one of.
static float dot_offsets(const half *offsets, int groups, int units_a_group, int units, const float *sums) {
    if (units_a_group == 1) {
        vec total = {0};
        int g = 0;
        for (; g + LANES <= groups; g += LANES) total += from_half(offsets + g) * load(sums + g);
        float rest = 0;
        for (; g < groups; g++) rest += half_to_float(&offsets[g]) * sums[g];
        return sum(total) + rest;
    }
    float total = 0;
    for (int unit = 0; unit < units; unit++) total += half_to_float(&offsets[unit / units_a_group]) * sums[unit];
    return total;
}

// Integers of the two halves of a block times those of the vector, summed up over lanes in part. 16-bit products
// need a third of the instructions of floats, and 16 bits per value of x lose nothing that could be seen.
INLINE void block_integers(int kind, const uint8_t *row, int block, const int16_t *x, accumulator halves[2]) {
    const uint8_t *from = row + block * (kind == INT8 ? BLOCK : kind == INT4 ? HALF_BLOCK : HALF_BLOCK + 4);
    x += block * BLOCK;
    halves[0] = halves[1] = (accumulator){0};
    for (int at = 0; at < HALF_BLOCK; at += PAIRED) {
        paired low, high;
        if (kind == INT8) {
            low = __builtin_convertvector(LOAD(paired_bytes, from + at), paired);
            high = __builtin_convertvector(LOAD(paired_bytes, from + HALF_BLOCK + at), paired);
        } else {
            paired both = __builtin_convertvector(LOAD(paired_ubytes, from + (kind == INT5 ? 4 : 0) + at), paired);
            low = both & 15, high = both >> 4;
        }
        if (kind == INT5) {
            int32_t fifths = LOAD(int32_t, from) >> at;
            low |= SPREAD(paired, PAIRED, (int16_t)fifths) & 16;
            high |= SPREAD(paired, PAIRED, (int16_t)(fifths >> HALF_BLOCK)) & 16;
        }
        halves[0] += multiply_pairs(low, LOAD(paired, x + at));
        halves[1] += multiply_pairs(high, LOAD(paired, x + HALF_BLOCK + at));
    }
}

INLINE float dot_integers(int kind, int halves, const matrix *m, int index, const uint8_t *row, vector_in x) {
    int size = halves ? HALF_BLOCK : BLOCK, units = m->columns / size, units_a_group = m->group / size;
    int groups = groups_of(m);
    const half *from = m->scales + (size_t)index * (size_t)groups;
    float scales[MAX_UNITS];
    paired_floats even = {0}, odd = {0};
    for (int first = 0; first < units; first += MAX_UNITS) {
        int some = units - first < MAX_UNITS ? units - first : MAX_UNITS, u = 0;
        const float *of_x = x.scales[halves] + first;
        if (units_a_group == 1)
            for (; u + LANES <= some; u += LANES) store(scales + u, from_half(from + first + u) * load(of_x + u));
        for (; u < some; u++) scales[u] = half_to_float(&from[(first + u) / units_a_group]) * of_x[u];
        accumulator one[2], other[2];
        for (u = 0; u + 2 <= some; u += 2) {
            block_integers(kind, row, halves ? (first + u) / 2 : first + u, x.integers, one);
            if (halves) {
                other[0] = one[1];
            } else {
                block_integers(kind, row, first + u + 1, x.integers, other);
                one[0] += one[1], other[0] += other[1];
            }
            even += __builtin_convertvector(one[0], paired_floats) * scales[u];
            odd += __builtin_convertvector(other[0], paired_floats) * scales[u + 1];
        }
        if (u < some) {  // a last block
            block_integers(kind, row, first + u, x.integers, one);
            even += __builtin_convertvector(one[0] + one[1], paired_floats) * scales[u];
        }
    }
    float product = sum_paired(even + odd);
    if (kind != INT8) {
        const half *offsets = m->offsets + (size_t)index * (size_t)groups;
        product += dot_offsets(offsets, groups, units_a_group, units, x.sums[halves]);
    }
    return product;
}

// y[token × stride + i] = row first + i of m, times x[token], for first..last.
static void dot_rows(const matrix *m, int first, int last, const vector_in *x, int tokens, float *y, int stride) {
#define EACH_ROW(value) \
    for (int i = first; i < last; i++) { \
        const uint8_t *row = row_of(m, i); \
        for (int t = 0; t < tokens; t++) y[(size_t)t * (size_t)stride + (size_t)(i - first)] = value; \
    }
#define INTEGERS(kind) \
    if (m->group < BLOCK) EACH_ROW(dot_integers(kind, 1, m, i, row, x[t])) \
    else EACH_ROW(dot_integers(kind, 0, m, i, row, x[t]))
    switch (m->kind) {
    case FLOAT32: EACH_ROW(dot_floats(FLOAT32, row, m->columns, x[t].values)) break;
    case BFLOAT16: EACH_ROW(dot_pairs(row, m->columns, x[t].pairs)) break;
    case FLOAT16: EACH_ROW(dot_floats(FLOAT16, row, m->columns, x[t].values)) break;
    case INT8: INTEGERS(INT8) break;
    case INT4: INTEGERS(INT4) break;
    default: INTEGERS(INT5) break;
    }
#undef INTEGERS
#undef EACH_ROW
}

// ---- one row of weights as floats ----

INLINE void unpack_kind(int kind, const matrix *m, int row, float *out) {
    const uint8_t *values = row_of(m, row);
    size_t group = (size_t)row * (size_t)groups_of(m);
    float scale = 1, offset = 0;
    int left = 0;  // columns of the group
    for (int block = 0; block < m->columns / BLOCK; block++)
        for (int part = 0; part < PARTS; part++, left -= LANES) {
            if (kind >= INT8 && part * LANES % HALF_BLOCK == 0 && !left) {
                scale = half_to_float(&m->scales[group]);
                if (kind != INT8) offset = half_to_float(&m->offsets[group]);
                group++, left = m->group;
            }
            size_t at = (size_t)block * BLOCK + (size_t)part * LANES;
            store(out + at, load_part(kind, values, block, part) * scale + offset);
        }
}

static void unpack_row(const matrix *m, int row, float *out) {
    switch (m->kind) {
    case FLOAT32: unpack_kind(FLOAT32, m, row, out); break;
    case BFLOAT16: unpack_kind(BFLOAT16, m, row, out); break;
    case FLOAT16: unpack_kind(FLOAT16, m, row, out); break;
    case INT8: unpack_kind(INT8, m, row, out); break;
    case INT4: unpack_kind(INT4, m, row, out); break;
    default: unpack_kind(INT5, m, row, out); break;
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

// Whether integers.h multiplies its rows.
INLINE int is_packed(const matrix *m) { return (m->kind == INT8 || m->kind == INT4) && m->group >= BLOCK; }
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
