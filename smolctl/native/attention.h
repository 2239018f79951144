// Attention over a KV cache, for any number of new tokens of any sequences.
//
// Keys are stored in transposed tiles of KEYS positions, dimension by dimension: every SIMD lane accumulates the
// score of one position, without a horizontal sum. Values are stored position by position.
#pragma once

#include "vector.h"

#define KEYS 16       // positions in a tile of keys
#define SPAN 256      // positions whose scores are buffered at once
#define QUERIES 4     // query rows that share each load of a key or value
// Key vectors in a register tile: as many as there are registers for the accumulators, to hide the latency of FMAs.
#if defined(__AVX512F__) || defined(__aarch64__)
#define KEY_PARTS 4  // 32 registers
#else
#define KEY_PARTS 2  // 16 registers
#endif
// Keys that are not in the CPU cache: at most one tile at a time, as memory is read fastest as a single stream.
#define TILE_PARTS (KEYS / LANES < KEY_PARTS ? KEYS / LANES : KEY_PARTS)

// Data types of the KV cache; library.py and engine.js repeat the numbers. KEPT_INT8 has a scale for each position of
// each head.
enum format { KEPT_FLOAT32, KEPT_FLOAT16, KEPT_INT8 };

typedef struct {
    void *keys;    // (layers, sequences, heads, capacity / KEYS, head_dim, KEYS)
    void *values;  // (layers, sequences, heads, capacity, value_stride)
    float *key_scales, *value_scales;  // for KEPT_INT8: (layers, sequences, heads, capacity)
    int32_t format;
    int32_t sequences;
    int32_t capacity;        // a multiple of KEYS
    int32_t value_stride;    // head_dim padded to a multiple of KEYS
} cache;

// One head of one sequence in a KV cache.
typedef struct {
    const void *keys, *values;
    const float *key_scales, *value_scales;
} cached;

// Queries that are processed together: rows of one sequence whose heads share a key/value head.
typedef struct {
    const float *query[QUERIES];  // (head_dim), already scaled
    int limit[QUERIES];           // number of positions that each may attend to
    int count;                    // rows in use; the others repeat the last one
    int again;                    // whether other rows have just brought the same keys into the CPU cache
} queries;

// Online-softmax state of a query over some of its positions; several of these can be merged.
typedef struct {
    float maximum, total;
    float *values;  // (value_stride): sum of e^(score - maximum) × value
} partial;

INLINE size_t bytes_of(int format) { return format == KEPT_FLOAT32 ? 4 : format == KEPT_FLOAT16 ? 2 : 1; }

// LANES elements as floats. The scales of KEPT_INT8 are not applied.
INLINE vec load_cached(int format, const void *base, size_t at) {
    if (format == KEPT_INT8) return __builtin_convertvector(LOAD(bytes_vec, (const int8_t *)base + at), vec);
    return format == KEPT_FLOAT16 ? from_half((const half *)base + at) : load((const float *)base + at);
}

// `load_cached` with a prefetch CACHED_AHEAD bytes ahead, for data in memory (see `read_ahead`). Each load prefetches
// its own line: a whole tile at once would be more outstanding cache misses than a core can track.
#define CACHED_AHEAD 4096
INLINE vec read_cached(int format, const void *base, size_t at) {
    if (LANES > 4) __builtin_prefetch((const char *)base + at * bytes_of(format) + CACHED_AHEAD);
    return load_cached(format, base, at);
}

