// Matmuls with weights whose rows are floats or packed integers (see sources/quantized/packed.py).
#pragma once

#include "vector.h"

enum kind { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, INT5 };

#define HALF_BLOCK (BLOCK / 2)  // columns of the smallest quantization group

typedef struct {
    int32_t kind;
    int32_t rows;
    int32_t columns;  // padded to a multiple of BLOCK
    int32_t group;    // columns that share a scale: HALF_BLOCK or whole blocks; the last group of a row may be shorter
    const void *values;
    const half *scales;   // (rows, groups), of packed integers
    const half *offsets;  // (rows, groups), of INT4 and INT5
} matrix;

#define OPENED_ROWS (VECTORS * LANES)  // matrix rows that are unpacked together for many tokens

INLINE int groups_of(const matrix *m) { return pieces_of(m->columns, m->group); }

INLINE const uint8_t *row_of(const matrix *m, int row) {
    static const int bits[] = {32, 16, 16, 8, 4, 5};
    return (const uint8_t *)m->values + (size_t)row * (size_t)m->columns * (size_t)bits[m->kind] / 8;
}

// Vector `part` of block `block` of a row, as floats. Scales are not applied.
INLINE vec load_part(int kind, const uint8_t *row, int block, int part) {
    size_t at = (size_t)block * BLOCK + (size_t)part * LANES;
    switch (kind) {
    case FLOAT32: return load((const float *)row + at);
    case BFLOAT16: return (vec)(__builtin_convertvector(LOAD(halves_vec, row + 2 * at), uvec) << 16);
    case FLOAT16: return from_half((const half *)row + at);
    case INT8: return __builtin_convertvector(LOAD(bytes_vec, row + at), vec);
    default: {  // byte i of 16: column i in the low nibble, i + 16 in the high one; INT5: 32 fifth bits before them
        const uint8_t *from = row + (size_t)block * (kind == INT5 ? 20 : 16), *bytes = from + (kind == INT5 ? 4 : 0);
        ivec wide = __builtin_convertvector(LOAD(ubytes_vec, bytes + (part * LANES) % HALF_BLOCK), ivec);
        wide = part * LANES < HALF_BLOCK ? wide & 15 : wide >> 4;
        if (kind == INT5) wide |= SPREAD(ivec, LANES, LOAD(int32_t, from) >> part * LANES) & 16;
        return __builtin_convertvector(wide, vec);
    }
    }
}

// ---- a few tokens (GEMV): every row is read from memory once and multiplied with each token ----
//
// One row at a time: hardware prefetchers reach the memory's full bandwidth with one stream, but only a third of it
// with four interleaved ones (measured on Zen 4). On a Zen 5, whose cores outrun the hardware prefetchers, software
// prefetching raises the bandwidth of one core by half.

// Prefetch distance in bytes; 4 to 16 KiB perform alike. With 4 lanes, arithmetic is the bottleneck, not memory.
#define READ_AHEAD (LANES > 4 ? 8192 : 0)

INLINE void read_ahead(const uint8_t *from, int bytes) {
    for (int at = 0; READ_AHEAD && at < bytes; at += 64) __builtin_prefetch(from + READ_AHEAD + at);
}

// An activation vector in the layouts that the kinds of weights need; see `prepare_vector`.
typedef struct {
    const float *values;  // (columns), zero-padded
    const float *pairs;   // (columns), in the order of `dot_pairs`
} vector_in;

#define FEW 4  // up to this many tokens, this is faster than unpacking the rows

