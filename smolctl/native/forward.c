// The forward pass of a Llama-like network on a CPU: new tokens of any sequences in, logits out.
//
// All threads execute `run`. Between barriers they claim pieces of work from a counter, so that a thread that
// loses its core delays only the piece it is working on.
//
// Dimensions: N tokens of the call, C hidden_size, H query heads, K key/value heads, D head_dim, F
// intermediate_size. Rows of activations are zero-padded to a multiple of BLOCK.
//
// In a call of at most `exact` tokens, each token gets the same bits as in a call of its own: sequences can be
// batched, and speculative decoding checks draft tokens against the very logits of plain decoding. `exact` is EXACT
// if all matrices are packed, else FEW. In a larger call, each token gets the same bits as in any other larger call,
// so that prompts can be batched.
//
// A context runs one call at a time. A concurrent call returns BUSY and changes nothing; a call whose `cancelled`
// flag is set by another thread returns CANCELLED after the current layer.

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "attention.h"
#include "integers.h"
#include "threads.h"

// Return values; library.py repeats the numbers.
enum status { DONE, NO_MEMORY, BUSY, CANCELLED };
// Version of the structures and functions that library.py declares.
#define INTERFACE 6

typedef struct {
    matrix q, k, v, o, gate, up, down;
    const float *input_norm, *post_attention_norm;  // (C)
    const float *q_bias, *k_bias, *v_bias;          // (H × D), (K × D), (K × D), or NULL
    const float *q_norm, *k_norm;                   // (D), the same for all heads, or NULL
    int32_t rotates;                                // whether this layer uses RoPE, if the model has it
} layer;

typedef struct {
    int32_t layer_count, hidden_size, heads, kv_heads, head_dim, intermediate_size;
    float eps, residual_scale;
    const layer *layers;
    matrix table, head;
    const float *norm;       // (C)
    const float *positions;  // (context, C): learned position embeddings, or NULL
    const float *rotary;     // (2, rotary_positions, D / 2): cos and sin of RoPE, or NULL
    int32_t rotary_positions;
} model;

// The tokens of one call. Those of a sequence are adjacent and in order.
typedef struct {
    int32_t count;
    const int32_t *tokens, *sequences, *positions;  // (count)
    cache cache;
    int32_t wanted_count;
    const int32_t *wanted;  // (wanted_count): indices of tokens whose logits are wanted
    float *logits;          // (wanted_count, vocab_size)
    atomic_int *cancelled;  // nonzero: stop the call; any thread may set it
} batch;

#define SPLIT_POSITIONS 128  // per part of a long context; threads share the parts
#define PHASES 7             // per layer, each with a counter of claimed pieces
#define EXACT 16             // tokens; engine.js repeats the number
#define PIECE_ROWS 32        // matrix rows per piece of a matmul of many tokens
#define EXACT_ROWS 320       // most matrix rows per piece of a matmul of up to EXACT tokens

typedef struct {
    model m;
    pool *pool;
    int chunk;      // most tokens per call
    int exact;      // most tokens per call that all get the bits of a call of their own
    int narrows;    // whether matmuls of more tokens read bfloat16
    int packs;      // how many matrices are packed: 0 none, 1 some, 2 all
    int C, A, F;    // padded widths of rows: hidden_size, heads × head_dim, intermediate_size
    int widest;     // the largest of these
    int together;   // tokens per piece of attention: their queries of a key/value head fill tiles of QUERIES rows
    // Rows of `chunk` tokens, and TOKENS more for reads past the last one:
    float *x, *normed, *k, *v, *attended, *hidden;  // (rows, C, C, K × D, K × D, A, F)
    float *q;              // (K, rows, H / K, D)
    uint16_t *narrow;      // (rows, widest): input of the next large matmul, in bfloat16
    integers *packed;      // (chunk): the same in integers, stored in `packed_room`
    float *packed_room;    // (chunk, INTEGER_ROOM(widest))
    float *scratch;        // (threads, scratch_size)
    size_t scratch_size;
    partial *partials;     // (tokens × H, splits)
    float *partial_values; // (tokens × H, splits, value_stride)
    size_t partial_room;   // size of `partial_values` in floats
    atomic_int *claimed;   // (layers × PHASES + PHASES)
    atomic_int *attended_parts;  // (chunk / together): finished parts per block of tokens
    atomic_int busy;       // whether a call or `smolctl_destroy` is running
    const batch *b;        // the current call
    int first_layer, last_layer;  // layers to run: all, unless JavaScript divides a call
    int splits;
    int leaving;           // whether the call was cancelled
} context;