// Dot products of the queries with the keys of `parts` × LANES positions.
INLINE void score(int format, int rows, int parts, const cached *from, int head_dim, const queries *q, int position,
                  float scores[QUERIES][SPAN], int to) {
    vec totals[QUERIES][KEY_PARTS] = {0};
    for (int d = 0; d < head_dim; d++) {
        vec k[KEY_PARTS];
        for (int p = 0; p < parts; p++) {
            int at = position + p * LANES;
            size_t place = ((size_t)(at / KEYS) * (size_t)head_dim + (size_t)d) * KEYS + (size_t)(at % KEYS);
            k[p] = parts > TILE_PARTS ? load_cached(format, from->keys, place) : read_cached(format, from->keys, place);
        }
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < parts; p++) totals[r][p] += k[p] * q->query[r][d];
    }
    for (int p = 0; p < parts; p++) {
        vec scale = format == KEPT_INT8 ? load(from->key_scales + position + p * LANES) : all(1);
        for (int r = 0; r < rows; r++)
            store(&scores[r][to + p * LANES], format == KEPT_INT8 ? totals[r][p] * scale : totals[r][p]);
    }
}

// Turn a row of scores into softmax weights relative to the largest score so far, and rescale `out` to match. Scores
// from `seen` on, which may be negative, are masked.
static void weigh(float *scores, int count, int seen, partial *out, int stride) {
    if (seen <= 0) {
        memset(scores, 0, (size_t)count * sizeof *scores);
        return;
    }
    for (int i = seen; i < count; i++) scores[i] = -INFINITY;
    vec most = all(out->maximum), total = {0};
    for (int i = 0; i < count; i += LANES) most = maximum(load(scores + i), most);
    float largest = highest(most);
    for (int i = 0; i < count; i += LANES) {
        vec weights = exponential(load(scores + i) - largest);
        store(scores + i, weights);
        total += weights;
    }
    float before = out->maximum == -INFINITY ? 0 : exponential_of(out->maximum - largest);
    if (before != 1)
        for (int d = 0; d < stride; d += LANES) store(out->values + d, load(out->values + d) * before);
    out->total = out->total * before + sum(total);
    out->maximum = largest;
}

#define VALUE_PARTS (LANES == 16 ? 4 : 2)

INLINE void add_values(int format, int rows, const void *values, int stride, int position, int count,
                       float scores[QUERIES][SPAN], partial out[QUERIES]) {
    for (int d = 0; d < stride; d += VALUE_PARTS * LANES) {
        int parts = (stride - d) / LANES < VALUE_PARTS ? (stride - d) / LANES : VALUE_PARTS;
        vec totals[QUERIES][VALUE_PARTS] = {0};
        if (parts == VALUE_PARTS) {
            for (int i = 0; i < count; i++) {
                vec v[VALUE_PARTS];
                size_t at = (size_t)(position + i) * (size_t)stride + (size_t)d;
                for (int p = 0; p < VALUE_PARTS; p++) v[p] = read_cached(format, values, at + p * LANES);
                for (int r = 0; r < rows; r++)
                    for (int p = 0; p < VALUE_PARTS; p++) totals[r][p] += v[p] * scores[r][i];
            }
        } else {
            for (int i = 0; i < count; i++)
                for (int p = 0; p < parts; p++) {
                    size_t at = (size_t)(position + i) * (size_t)stride + (size_t)(d + p * LANES);
                    vec v = load_cached(format, values, at);
                    for (int r = 0; r < rows; r++) totals[r][p] += v * scores[r][i];
                }
        }
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < parts; p++) {
                float *to = out[r].values + d + p * LANES;
                store(to, load(to) + totals[r][p]);
            }
    }
}

// Accumulate in `out` the attention of queries to positions first..last of one head.
INLINE void attend_kind(int format, int rows, const cached *from, int head_dim, int stride, const queries *q, int first,
                        int last, partial out[QUERIES]) {
    for (int position = first; position < last; position += SPAN) {
        float scores[QUERIES][SPAN];
        int count = last - position < SPAN ? last - position : SPAN;
        int whole = filled_to(count, KEYS), to = 0;
        for (; KEY_PARTS > TILE_PARTS && q->again && to + KEY_PARTS * LANES <= whole; to += KEY_PARTS * LANES)
            score(format, rows, KEY_PARTS, from, head_dim, q, position + to, scores, to);
        for (; to < whole; to += TILE_PARTS * LANES)
            score(format, rows, TILE_PARTS, from, head_dim, q, position + to, scores, to);
        for (int r = 0; r < rows; r++) {
            int seen = q->limit[r] - position;
            weigh(scores[r], whole, seen < count ? seen : count, &out[r], stride);
            for (int i = 0; i < whole && format == KEPT_INT8; i += LANES)
                store(scores[r] + i, load(scores[r] + i) * load(from->value_scales + position + i));
        }
        add_values(format, rows, from->values, stride, position, count, scores, out);
    }
}

