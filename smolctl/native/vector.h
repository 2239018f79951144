// SIMD float vectors with the compiler's vector extensions: one source for AVX-512, AVX2, SSE2, NEON and WebAssembly.
#pragma once

#include <stdint.h>

#if defined(__wasm__)
#include <wasm_simd128.h>

#include "wasm.h"
#else
#include <math.h>
#include <stdlib.h>
#include <string.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 32  // rows are padded to a multiple of it
#define PARTS (BLOCK / LANES)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef int8_t bytes_vec __attribute__((vector_size(LANES)));
typedef uint8_t ubytes_vec __attribute__((vector_size(LANES)));
typedef uint16_t halves_vec __attribute__((vector_size(2 * LANES)));
typedef int16_t shorts_vec __attribute__((vector_size(2 * LANES)));
// Weights may be used in place in a memory-mapped file, which guarantees no alignment.
#define LOAD(type, pointer) ({ type loaded_; memcpy(&loaded_, (pointer), sizeof loaded_); loaded_; })
#define STORE(pointer, value) ({ __typeof__(value) stored_ = (value); memcpy((pointer), &stored_, sizeof stored_); })
// An integer mask: lane i is all ones if bit i of `bits` is set, else 0.
#define SPREAD(type, lanes, bits) \
    ({ type each_; for (int i_ = 0; i_ < (lanes); i_++) each_[i_] = 1 << i_; (((bits) - (type){0}) & each_) == each_; })

INLINE vec load(const float *p) { return LOAD(vec, p); }
INLINE void store(float *p, vec v) { STORE(p, v); }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE int least(int a, int b) { return a < b ? a : b; }
INLINE int pieces_of(int total, int piece) { return (total + piece - 1) / piece; }
INLINE int filled_to(int total, int piece) { return pieces_of(total, piece) * piece; }

// ---- float16 ----

#if defined(__F16C__) || defined(__aarch64__)
typedef _Float16 half;
typedef half half_vec __attribute__((vector_size(2 * LANES)));
INLINE vec from_half(const half *p) { return __builtin_convertvector(LOAD(half_vec, p), vec); }
INLINE float half_to_float(const half *p) { return (float)LOAD(half, p); }
INLINE void store_half(half *p, float x) { *p = (half)x; }
#else  // SSE2 and WebAssembly have no instructions for float16
typedef uint16_t half;

// Shift the bits into the sign, exponent and mantissa fields of float32. The result, subnormals included, is too
// small by 2^112. Infinity and NaN, which scales and cached values never are, become numbers of 65,536 and more.
#define HALF_BITS 0x8FFFE000u
INLINE vec from_half(const half *p) {
    ivec wide = __builtin_convertvector(LOAD(shorts_vec, p), ivec);
    return (vec)(wide << 13 & (int32_t)HALF_BITS) * 0x1p112f;
}
INLINE float half_to_float(const half *p) {
    uint32_t bits = (uint32_t)LOAD(int16_t, p) << 13 & HALF_BITS;
    return LOAD(float, &bits) * 0x1p112f;
}

// Rounds to nearest, ties to even. For subnormal results, the addition of 0.5 rounds.
INLINE void store_half(half *p, float x) {
    const float smallest = 0x1p-14f, limit = 65520.0f;
    uint32_t bits = LOAD(uint32_t, &x), sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    float size = LOAD(float, &bits);
    if (!(size < limit)) bits = size > limit || size == limit ? 0x7C00 : 0x7E00;
    else if (size < smallest) {
        size += 0.5f;
        bits = LOAD(uint32_t, &size) - 0x3F000000;
    } else bits = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
    *p = (half)(sign | bits);
}
#endif