// Matrix rows per piece of a matmul, a multiple of 16. With few tokens, one large piece per thread streams memory.
INLINE int rows_of_piece(const pool *p, int rows, int tokens) {
    int share = pieces_of(rows, p->threads);
    if (tokens > EXACT) return PIECE_ROWS;
    return tokens > FEW ? filled_to(pieces_of(share, pieces_of(share, EXACT_ROWS)), PIECE_ROWS) : filled_to(share, 16);
}

// Claims pieces 0, 1, … of a phase until all are taken.
#define EACH_PIECE(c, phase, pieces, piece) \
    for (int piece; (piece = atomic_fetch_add_explicit(&(c)->claimed[phase], 1, memory_order_relaxed)) < (pieces);)

// Scratch memory of a thread: unpacked weights, normed vectors, their layouts, a spare attention row, a piece of `up`.
typedef struct { float *panel, *normed, *forms, *spare, *up; } room;

// Size in floats of the layouts of one vector.
#define FORMS(columns) ((columns) + INTEGER_ROOM(columns))

static room room_of(const context *c, int thread) {
    float *panel = c->scratch + (size_t)thread * c->scratch_size, *normed = panel + OPENED(c->widest);
    float *forms = normed + FEW * c->widest, *spare = forms + FEW * FORMS(c->widest);
    return (room){panel, normed, forms, spare, spare + c->widest};
}

// ---- matmuls ----

// The activations that a matmul reads: a few vectors in every layout, or rows of many tokens.
typedef struct {
    int tokens;
    vector_in few[FEW];
    integers own[FEW];
    const integers *packed;  // of many tokens, or NULL
    const float *floats;
    const uint16_t *narrow;
} operand;

INLINE int in_integers(const context *c, int tokens) { return c->packs && (tokens <= c->exact || !HAS_BF16_PRODUCTS); }

// Convert a row of activations to the layouts that matmuls of many tokens read.
static void prepare_row(const context *c, const float *row, int width, int token, int tokens) {
    if (tokens <= FEW) return;
    if (in_integers(c, tokens))
        c->packed[token] = prepare_integers(row, width, c->packed_room + (size_t)token * INTEGER_ROOM(c->widest));
    if (c->narrows && tokens > c->exact) to_bf16(row, width, narrow_row(c->narrow, token, width));
}

static operand prepare(const context *c, const float *x, int columns, int tokens, const room *own) {
    operand made = {tokens, {{0}}, {{0}}, in_integers(c, tokens) ? c->packed : NULL, x, c->narrow};
    for (int t = 0; t < tokens && tokens <= FEW; t++) {
        float *forms = own->forms + (size_t)t * FORMS(columns);
        if (c->packs < 2) made.few[t] = prepare_vector(x + (size_t)t * columns, columns, forms);
        if (c->packs) made.own[t] = prepare_integers(x + (size_t)t * columns, columns, forms + columns);
    }
    return made;
}

// y[token × stride + row - first] = row of m · token.
static void product(const matrix *m, int first, int last, const operand *x, const room *own, float *y, int stride) {
    const integers *packed = x->tokens <= FEW ? x->own : x->packed;
    if (is_packed(m) && packed) multiply_integers(m, first, last, packed, x->tokens, own->panel, y, (size_t)stride);
    else if (x->tokens <= FEW) dot_rows(m, first, last, x->few, x->tokens, y, stride);
    else multiply(m, first, last, x->floats, x->narrow, x->tokens, own->panel, y, stride);
}