// Both layouts of an activation vector; `room` holds `columns` floats.
static vector_in prepare_vector(const float *x, int columns, float *room) {
    for (int at = 0; at < columns; at += 2 * LANES) {
        vec even, odd;
        for (int i = 0; i < LANES; i++) even[i] = x[at + 2 * i], odd[i] = x[at + 2 * i + 1];
        store(room + at, even), store(room + at + LANES, odd);
    }
    return (vector_in){x, room};
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

// Dot product with a bfloat16 row. Every 32 bits hold two values, which a shift and a mask separate without a shuffle;
// x must be in the order that results.
INLINE float dot_pairs(const uint8_t *row, int columns, const float *x) {
    vec even = {0}, odd = {0};
    for (int at = 0; at < columns; at += 2 * LANES) {
        uvec both = LOAD(uvec, row + 2 * at);
        even += (vec)(both << 16) * load(x + at);
        odd += (vec)(both & 0xFFFF0000u) * load(x + at + LANES);
    }
    return sum(even + odd);
}

// y[token × stride + row - first] = row of m · x[token], for rows first..last.
static void dot_rows(const matrix *m, int first, int last, const vector_in *x, int tokens, float *y, int stride) {
    int bytes = m->columns * (m->kind == FLOAT32 ? 4 : 2);
#define EACH_ROW(value) \
    for (int i = first; i < last; i++) { \
        const uint8_t *row = row_of(m, i); \
        read_ahead(row, bytes); \
        for (int t = 0; t < tokens; t++) y[(size_t)t * (size_t)stride + (size_t)(i - first)] = value; \
    }
    switch (m->kind) {
    case FLOAT32: EACH_ROW(dot_floats(FLOAT32, row, m->columns, x[t].values)) break;
    case BFLOAT16: EACH_ROW(dot_pairs(row, m->columns, x[t].pairs)) break;
    default: EACH_ROW(dot_floats(FLOAT16, row, m->columns, x[t].values)) break;
    }
#undef EACH_ROW
}

// ---- dequantizing a row of weights ----

// `load_part` with the scale and offset of a group of the row.
INLINE vec unpack_part(int kind, const matrix *m, int row, int block, int part, int group) {
    vec values = load_part(kind, row_of(m, row), block, part);
    if (kind < INT8) return values;
    size_t at = (size_t)row * (size_t)groups_of(m) + (size_t)group;
    return values * half_to_float(&m->scales[at]) + (kind == INT8 ? 0 : half_to_float(&m->offsets[at]));
}

#define BY_EACH_KIND(kind, call) \
    switch (kind) { \
    case FLOAT32: call(FLOAT32); break; \
    case BFLOAT16: call(BFLOAT16); break; \
    case FLOAT16: call(FLOAT16); break; \
    case INT8: call(INT8); break; \
    case INT4: call(INT4); break; \
    default: call(INT5); break; \
    }

static void unpack_row(const matrix *m, int row, float *out) {
#define UNPACK(kind) \
    for (int block = 0; block < m->columns / BLOCK; block++) \
        for (int part = 0; part < PARTS; part++) \
            store(out + block * BLOCK + part * LANES, unpack_part(kind, m, row, block, part, (block * BLOCK + part * LANES) / m->group))
    BY_EACH_KIND(m->kind, UNPACK)
#undef UNPACK
}

// ---- many tokens (GEMM): rows of weights are unpacked into the CPU cache and used for all tokens ----
//
// OPENED_ROWS rows are interleaved: every lane is a row, and a tile of sums needs no horizontal sum.

// Groups of four lanes of two vectors: those with an even index, and those with an odd one.
#if LANES == 16
#define EVEN_FOURS(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD_FOURS(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#elif LANES == 8
#define EVEN_FOURS(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define ODD_FOURS(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#endif

// Transpose LANES / 4 vectors in units of four lanes: to[i] holds the i-th four lanes of each.
INLINE void turn_fours(const ivec from[LANES / 4], ivec to[LANES / 4]) {
#if LANES == 16
    ivec even_ab = EVEN_FOURS(from[0], from[1]), odd_ab = ODD_FOURS(from[0], from[1]);
    ivec even_cd = EVEN_FOURS(from[2], from[3]), odd_cd = ODD_FOURS(from[2], from[3]);
    to[0] = EVEN_FOURS(even_ab, even_cd), to[1] = EVEN_FOURS(odd_ab, odd_cd);
    to[2] = ODD_FOURS(even_ab, even_cd), to[3] = ODD_FOURS(odd_ab, odd_cd);
#elif LANES == 8
    to[0] = EVEN_FOURS(from[0], from[1]), to[1] = ODD_FOURS(from[0], from[1]);
#else
    to[0] = from[0];
#endif
}

// Transpose every four lanes of four vectors: to[i] holds their i-th 32-bit parts, one of each vector.
// `by_two`: four lanes hold two parts of two vectors instead of one part of four.
INLINE void interleave_four(const ivec from[4], int by_two, ivec to[4]) {
    ivec first_ab = FIRST(from[0], from[1]), last_ab = LAST(from[0], from[1]);
    ivec first_cd = FIRST(from[2], from[3]), last_cd = LAST(from[2], from[3]);
    to[0] = FIRST_PAIRS(first_ab, first_cd), to[1] = LAST_PAIRS(first_ab, first_cd);
    to[2] = FIRST_PAIRS(last_ab, last_cd), to[3] = LAST_PAIRS(last_ab, last_cd);
    if (!by_two) return;
    to[0] = FIRST_PAIRS(from[0], from[1]), to[1] = FIRST_PAIRS(from[2], from[3]);
    to[2] = LAST_PAIRS(from[0], from[1]), to[3] = LAST_PAIRS(from[2], from[3]);
}

// Transpose LANES vectors of 32-bit parts to to[part × OPENED_ROWS + vector], with every four parts `gap` parts apart.
INLINE void interleave(const ivec v[LANES], int gap, int by_two, int32_t *to) {
    ivec parts[LANES / 4][4], turned[LANES / 4];
    for (int i = 0; i < LANES / 4; i++) interleave_four(v + 4 * i, by_two, parts[i]);
    for (int part = 0; part < 4; part++) {
        ivec fours[LANES / 4];
        for (int i = 0; i < LANES / 4; i++) fours[i] = parts[i][part];
        turn_fours(fours, turned);
        for (int four = 0; four < LANES / 4; four++) STORE(to + (gap * four + part) * OPENED_ROWS, turned[four]);
    }
}

// Unpack LANES rows from `row` on into interleaved units of 32 bits, a float or two columns in bfloat16; rows past the
// last repeat it. With NARROW_ROWS of 2, 4 columns of two rows alternate with those of the next two. A block has at most
// `parts` groups.
INLINE void open_floats(int kind, int parts, const matrix *m, int row, int last, float *panel) {
    const int is_narrow = HAS_BF16_PRODUCTS && kind != FLOAT32, step = 1 + is_narrow, bytes = (int)(row_of(m, 1) - row_of(m, 0));
    for (int block = 0; block < m->columns / BLOCK; block++)
        for (int part = 0; part < PARTS; part += step) {
            ivec opened[LANES];
            int at = block * BLOCK + part * LANES, group = at / m->group, next = parts == 1 ? group : (at + is_narrow * LANES) / m->group;
            for (int r = 0; r < LANES; r++) {
                int index = least(row + r, last - 1);
                __builtin_prefetch(row_of(m, index + LANES) + (size_t)at * (size_t)bytes / (size_t)m->columns);
                vec v = unpack_part(kind, m, index, block, part, group);
                opened[r] = (ivec)(is_narrow ? narrow(v, unpack_part(kind, m, index, block, part + 1, next)) : v);
            }
            interleave(opened, 4, is_narrow && NARROW_ROWS == 2, (int32_t *)panel + at / step * OPENED_ROWS);
        }
}

// y[t][r] = unpacked row r · x[t], for some tokens of `units` times 32 bits each.
INLINE void multiply_tile(int is_narrow, int tokens, const float *panel, const float *x, int units, float y[TOKENS][OPENED_ROWS]) {
    vec total[TOKENS][MOST_VECTORS];
    EACH_OF(tokens, t) EACH_OF(VECTORS, v) total[t][v] = all(0);
#if NARROW_ROWS == 2
    for (int u = 0; is_narrow && u < units; u += 2)
        EACH_OF(tokens / 2, pair) {
            vec own = load(x + 2 * (pair * units + u));
            EACH_OF(VECTORS, v) EACH_OF(2, i)
                total[2 * pair + i][v] = add_squares(total[2 * pair + i][v], own, load(panel + (u + i) * OPENED_ROWS + v * LANES));
        }
    // The lanes are rows 0, 1, 0, 1 and 2, 3, 2, 3, of one token and the next: separate the tokens.
    EACH_OF(is_narrow * tokens / 2, pair) EACH_OF(VECTORS, v) {
        vec rows_01 = total[2 * pair][v], rows_23 = total[2 * pair + 1][v];
        total[2 * pair][v] = FIRST_PAIRS(rows_01, rows_23), total[2 * pair + 1][v] = LAST_PAIRS(rows_01, rows_23);
    }
    if (!is_narrow)
#endif
    add_products(is_narrow ? KEPT_PAIRS : KEPT_FLOAT32, 0, tokens, VECTORS, 0, panel, OPENED_ROWS, LANES, units, x, (size_t)units, total);
    EACH_OF(tokens, t) EACH_OF(VECTORS, v) store(y[t] + v * LANES, total[t][v]);
}

// Whether the kernels of integers.h multiply its rows.
INLINE int is_packed(const matrix *m) { return m->kind >= INT8; }
INLINE int uses_bf16(const matrix *m) { return HAS_BF16_PRODUCTS && m->kind != FLOAT32; }

// y[token × stride + row - first] = row of m · token, for rows first..last.
// `floats` is (tokens, columns), `halves` the same in bfloat16, with room for TOKENS more behind them; `panel` holds
// OPENED_ROWS × columns floats.
static void multiply(const matrix *m, int first, int last, const float *floats, const uint16_t *halves, int tokens,
                     float *panel, float *y, int stride) {
    const int is_narrow = uses_bf16(m), units = m->columns / (1 + is_narrow);
    const float *x = is_narrow ? (const float *)halves : floats;
    for (int row = first; row < last; row += OPENED_ROWS) {
        size_t rows = sizeof(float) * (size_t)least(OPENED_ROWS, last - row);
        for (int v = 0; v < VECTORS; v++) {
#define OPEN_PARTS(kind, parts) open_floats(kind, parts, m, row + v * LANES, last, panel + v * LANES)
#define OPEN(kind) if (kind < INT8 || m->group >= BLOCK) OPEN_PARTS(kind, 1); else OPEN_PARTS(kind, 2)
            BY_EACH_KIND(m->kind, OPEN)
#undef OPEN
#undef OPEN_PARTS
        }
        for (int token = 0, some; token < tokens; token += some) {
            float tile[TOKENS][OPENED_ROWS];
            const float *from = x + (size_t)token * (size_t)units;
            int left = tokens - token;
#define MULTIPLY(count) \
    (some = count, is_narrow ? multiply_tile(HAS_BF16_PRODUCTS, count, panel, from, units, tile) : multiply_tile(0, count, panel, from, units, tile))
            if (left > TOKENS * 2 / 3) MULTIPLY(TOKENS);
            else if (left > TOKENS / 3) MULTIPLY(TOKENS * 2 / 3);
            else MULTIPLY(TOKENS / 3);
#undef MULTIPLY
            for (int t = 0; t < some && t < left; t++) memcpy(y + (size_t)(token + t) * (size_t)stride + (row - first), tile[t], rows);
        }
    }
}
