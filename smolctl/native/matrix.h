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

#define TILE 4          // matrix rows in a register tile, which `sum_four` reduces
// Tokens in a register tile: as many as there are registers for the accumulators.
#if defined(__AVX512F__) || defined(__aarch64__)
#define TOKENS 4  // 32 registers
#else
#define TOKENS 2  // 16 registers, assumed for WebAssembly too
#endif

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

INLINE void unpack_kind(int kind, const matrix *m, int row, float *out) {
    const uint8_t *values = row_of(m, row);
    size_t group = (size_t)row * (size_t)groups_of(m);
    float scale = 1, offset = 0;
    int left = 0;  // columns of the group that are left
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

// ---- many tokens (GEMM): rows of weights are unpacked into the CPU cache and used for all tokens ----

// CPUs with bfloat16 dot products that accumulate in float32 use them here, except for float32 weights, which would
// lose precision. A register tile then has NARROW_TILE matrix rows, and groups of NARROW_ROWS rows of bfloat16 are
// interleaved, 4 columns of each at a time.
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#define NARROW_TILE 8
#define NARROW_ROWS 2
#else
#define NARROW_TILE TILE
#define NARROW_ROWS 1
#endif

INLINE uint16_t *narrow_row(const uint16_t *rows, int row, int columns) {
    return (uint16_t *)rows + (size_t)(row / NARROW_ROWS * NARROW_ROWS) * (size_t)columns + row % NARROW_ROWS * 4;
}

// y[t][r] = w[r] · x[t] over `columns`, for TILE rows and TOKENS tokens.
INLINE void tile_floats(const float *const w[TILE], const float *const x[TOKENS], int columns,
                        float y[TOKENS][NARROW_TILE]) {
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

// `tile_floats` in bfloat16, for NARROW_TILE rows.
#if defined(__AVX512BF16__)
#define HAS_BF16_PRODUCTS 1
INLINE void tile_bf16(const uint16_t *const w[NARROW_TILE], const uint16_t *const x[TOKENS], int columns,
                      float y[TOKENS][NARROW_TILE]) {
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
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_BF16_PRODUCTS 1
// BFMMLA multiplies 4 columns of two tokens with those of two rows. Columns alternate between two accumulators to hide
// its latency.
INLINE void tile_bf16(const uint16_t *const w[NARROW_TILE], const uint16_t *const x[TOKENS], int columns,
                      float y[TOKENS][NARROW_TILE]) {
    vec total[2][TOKENS / 2][NARROW_TILE / 2] = {0};
    for (int at = 0; at < 2 * columns; at += 16)
        for (int turn = 0; turn < 2; turn++)
            for (int t = 0; t < TOKENS / 2; t++) {
                bfloat16x8_t v = LOAD(bfloat16x8_t, x[2 * t] + at + 8 * turn);
                for (int r = 0; r < NARROW_TILE / 2; r++) {
                    bfloat16x8_t weights = LOAD(bfloat16x8_t, w[2 * r] + at + 8 * turn);
                    total[turn][t][r] = (vec)vbfmmlaq_f32((float32x4_t)total[turn][t][r], v, weights);
                }
            }
    for (int t = 0; t < TOKENS / 2; t++)
        for (int r = 0; r < NARROW_TILE / 2; r++) {
            float both[4];
            store(both, total[0][t][r] + total[1][t][r]);
            memcpy(&y[2 * t][2 * r], both, 8);
            memcpy(&y[2 * t + 1][2 * r], both + 2, 8);
        }
}

static void to_bf16(const float *from, int count, uint16_t *to) {
    for (int at = 0; at < count; at += 4) STORE(to + NARROW_ROWS * at, vcvt_bf16_f32((float32x4_t)load(from + at)));
}
#else
#define HAS_BF16_PRODUCTS 0
INLINE void tile_bf16(const uint16_t *const w[NARROW_TILE], const uint16_t *const x[TOKENS], int columns,
                      float y[TOKENS][NARROW_TILE]) {
    (void)w, (void)x, (void)columns, (void)y;
}
static void to_bf16(const float *from, int count, uint16_t *to) { (void)from, (void)count, (void)to; }
#endif

// Whether the kernels of integers.h multiply its rows.
INLINE int is_packed(const matrix *m) { return m->kind >= INT8; }
INLINE int uses_bf16(const matrix *m) { return HAS_BF16_PRODUCTS && m->kind != FLOAT32; }

// y[token × stride + row - first] = row of m · token, for rows first..last.
// `floats` is (tokens, columns), `narrow` the same in bfloat16; `panel` holds NARROW_TILE × columns floats.
static void multiply(const matrix *m, int first, int last, const float *floats, const uint16_t *narrow, int tokens,
                     float *panel, float *y, int stride) {
    int columns = m->columns, is_narrow = uses_bf16(m), tall = is_narrow ? NARROW_TILE : TILE;
    int as_stored = is_narrow ? m->kind == BFLOAT16 && NARROW_ROWS == 1 : m->kind == FLOAT32;
    for (int row = first; row < last; row += tall) {
        const void *w[NARROW_TILE];
        for (int r = 0; r < tall; r++) {
            int index = least(row + r, last - 1);
            float *unpacked = panel + r * columns;
            if (as_stored) {
                w[r] = row_of(m, index);
                continue;
            }
            unpack_row(m, index, unpacked);
            w[r] = is_narrow ? (void *)narrow_row((uint16_t *)panel, r, columns) : unpacked;
            if (is_narrow) to_bf16(unpacked, columns, (uint16_t *)w[r]);
        }
        for (int token = 0; token < tokens; token += TOKENS) {
            float tile[TOKENS][NARROW_TILE];
            if (is_narrow) {
                const uint16_t *x[TOKENS];
                for (int t = 0; t < TOKENS; t++) x[t] = narrow_row(narrow, token + t < tokens ? token + t : 0, columns);
                tile_bf16((const uint16_t *const *)w, x, columns, tile);
            } else {
                const float *x[TOKENS];
                for (int t = 0; t < TOKENS; t++) x[t] = floats + (size_t)(token + t < tokens ? token + t : 0) * (size_t)columns;
                tile_floats((const float *const *)w, x, columns, tile);
            }
            for (int t = 0; t < TOKENS && token + t < tokens; t++)
                for (int r = 0; r < tall && row + r < last; r++)
                    y[(size_t)(token + t) * (size_t)stride + (size_t)(row + r - first)] = tile[t][r];
        }
    }
}