static void attend(const cache *c, const cached *from, int head_dim, const queries *q, int first, int last, partial out[QUERIES]) {
#define ATTEND(format, rows) attend_kind(format, rows, from, head_dim, c->value_stride, q, first, last, out)
    // SmolLM has three query heads per key/value head. They get their own code: a fourth row would cost a third more.
#define ATTEND_ROWS(format) if (q->count == 3) ATTEND(format, 3); else ATTEND(format, QUERIES)
    switch (c->format) {
    case KEPT_FLOAT32: ATTEND_ROWS(KEPT_FLOAT32); break;
    case KEPT_FLOAT16: ATTEND_ROWS(KEPT_FLOAT16); break;
#if !defined(__wasm__)  // the web page never uses it
    case KEPT_INT8: ATTEND_ROWS(KEPT_INT8); break;
#endif
    }
#undef ATTEND_ROWS
#undef ATTEND
}

INLINE size_t head_keys(const cache *c, int head_dim) { return (size_t)c->capacity * (size_t)head_dim; }
INLINE size_t head_values(const cache *c) { return (size_t)c->capacity * (size_t)c->value_stride; }

// `head` is the index of a head over all layers and sequences.
INLINE cached cached_at(const cache *c, size_t head, int head_dim) {
    size_t bytes = bytes_of(c->format);
    size_t scales = head * (size_t)c->capacity;
    return (cached){(const char *)c->keys + head * head_keys(c, head_dim) * bytes,
                    (const char *)c->values + head * head_values(c) * bytes,
                    c->key_scales + scales, c->value_scales + scales};
}

// Store floats in `format` at every `step`th element from `at` on, and their scale if the format has one.
INLINE void remember(int format, const float *from, int count, void *base, size_t at, size_t step, float *scale) {
    float most = 0, units = 0, added = 0;
    if (format == KEPT_INT8) {
        for (int d = 0; d < count; d++) most = fabsf(from[d]) > most ? fabsf(from[d]) : most, added += 0 * from[d];
        units = most > 1e-30f ? 127 / most : 0;
        *scale = (most + added) / 127;  // NaN if a number is NaN or infinite
    }
    for (int d = 0; d < count; d++, at += step) {
        const float magic = 12582912.0f;  // rounds, see `exponential`
        if (format == KEPT_INT8) ((int8_t *)base)[at] = (int8_t)(added == 0 ? from[d] * units + magic - magic : 0);
        else if (format == KEPT_FLOAT16) store_half((half *)base + at, from[d]);
        else ((float *)base)[at] = from[d];
    }
}

#define REMEMBER(...) \
    if (c->format == KEPT_FLOAT16) remember(KEPT_FLOAT16, __VA_ARGS__); \
    else if (c->format == KEPT_FLOAT32) remember(KEPT_FLOAT32, __VA_ARGS__); \
    else remember(KEPT_INT8, __VA_ARGS__);

static void remember_key(const cache *c, size_t head, int head_dim, int position, const float *key) {
    size_t at = head * head_keys(c, head_dim) + (size_t)(position / KEYS * head_dim * KEYS + position % KEYS);
    REMEMBER(key, head_dim, c->keys, at, KEYS, c->key_scales + head * (size_t)c->capacity + position);
}

static void remember_value(const cache *c, size_t head, int head_dim, int position, const float *value) {
    size_t at = head * head_values(c) + (size_t)position * (size_t)c->value_stride;
    REMEMBER(value, head_dim, c->values, at, 1, c->value_scales + head * (size_t)c->capacity + position);
}
