// Attention over a KV cache, for any number of new tokens of any sequences.
//
// Keys are stored in transposed tiles of KEYS positions, dimension by dimension: every SIMD lane accumulates the
// score of one position, without a horizontal sum. Values are stored position by position.
#pragma once

#include "vector.h"

#define KEYS 16       // positions in a tile of keys
#define SPAN 256      // positions whose scores are buffered at once
#define QUERIES TOKENS  // most query rows that share each load of a key or value, with VECTORS vectors at a time
#define FEW_QUERIES 4   // rows up to which there are registers for FEW_VECTORS vectors
#define FEW_VECTORS (TOKENS * VECTORS < FEW_QUERIES * MOST_VECTORS ? VECTORS : MOST_VECTORS)

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
    const float *query;   // (QUERIES, head_dim), already scaled
    int limit[QUERIES];   // number of positions that each may attend to; 0 for unused rows
    int count;            // rows in use
    int again;            // whether other rows have just brought the same keys into the CPU cache
} queries;

// Online-softmax state of a query over some of its positions; several of these can be merged.
typedef struct {
    float maximum, total;
    float *values;  // (value_stride): sum of e^(score - maximum) × value
} partial;

// Prefetch distance in bytes, for keys and values in memory (see `read_ahead`). Each load prefetches its own line: a
// whole tile at once would be more outstanding cache misses than a core can track.
#define CACHED_AHEAD (LANES > 4 ? 4096 : 0)

// Dot products of the queries with the keys of `vectors` × LANES positions.
INLINE void score(int format, int rows, int vectors, int ahead, const cached *from, int head_dim, const queries *q, int position,
                  float scores[QUERIES][SPAN], int to) {
    vec totals[QUERIES][MOST_VECTORS] = {0};
    size_t tile = KEYS * (size_t)head_dim;
    const char *keys = (const char *)from->keys + (position / KEYS * tile + (size_t)(position % KEYS)) * bytes_of(format);
    add_products(format, rows, vectors, ahead, keys, KEYS, LANES == KEYS ? tile : LANES, head_dim, q->query, (size_t)head_dim, totals);
    EACH_OF(vectors, v) {
        vec scale = format == KEPT_INT8 ? load(from->key_scales + position + v * LANES) : all(1);
        EACH_OF(rows, r) store(&scores[r][to + v * LANES], format == KEPT_INT8 ? totals[r][v] * scale : totals[r][v]);
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

// Add `count` values, weighted by scores, to `out`: `vectors` × LANES dimensions from d on.
INLINE void add_values(int format, int rows, int vectors, const void *values, int stride, int position, int count, int d,
                       float scores[QUERIES][SPAN], partial out[QUERIES]) {
    vec totals[QUERIES][MOST_VECTORS] = {0};
    const char *from = (const char *)values + ((size_t)position * (size_t)stride + (size_t)d) * bytes_of(format);
    add_products(format, rows, vectors, CACHED_AHEAD, from, (size_t)stride, LANES, count, scores[0], SPAN, totals);
    EACH_OF(rows, r) EACH_OF(vectors, v) {
        float *to = out[r].values + d + v * LANES;
        store(to, load(to) + totals[r][v]);
    }
}

// Accumulate in `out` the attention of queries to positions first..last of one head, `most` vectors at a time.
INLINE void attend_kind(int format, int rows, int most, const cached *from, int head_dim, int stride, const queries *q, int first,
                        int last, partial out[QUERIES]) {
    // Keys that are not in the CPU cache: at most one tile at a time, as memory is read fastest as a single stream.
    const int tile = KEYS / LANES < most ? KEYS / LANES : most;
    for (int position = first; position < last; position += SPAN) {
        float scores[QUERIES][SPAN];
        int count = last - position < SPAN ? last - position : SPAN;
        int whole = filled_to(count, KEYS), to = 0, d = 0;
        for (; most > tile && q->again && to + most * LANES <= whole; to += most * LANES)
            score(format, rows, most, 0, from, head_dim, q, position + to, scores, to);
        for (; to < whole; to += tile * LANES)
            score(format, rows, tile, CACHED_AHEAD, from, head_dim, q, position + to, scores, to);
        for (int r = 0; r < rows; r++) {
            int seen = q->limit[r] - position;
            weigh(scores[r], whole, seen < count ? seen : count, &out[r], stride);
            for (int i = 0; i < whole && format == KEPT_INT8; i += LANES)
                store(scores[r] + i, load(scores[r] + i) * load(from->value_scales + position + i));
        }
        for (; d + most * LANES <= stride; d += most * LANES)
            add_values(format, rows, most, from->values, stride, position, count, d, scores, out);
        for (; d < stride; d += LANES) add_values(format, rows, 1, from->values, stride, position, count, d, scores, out);
    }
}

static void attend(const cache *c, const cached *from, int head_dim, const queries *q, int first, int last, partial out[QUERIES]) {
#define ATTEND(format, rows, most) attend_kind(format, rows, most, from, head_dim, c->value_stride, q, first, last, out)
    // SmolLM has three query heads per key/value head. They get their own code: a fourth row would cost a third more.
#define ATTEND_ROWS(format) \
    if (q->count == 3) ATTEND(format, 3, FEW_VECTORS); \
    else if (q->count <= FEW_QUERIES) ATTEND(format, FEW_QUERIES, FEW_VECTORS); \
    else ATTEND(format, QUERIES, VECTORS);
    switch (c->format) {
    case KEPT_FLOAT32: ATTEND_ROWS(KEPT_FLOAT32) break;
    case KEPT_FLOAT16: ATTEND_ROWS(KEPT_FLOAT16) break;
#if !defined(__wasm__)  // the web page never uses it
    case KEPT_INT8: ATTEND_ROWS(KEPT_INT8) break;
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
