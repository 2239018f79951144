// Attention over a cache of keys and values, for any number of new tokens of any sequences.
//
// Keys lie in tiles of KEYS positions, dimension by dimension: the scores of KEYS positions grow in the
// lanes of a vector, without a sum over lanes. Values lie position by position.
#pragma once

#include "vector.h"

#define KEYS 16       // positions in a tile of keys
#define SPAN 256      // positions whose scores are held at once
#define QUERIES 4     // rows of queries that share what is loaded
#define KEY_PARTS (KEYS / LANES)

typedef struct {
    void *keys;    // (layers, sequences, heads, capacity / KEYS, head_dim, KEYS)
    void *values;  // (layers, sequences, heads, capacity, value_stride)
    int32_t half_precision;  // float16 rather than float32
    int32_t sequences;
    int32_t capacity;        // a multiple of KEYS
    int32_t value_stride;    // head_dim filled up to a multiple of LANES_MOST
} cache;

// Queries that attend together: rows of one sequence and one key/value head.
typedef struct {
    const float *query[QUERIES];  // (head_dim), scaled already
    int limit[QUERIES];           // positions that each may see
    int count;                    // rows in use; the others repeat the last one
} queries;

// What some positions contribute to a query; several of these can be put together.
typedef struct {
    float maximum, total;
    float *values;  // (value_stride): sum of e^(score - maximum) × value
} partial;

INLINE vec load_cached(int half_precision, const void *base, size_t at) {
    return half_precision ? from_half((const half *)base + at) : load((const float *)base + at);
}

INLINE void score(int half_precision, const void *keys, int head_dim, const queries *q, int position,
                  float scores[QUERIES][SPAN], int to) {
    size_t tile = (size_t)(position / KEYS) * (size_t)head_dim * KEYS;
    vec totals[QUERIES][KEY_PARTS] = {0};
    for (int d = 0; d < head_dim; d++) {
        vec k[KEY_PARTS];
        for (int p = 0; p < KEY_PARTS; p++)
            k[p] = load_cached(half_precision, keys, tile + (size_t)d * KEYS + (size_t)p * LANES);
        for (int r = 0; r < QUERIES; r++)
            for (int p = 0; p < KEY_PARTS; p++) totals[r][p] += k[p] * q->query[r][d];
    }
    for (int r = 0; r < QUERIES; r++)
        for (int p = 0; p < KEY_PARTS; p++) store(&scores[r][to + p * LANES], totals[r][p]);
}

// Scores of a row to weights, relative to the largest so far; those past `seen` become 0.
static void weigh(float *scores, int count, int seen, partial *out, int stride) {
    float highest = out->maximum;
    for (int i = 0; i < seen; i++) highest = scores[i] > highest ? scores[i] : highest;
    for (int i = seen; i < count; i++) scores[i] = -INFINITY;
    if (seen <= 0) {
        memset(scores, 0, (size_t)count * sizeof *scores);
        return;
    }
    vec total = {0};
    for (int i = 0; i < count; i += LANES) {
        vec weights = exponential(load(scores + i) - highest);
        store(scores + i, weights);
        total += weights;
    }
    float before = out->maximum == -INFINITY ? 0 : exponential_of(out->maximum - highest);
    if (before != 1)
        for (int d = 0; d < stride; d += LANES) store(out->values + d, load(out->values + d) * before);
    out->total = out->total * before + sum(total);
    out->maximum = highest;
}

#define VALUE_PARTS (LANES == 16 ? 4 : 2)

INLINE void add_values(int half_precision, const void *values, int stride, int position, int count,
                       float scores[QUERIES][SPAN], partial out[QUERIES]) {
    for (int d = 0; d < stride; d += VALUE_PARTS * LANES) {
        int parts = (stride - d) / LANES < VALUE_PARTS ? (stride - d) / LANES : VALUE_PARTS;
        vec totals[QUERIES][VALUE_PARTS] = {0};
        if (parts == VALUE_PARTS) {
            for (int i = 0; i < count; i++) {
                vec v[VALUE_PARTS];
                size_t at = (size_t)(position + i) * (size_t)stride + (size_t)d;
                for (int p = 0; p < VALUE_PARTS; p++) v[p] = load_cached(half_precision, values, at + p * LANES);
                for (int r = 0; r < QUERIES; r++)
                    for (int p = 0; p < VALUE_PARTS; p++) totals[r][p] += v[p] * scores[r][i];
            }
        } else {
            for (int i = 0; i < count; i++)
                for (int p = 0; p < parts; p++) {
                    size_t at = (size_t)(position + i) * (size_t)stride + (size_t)(d + p * LANES);
                    vec v = load_cached(half_precision, values, at);
                    for (int r = 0; r < QUERIES; r++) totals[r][p] += v * scores[r][i];
                }
        }
        for (int r = 0; r < QUERIES; r++)
            for (int p = 0; p < parts; p++) {
                float *to = out[r].values + d + p * LANES;
                store(to, load(to) + totals[r][p]);
            }
    }
}

// Let queries attend to positions first..last of one head, and put it into `out`.
INLINE void attend_kind(int half_precision, const void *keys, const void *values, int head_dim, int stride,
                        const queries *q, int first, int last, partial out[QUERIES]) {
    for (int position = first; position < last; position += SPAN) {
        float scores[QUERIES][SPAN];
        int count = last - position < SPAN ? last - position : SPAN;
        int whole = (count + KEYS - 1) / KEYS * KEYS;
        for (int to = 0; to < count; to += KEYS) score(half_precision, keys, head_dim, q, position + to, scores, to);
        for (int r = 0; r < QUERIES; r++) {
            int seen = q->limit[r] - position;
            weigh(scores[r], whole, seen < count ? seen : count, &out[r], stride);
        }
        add_values(half_precision, values, stride, position, count, scores, out);
    }
}

static void attend(const cache *c, const void *keys, const void *values, int head_dim, const queries *q,
                   int first, int last, partial out[QUERIES]) {
    if (c->half_precision) attend_kind(1, keys, values, head_dim, c->value_stride, q, first, last, out);
    else attend_kind(0, keys, values, head_dim, c->value_stride, q, first, last, out);
}

INLINE size_t head_keys(const cache *c, int head_dim) { return (size_t)c->capacity * (size_t)head_dim; }
INLINE size_t head_values(const cache *c) { return (size_t)c->capacity * (size_t)c->value_stride; }

// Store a key or a value of one position; `head` counts the heads of all layers and sequences.
static void remember_key(const cache *c, size_t head, int head_dim, int position, const float *key) {
    size_t at = head * head_keys(c, head_dim) + (size_t)(position / KEYS * head_dim * KEYS + position % KEYS);
    for (int d = 0; d < head_dim; d++, at += KEYS) {
        if (c->half_precision) store_half((half *)c->keys + at, key[d]);
        else ((float *)c->keys)[at] = key[d];
    }
}

static void remember_value(const cache *c, size_t head, int head_dim, int position, const float *value) {
    size_t at = head * head_values(c) + (size_t)position * (size_t)c->value_stride;
    for (int d = 0; d < head_dim; d++, at++) {
        if (c->half_precision) store_half((half *)c->values + at, value[d]);
        else ((float *)c->values)[at] = value[d];
    }
}