// x += residual_scale × m · operand, with the rows of m divided among the threads.
static void add_branch(context *c, const matrix *m, const operand *x, int phase, const room *own) {
    int most = rows_of_piece(c->pool, m->rows, x->tokens);
    EACH_PIECE(c, phase, pieces_of(m->rows, most), piece) {
        int first = piece * most, rows = least(most, m->rows - first);
        product(m, first, first + rows, x, own, own->up, most);
        for (int t = 0; t < x->tokens; t++)
            for (int r = 0; r < rows; r++)
                c->x[(size_t)t * c->C + first + r] += own->up[t * most + r] * c->m.residual_scale;
    }
    barrier(c->pool);
}

static void rms_norm(const float *x, const float *weight, int size, float eps, float *out) {
    vec squares = {0};
    int at = 0;
    for (; at + LANES <= size; at += LANES) squares += load(x + at) * load(x + at);
    float total = sum(squares);
    for (; at < size; at++) total += x[at] * x[at];
    float scale = 1.0f / sqrtf(total / (float)size + eps);
    for (int i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
}

// RMSNorm of `tokens` (NULL: the first `count`), ready for a matmul. With few tokens, every thread computes all
// norms itself, which is cheaper than a barrier.
static operand normalize(context *c, const float *weight, const int32_t *tokens, int count, int phase, const room *own) {
    const model *m = &c->m;
    float *to = count <= FEW ? own->normed : c->normed;
#define NORM(i) rms_norm(c->x + (size_t)(tokens ? tokens[i] : i) * c->C, weight, m->hidden_size, m->eps, to + (size_t)(i) * c->C)
    for (int i = 0; i < count && count <= FEW; i++) NORM(i);
    if (count > FEW) {
        EACH_PIECE(c, phase, count, i) {
            NORM(i);
            prepare_row(c, to + (size_t)i * c->C, c->C, i, count);
        }
        barrier(c->pool);
    }
#undef NORM
    return prepare(c, to, c->C, count, own);
}

// ---- attention ----

INLINE size_t cached_head(const context *c, int index, int token, int kv_head) {
    const batch *b = c->b;
    return ((size_t)index * b->cache.sequences + (size_t)b->sequences[token]) * (size_t)c->m.kv_heads + (size_t)kv_head;
}

// RoPE: rotate the two halves of a head by the angles of its position.
static void rotate(const model *m, int position, float *head) {
    int half_dim = m->head_dim / 2;
    const float *cos = m->rotary + (size_t)position * half_dim, *sin = cos + (size_t)m->rotary_positions * half_dim;
    for (int i = 0; i < half_dim; i++) {
        float left = head[i], right = head[i + half_dim];
        head[i] = left * cos[i] - right * sin[i];
        head[i + half_dim] = right * cos[i] + left * sin[i];
    }
}

// The query rows of a key/value head, (tokens, H / K, D), from a token on.
INLINE float *queries_of(const context *c, int kv_head, int token) {
    return c->q + ((size_t)kv_head * (size_t)(c->chunk + TOKENS) + (size_t)token) * (size_t)(c->m.heads / c->m.kv_heads * c->m.head_dim);
}

// One head of q, k or v for all tokens: matmul, bias, norm and RoPE. Keys and values are stored in the cache.
static void project_head(context *c, int index, int piece, const operand *x, const room *own) {
    const model *m = &c->m;
    const layer *l = &m->layers[index];
    const batch *b = c->b;
    int D = m->head_dim, is_q = piece < m->heads, is_k = !is_q && piece < m->heads + m->kv_heads;
    int heads = is_q ? m->heads : m->kv_heads, head = is_q ? piece : (piece - m->heads) % m->kv_heads;
    int group = is_q ? m->heads / m->kv_heads : 1, stride = (is_q ? group : heads) * D;
    float *to = is_q ? queries_of(c, head / group, 0) + head % group * D : (is_k ? c->k : c->v) + (size_t)head * D, scale = 1.0f / sqrtf((float)D);
    const float *bias = is_q ? l->q_bias : is_k ? l->k_bias : l->v_bias;
    const float *norm = is_q ? l->q_norm : is_k ? l->k_norm : NULL;
    product(is_q ? &l->q : is_k ? &l->k : &l->v, head * D, head * D + D, x, own, to, stride);
    for (int t = 0; t < b->count; t++) {
        float *row = to + (size_t)t * stride;
        if (bias) for (int d = 0; d < D; d++) row[d] += bias[head * D + d];
        if (norm) rms_norm(row, norm, D, m->eps, row);
        if (m->rotary && l->rotates && (is_q || is_k)) rotate(m, b->positions[t], row);
        if (is_q) for (int d = 0; d < D; d++) row[d] *= scale;
        else if (is_k) remember_key(&b->cache, cached_head(c, index, t, head), D, b->positions[t], row);
        else remember_value(&b->cache, cached_head(c, index, t, head), D, b->positions[t], row);
    }
}

// Attention of the query heads that share kv_head, for `count` tokens of one sequence over one part of the context.
static void attend_group(context *c, int index, int token, int count, int kv_head, int split, float *spare) {
    const model *m = &c->m;
    const batch *b = c->b;
    int D = m->head_dim, group = m->heads / m->kv_heads, stride = b->cache.value_stride, rows = count * group;
    const cached from = cached_at(&b->cache, cached_head(c, index, token, kv_head), D);
    for (int row = 0; row < rows; row += QUERIES) {
        queries q = {.query = queries_of(c, kv_head, token) + (size_t)row * (size_t)D};
        partial out[QUERIES], *places[QUERIES];
        int furthest = 0;
        q.count = least(QUERIES, rows - row), q.again = row || b->count > c->exact;
        for (int r = 0; r < QUERIES; r++) {
            int is_used = row + r < rows, t = token + (row + r) / group;
            size_t query = (size_t)t * m->heads + (size_t)(kv_head * group + (row + r) % group);
            size_t place = query * (size_t)c->splits + (size_t)split;
            q.limit[r] = is_used ? b->positions[t] + 1 : 0;
            furthest = q.limit[r] > furthest ? q.limit[r] : furthest;
            places[r] = is_used ? &c->partials[place] : NULL;
            out[r] = (partial){-INFINITY, 0, places[r] ? c->partial_values + place * (size_t)stride : spare};
            memset(out[r].values, 0, sizeof(float) * (size_t)stride);
        }
        // Parts begin at fixed positions, so that other tokens of the call do not change the bits.
        int span = c->splits > 1 ? SPLIT_POSITIONS : filled_to(furthest, KEYS);
        int first = split * span, last = least(first + span, furthest);
        if (first < last) attend(&b->cache, &from, D, &q, first, last, out);
        for (int r = 0; r < QUERIES; r++) if (places[r]) *places[r] = out[r];
    }
}

// Merge the partial softmaxes of one head of one token.
static void merge(const context *c, int token, int head) {
    int D = c->m.head_dim;
    const partial *parts = c->partials + ((size_t)token * c->m.heads + (size_t)head) * (size_t)c->splits;
    float *to = c->attended + (size_t)token * c->A + (size_t)head * D, highest = -INFINITY, total = 0;
    for (int s = 0; s < c->splits; s++) if (parts[s].maximum > highest) highest = parts[s].maximum;
    memset(to, 0, sizeof *to * (size_t)D);
    for (int s = 0; s < c->splits; s++) {
        if (parts[s].total == 0) continue;
        float factor = exponential_of(parts[s].maximum - highest);
        total += parts[s].total * factor;
        for (int d = 0; d < D; d++) to[d] += parts[s].values[d] * factor;
    }
    for (int d = 0; d < D; d++) to[d] /= total;
}

static void run_attention(context *c, int index, int phase, const room *own) {
    const model *m = &c->m;
    const batch *b = c->b;
    int N = b->count;
    operand x = normalize(c, m->layers[index].input_norm, NULL, N, phase, own);
    EACH_PIECE(c, phase + 1, m->heads + 2 * m->kv_heads, piece) project_head(c, index, piece, &x, own);
    barrier(c->pool);

    int blocks = pieces_of(N, c->together), parts = m->kv_heads * c->splits;
    EACH_PIECE(c, phase + 2, blocks * parts, piece) {
        int split = piece % c->splits, kv_head = piece % parts / c->splits, block = blocks - 1 - piece / parts;  // the longest context first
        int first = block * c->together, end = least(first + c->together, N);
        for (int token = first, next; token < end; token = next) {
            for (next = token + 1; next < end && b->sequences[next] == b->sequences[token];) next++;
            attend_group(c, index, token, next - token, kv_head, split, own->spare);
        }
        if (atomic_fetch_add_explicit(&c->attended_parts[block], 1, memory_order_acq_rel) < parts - 1) continue;
        atomic_store_explicit(&c->attended_parts[block], 0, memory_order_relaxed);
        for (int token = first; token < end; token++) {  // the thread that finished the block's last part merges
            for (int head = 0; head < m->heads; head++) merge(c, token, head);
            prepare_row(c, c->attended + (size_t)token * c->A, c->A, token, N);
        }
    }
    barrier(c->pool);
    x = prepare(c, c->attended, c->A, N, own);
    add_branch(c, &m->layers[index].o, &x, phase + 3, own);
}

// ---- MLP ----

static void run_mlp(context *c, int index, int thread, int phase, const room *own) {
    const layer *l = &c->m.layers[index];
    int N = c->b->count;
    operand x = normalize(c, l->post_attention_norm, NULL, N, phase, own);
    int most = rows_of_piece(c->pool, l->gate.rows, N);
    EACH_PIECE(c, phase + 1, pieces_of(l->gate.rows, most), piece) {
        int first = piece * most, last = least(first + most, l->gate.rows);
        product(&l->gate, first, last, &x, own, c->hidden + first, c->F);
        product(&l->up, first, last, &x, own, own->up, most);
        for (int t = 0; t < N; t++)
            for (int r = 0; r < last - first; r += LANES) {
                float *to = c->hidden + (size_t)t * c->F + first + r;
                vec gate = load(to);
                store(to, gate / (1.0f + exponential(-gate)) * load(own->up + t * most + r));
            }
    }
    barrier(c->pool);
    if (N > FEW && (c->narrows || c->packs)) {
        for (int t = thread; t < N; t += c->pool->threads) prepare_row(c, c->hidden + (size_t)t * c->F, c->F, t, N);
        barrier(c->pool);
    }
    x = prepare(c, c->hidden, c->F, N, own);
    add_branch(c, &l->down, &x, phase + 2, own);
}

// ---- the whole network ----

static void embed(const context *c, int token) {
    const model *m = &c->m;
    float *to = c->x + (size_t)token * c->C;
    unpack_row(&m->table, c->b->tokens[token], to);
    if (!m->positions) return;
    const float *position = m->positions + (size_t)c->b->positions[token] * m->hidden_size;
    for (int i = 0; i < m->hidden_size; i++) to[i] += position[i];
}

static void run(void *argument, int thread) {
    context *c = argument;
    const batch *b = c->b;
    const matrix *head = &c->m.head;
    room own = room_of(c, thread);
    for (int t = thread; !c->first_layer && t < b->count; t += c->pool->threads) embed(c, t);
    barrier(c->pool);
    for (int index = c->first_layer; index < c->last_layer; index++) {
        run_attention(c, index, index * PHASES, &own);
        // Only one thread reads the flag. The barriers of `run_mlp` publish the result: all threads leave together.
        if (thread == 0) c->leaving = atomic_load_explicit(b->cancelled, memory_order_relaxed);
        run_mlp(c, index, thread, index * PHASES + 4, &own);
        if (c->leaving) return;
    }
    if (!b->wanted_count || c->last_layer < c->m.layer_count) return;
    int phase = c->m.layer_count * PHASES;
    operand x = normalize(c, c->m.norm, b->wanted, b->wanted_count, phase, &own);
    int most = rows_of_piece(c->pool, head->rows, b->wanted_count);
    EACH_PIECE(c, phase + 1, pieces_of(head->rows, most), piece) {
        int first = piece * most, last = least(first + most, head->rows);
        product(head, first, last, &x, &own, b->logits + first, head->rows);
    }
}

static void *zeros(size_t count, size_t size) {
    size_t bytes = (count * size + 63) / 64 * 64;
    void *memory = aligned_alloc(64, bytes ? bytes : 64);
    return memory ? memset(memory, 0, bytes) : NULL;
}

#define EXPORT __attribute__((visibility("default")))

static void free_context(context *c) {
    if (c->pool) pool_destroy(c->pool);
    void *parts[] = {c->x, c->normed, c->q, c->k, c->v, c->attended, c->hidden, c->narrow, c->packed, c->packed_room,
                     c->scratch, c->partials, c->partial_values, c->claimed, c->attended_parts};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
    free(c);
}

// Free a context. While a call is running, returns BUSY and frees nothing.
EXPORT int smolctl_destroy(void *argument) {
    context *c = argument;
    if (atomic_exchange(&c->busy, 1)) return BUSY;
    free_context(c);
    return DONE;
}

static void look_at_kinds(context *c) {
    int packed = is_packed(&c->m.head), all = 7 * c->m.layer_count + 1;
    c->narrows = uses_bf16(&c->m.head);
    for (int i = 0; i < c->m.layer_count; i++) {
        const layer *l = &c->m.layers[i];
        const matrix *matrices[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (int j = 0; j < 7; j++) packed += is_packed(matrices[j]), c->narrows |= uses_bf16(matrices[j]);
    }
    c->packs = packed == all ? 2 : packed > 0;
    c->exact = c->packs == 2 ? EXACT : FEW;
}

// A new context for at most `chunk` tokens per call; NULL if out of memory. The caller still owns the model's arrays.
EXPORT void *smolctl_create(const model *m, int chunk, int threads) {
    context *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    c->m = *m;
    c->last_layer = m->layer_count;
    c->chunk = chunk > threads ? chunk : threads;
    c->C = filled_to(m->hidden_size, BLOCK), c->A = filled_to(m->heads * m->head_dim, BLOCK), c->F = filled_to(m->intermediate_size, BLOCK);
    c->widest = c->C > c->A ? c->C : c->A;
    c->widest = c->widest > c->F ? c->widest : c->F;
    for (c->together = 1; c->together * m->heads / m->kv_heads % QUERIES;) c->together++;
    look_at_kinds(c);
    size_t rows = (size_t)c->chunk + TOKENS, head = (size_t)m->head_dim;
    c->scratch_size = (size_t)(OPENED(c->widest) + FEW * FORMS(c->widest) + (1 + 2 * FEW) * c->widest) + rows * PIECE_ROWS + EXACT * EXACT_ROWS;
    c->x = zeros(rows * (size_t)c->C, sizeof(float));
    c->normed = zeros(rows * (size_t)c->C, sizeof(float));
    c->q = zeros(rows * (size_t)m->heads * head, sizeof(float));
    c->k = zeros(rows * (size_t)m->kv_heads * head, sizeof(float));
    c->v = zeros(rows * (size_t)m->kv_heads * head, sizeof(float));
    c->attended = zeros(rows * (size_t)c->A, sizeof(float));
    c->hidden = zeros(rows * (size_t)c->F, sizeof(float));
    c->narrow = zeros(c->narrows ? rows * (size_t)c->widest : 0, sizeof(uint16_t));
    c->packed = zeros(c->packs ? rows : 0, sizeof(integers));
    c->packed_room = zeros(c->packs ? rows * (size_t)INTEGER_ROOM(c->widest) : 0, sizeof(float));
    c->scratch = zeros((size_t)threads * c->scratch_size, sizeof(float));
    c->claimed = zeros((size_t)(m->layer_count + 1) * PHASES, sizeof(atomic_int));
    c->attended_parts = zeros((size_t)pieces_of(c->chunk, c->together), sizeof(atomic_int));
    c->pool = pool_create(threads);
    if (c->x && c->normed && c->q && c->k && c->v && c->attended && c->hidden && c->narrow && c->packed
        && c->packed_room && c->scratch && c->claimed && c->attended_parts && c->pool)
        return c;
    free_context(c);
    return NULL;
}

static int forward(context *c, const batch *b) {
    int longest = 0;
    for (int t = 0; t < b->count; t++) longest = b->positions[t] >= longest ? b->positions[t] + 1 : longest;
    // Many tokens give enough pieces without splits, and get the same bits whatever else the call contains.
    int splits = b->count > c->exact ? 1 : pieces_of(longest, SPLIT_POSITIONS);
    size_t rows = (size_t)b->count * (size_t)c->m.heads * (size_t)splits;
    if (rows * (size_t)b->cache.value_stride > c->partial_room) {
        free(c->partial_values);
        free(c->partials);
        c->partial_room = rows * (size_t)b->cache.value_stride;
        c->partial_values = zeros(c->partial_room, sizeof(float));
        c->partials = zeros(rows, sizeof(partial));
        if (!c->partial_values || !c->partials) {
            c->partial_room = 0;
            return NO_MEMORY;
        }
    }
    memset((void *)c->claimed, 0, sizeof *c->claimed * (size_t)(c->m.layer_count + 1) * PHASES);
    c->b = b;
    c->splits = splits;
    c->leaving = 0;
    pool_run(c->pool, run, c);
    return c->leaving ? CANCELLED : DONE;
}

// Run the tokens of a batch: stores their keys and values in its cache, and the wanted logits in `logits`. Unless it
// returns DONE, the logits and the cache at the positions of these tokens are undefined.
EXPORT int smolctl_forward(void *argument, const batch *b) {
    context *c = argument;
    if (atomic_exchange(&c->busy, 1)) return BUSY;
    int status = forward(c, b);
    atomic_store(&c->busy, 0);
    return status;
}

// Most tokens per call that all get the same bits as in a call of their own.
EXPORT int smolctl_exact(const void *argument) { return ((const context *)argument)->exact; }

EXPORT int smolctl_interface(void) { return INTERFACE; }

#if defined(__wasm__)

// ---- for JavaScript: engine.js ----

// Set where the engine's heap begins.
EXPORT void smolctl_heap(uintptr_t start) { heap = start; }

// Dequantize a matrix to floats (rows, columns), without padding. `out` needs room for BLOCK more floats.
EXPORT void smolctl_unpack(const matrix *m, int columns, float *out) {
    for (int row = 0; row < m->rows; row++) unpack_row(m, row, out + (size_t)row * (size_t)columns);
}

// Use at most `asked` threads in later calls. Returns how many of them are running now.
EXPORT int smolctl_threads(int asked) {
    int there = 1 + atomic_load(&only_pool->ready);
    only_pool->asked = least(asked, only_pool->most);
    return least(there, only_pool->asked);
}

// Make later calls run layers first..last only, on the tokens of the call that ran the layers before.
EXPORT void smolctl_layers(void *argument, int first, int last) {
    context *c = argument;
    c->first_layer = first;
    c->last_layer = last;
}

// Initial stack pointer of a helper thread: the upper end of its stack.
EXPORT char *smolctl_stack(int thread) { return helper_stacks + (size_t)thread * STACK_BYTES; }

// Turn the calling thread, which has such a stack, into a helper. Returns when the context is destroyed.
EXPORT void smolctl_help(void) {
    int thread = atomic_fetch_add(&only_pool->ready, 1) + 1;
    work(only_pool, thread);
}

#else

// ---- for Python: library.py ----

// A single matmul, for tests: y (tokens, rows) = x (tokens, columns) · m transposed, on the calling thread, with the
// kernels of a network whose matrices are all like m.
EXPORT int smolctl_multiply(const matrix *m, const float *x, int tokens, float *y) {
    size_t columns = (size_t)m->columns, rows = (size_t)tokens + TOKENS;
    context c = {.widest = m->columns, .packs = 2 * is_packed(m), .exact = is_packed(m) ? EXACT : FEW, .narrows = uses_bf16(m)};
    float *memory = zeros((size_t)OPENED(m->columns) + FEW * FORMS(columns) + rows * columns, sizeof *memory);
    c.packed_room = zeros(rows * INTEGER_ROOM(columns), sizeof(float));
    c.packed = zeros(rows, sizeof(integers));
    c.narrow = zeros(rows * columns, sizeof(uint16_t));
    int failed = !memory || !c.packed_room || !c.packed || !c.narrow;
    if (!failed) {
        room own = {.panel = memory, .forms = memory + OPENED(m->columns)};
        float *padded = memcpy(own.forms + FEW * FORMS(columns), x, sizeof *x * (size_t)tokens * columns);
        for (int t = 0; t < tokens; t++) prepare_row(&c, padded + (size_t)t * columns, m->columns, t, tokens);
        operand operand = prepare(&c, padded, m->columns, tokens, &own);
        product(m, 0, m->rows, &operand, &own, y, m->rows);
    }
    free(memory);
    free(c.packed_room);
    free(c.packed);
    free(c.narrow);
    return failed ? NO_MEMORY : DONE;
}

// The most demanding build that this CPU and system can run, as an index into LEVELS of build.py. Queries the CPU
// directly, as the compiler's runtime functions for this do not work in every shared library.
EXPORT int smolctl_level(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d, xcr0, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (~c & (bit_FMA | bit_F16C | bit_OSXSAVE | bit_AVX)) return 0;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if ((xcr0 & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;  // the system saves ymm registers
    if (~b & (bit_AVX2 | bit_BMI | bit_BMI2)) return 0;
    if ((xcr0 & 0xE6) != 0xE6) return 1;  // and zmm registers
    if (~b & (bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ | bit_AVX512CD)) return 1;
    if (~c & (bit_AVX512VNNI | bit_AVX512VBMI2 | bit_AVX512BITALG | bit_AVX512VPOPCNTDQ)) return 2;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & bit_AVX512BF16 ? 3 : 2;
#elif defined(__aarch64__) && defined(__linux__)
    // Bits of Linux's hwcap.h. Apple CPUs (virtual machines on a Mac) multiply bfloat16 at half the rate of float32
    // and gain nothing from I8MM, so the build with dot products only is faster there.
    enum { CPUID = 1 << 11, ASIMDDP = 1 << 20, I8MM_BF16 = 1 << 13 | 1 << 14, APPLE = 0x61 };
    unsigned long features = getauxval(AT_HWCAP), id = 0;
    if (!(features & ASIMDDP)) return 0;
    if (features & CPUID) __asm__("mrs %0, midr_el1" : "=r"(id));
    return ~getauxval(AT_HWCAP2) & I8MM_BF16 || id >> 24 == APPLE ? 1 : 2;
#else
    return 0;
#endif
}

#endif