INLINE float sum(vec v) {
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

// Within every four lanes: FIRST interleaves the first two lanes of a and b, LAST the last two. FIRST_PAIRS joins the
// first pairs of lanes of a and b, LAST_PAIRS the last ones.
#if LANES == 16
#define FIRST(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define LAST(a, b) __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define FIRST_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define LAST_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#elif LANES == 8
#define FIRST(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define LAST(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define FIRST_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define LAST_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define FIRST(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define LAST(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define FIRST_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define LAST_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#endif

// Horizontal sums of four vectors, in a third of the instructions of four calls of `sum`.
INLINE void sum_four(const vec v[4], float out[4]) {
    vec ab = FIRST(v[0], v[1]) + LAST(v[0], v[1]), cd = FIRST(v[2], v[3]) + LAST(v[2], v[3]);
    vec abcd = FIRST_PAIRS(ab, cd) + LAST_PAIRS(ab, cd);  // every four lanes are partial sums of the four vectors
    typedef float four __attribute__((vector_size(16)));
    four parts[LANES / 4], total;
    memcpy(parts, &abcd, sizeof parts);
    total = parts[0];
    for (int i = 1; i < LANES / 4; i++) total += parts[i];
    STORE(out, total);
}

INLINE vec choose(ivec condition, vec yes, vec no) {
    return (vec)((condition & (ivec)yes) | (~condition & (ivec)no));
}

INLINE vec maximum(vec a, vec b) { return choose(a > b, a, b); }

INLINE float highest(vec v) {
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

// e^x to about one ulp; 0 below -87.
INLINE vec exponential(vec x) {
    const float magic = 12582912.0f;  // 1.5 × 2^23: adding it rounds to an integer
    vec clamped = maximum(choose(x < 88.0f, x, all(88.0f)), all(-87.0f));
    vec shifted = clamped * 1.44269504f + magic;
    vec n = shifted - magic;
    vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, for precision
    vec p = all(1.9875691500e-4f);  // coefficients of Cephes' expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = (ivec)shifted << 23;  // the low bits of shifted are n
    return choose(x < -87.0f, all(0.0f), (vec)((ivec)p + exponent));
}

INLINE float exponential_of(float x) { return exponential(all(x))[0]; }

// ---- bfloat16 ----

// CPUs with bfloat16 dot products that accumulate in float32 use them in matmuls of many tokens, except for float32
// weights, which would lose precision. `narrow` rounds two vectors of consecutive columns to one, `pair_up` makes their lanes
// pairs.
#if defined(__AVX512BF16__)
#define HAS_BF16_PRODUCTS 1
#define NARROW_ROWS 1
// Every lane holds a pair of columns.
INLINE vec add_pairs(vec total, vec a, vec b) { return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b); }
INLINE vec narrow(vec first, vec second) { return (vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
INLINE vec pair_up(vec first, vec second) {
    typedef uint16_t words __attribute__((vector_size(64)));
    words both = (words)narrow(first, second);
    return (vec)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#define HAS_BF16_PRODUCTS 1
#define NARROW_ROWS 2
// BFMMLA multiplies 4 columns of two tokens with those of two rows.
INLINE vec add_squares(vec total, vec a, vec b) { return (vec)vbfmmlaq_f32((float32x4_t)total, (bfloat16x8_t)a, (bfloat16x8_t)b); }
INLINE vec narrow(vec first, vec second) {
    return (vec)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)first), (float32x4_t)second);
}
#else
#define HAS_BF16_PRODUCTS 0
#define NARROW_ROWS 1
INLINE vec narrow(vec first, vec second) { return (void)second, first; }
#endif
#define HAS_PAIRS (HAS_BF16_PRODUCTS && NARROW_ROWS == 1)
#if !HAS_PAIRS
INLINE vec add_pairs(vec total, vec a, vec b) { return (void)a, (void)b, total; }
INLINE vec pair_up(vec first, vec second) { return (void)second, first; }
#endif

// A row of activations in bfloat16. Groups of NARROW_ROWS rows are interleaved, 4 columns of each at a time.
INLINE uint16_t *narrow_row(const uint16_t *rows, int row, int columns) {
    return (uint16_t *)rows + (size_t)(row / NARROW_ROWS * NARROW_ROWS) * (size_t)columns + row % NARROW_ROWS * 4;
}

// Write a token in bfloat16 to its `narrow_row`.
static void to_bf16(const float *from, int columns, uint16_t *to) {
    for (int at = 0; HAS_BF16_PRODUCTS && at < columns; at += 2 * LANES) {
        vec both = narrow(load(from + at), load(from + at + LANES));
        if (NARROW_ROWS == 1) store((float *)(to + at), both);
        else for (int i = 0; i < 2; i++) memcpy(to + 2 * at + i * 8, (char *)&both + i * 8, 8);
    }
}

// ---- register tiles ----

// A tile has VECTORS vectors of accumulators for each of TOKENS rows: as many as there are registers for.
#define VECTORS 2
#define MOST_VECTORS 4  // with fewer rows
#if defined(__AVX512F__) || defined(__aarch64__)
#define TOKENS 12  // 32 registers
#else
#define TOKENS 6  // 16 registers, assumed for WebAssembly too
#endif

// Unrolled, as the accumulators would not stay in registers otherwise.
#define EACH_OF(count, i) _Pragma("clang loop unroll(full)") for (int i = 0; i < (count); i++)

// Data types of the KV cache; library.py and engine.js repeat the numbers. KEPT_INT8 has a scale for each position of
// each head. KEPT_PAIRS, pairs of bfloat16, is for weights only.
enum format { KEPT_FLOAT32, KEPT_FLOAT16, KEPT_INT8, KEPT_PAIRS };

INLINE size_t bytes_of(int format) { return format == KEPT_FLOAT32 ? 4 : format == KEPT_FLOAT16 ? 2 : 1; }

// LANES elements as floats, or pairs. The scales of KEPT_INT8 are not applied.
INLINE vec load_kept(int format, const void *base, size_t at) {
    if (format == KEPT_INT8) return __builtin_convertvector(LOAD(bytes_vec, (const int8_t *)base + at), vec);
    return format == KEPT_FLOAT16 ? from_half((const half *)base + at) : load((const float *)base + at);
}

// total[r][v] += x[r × stride + u] × w[u × step + v × gap …], for all u: an outer product for each u. `ahead`: prefetch
// distance in bytes, or 0. `pairs`: x holds pairs of bfloat16, and w is rounded to them.
INLINE void add_products(int format, int pairs, int rows, int vectors, int ahead, const void *w, size_t step, size_t gap, int units,
                         const float *x, size_t stride, vec total[][MOST_VECTORS]) {
    for (int u = 0; u < units; u += 1 + pairs) {
        vec own[MOST_VECTORS];
        EACH_OF(vectors, v) {
            size_t at = (size_t)u * step + (size_t)v * gap;
            if (ahead) __builtin_prefetch((const char *)w + at * bytes_of(format) + ahead);
            own[v] = load_kept(format, w, at);
            if (pairs) own[v] = pair_up(own[v], u + 1 < units ? load_kept(format, w, at + step) : all(0));
        }
        EACH_OF(rows, r) {
            vec factor = all(x[(size_t)r * stride + (size_t)(u >> pairs)]);
            EACH_OF(vectors, v)
                total[r][v] = pairs || format == KEPT_PAIRS ? add_pairs(total[r][v], own[v], factor) : total[r][v] + own[v] * factor;
        }
    }
}
