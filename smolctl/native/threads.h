// A thread pool. All threads run the same function, with barriers inside it, and sleep between calls.
#pragma once

#include <stdatomic.h>

#include "vector.h"

#if defined(__wasm__)
#define PAUSE()
#elif defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE()
#endif

#if !defined(__wasm__)
#include <pthread.h>
#include <sched.h>
#endif

// A waiting thread spins PATIENCE times, about 50 microseconds, in which the others arrive unless they have lost their
// core. Then it yields its own core OFFERS times, about a millisecond, and then sleeps.
#if defined(__wasm__)
#define PATIENCE 50000  // WebAssembly has no pause instruction
#define OFFERS 0
#else
#define PATIENCE 2000
#define OFFERS 2000
#endif

#define MOST_THREADS 1024

typedef struct pool {
    int threads;       // that take part in the current job
    int most;          // upper limit
    int asked;         // requested number
    atomic_int ready;  // threads besides number 0 that can take part in jobs
    void (*function)(void *argument, int thread);
    void *argument;
    atomic_uint job;   // grows by MOST_THREADS per job; modulo MOST_THREADS: threads that take part
    atomic_uint round; // counts barriers
    atomic_int sleeping, arrived;
    int stop;
#if !defined(__wasm__)
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t *handles;
#endif
} pool;

// ---- sleeping until `job` or `round` changes, by the means of each platform ----

#if !defined(__wasm__)

static void offer_core(void) { sched_yield(); }

static void sleep_until_change(pool *p, atomic_uint *value, unsigned before) {
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleeping, 1);
    while (atomic_load(value) == before) pthread_cond_wait(&p->wake, &p->mutex);
    atomic_fetch_sub(&p->sleeping, 1);
    pthread_mutex_unlock(&p->mutex);
}

static void wake_for_change(pool *p, atomic_uint *value) {
    (void)value;
    if (!atomic_load(&p->sleeping)) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

#elif defined(__wasm_atomics__)

static void offer_core(void) {}
static void sleep_until_change(pool *p, atomic_uint *value, unsigned before) {
    (void)p, __builtin_wasm_memory_atomic_wait32((int *)value, (int)before, -1);
}
static void wake_for_change(pool *p, atomic_uint *value) { (void)p, __builtin_wasm_memory_atomic_notify((int *)value, MOST_THREADS); }

#else  // WebAssembly without threads

static void offer_core(void) {}
static void sleep_until_change(pool *p, atomic_uint *value, unsigned before) { (void)p, (void)value, (void)before; }
static void wake_for_change(pool *p, atomic_uint *value) { (void)p, (void)value; }

#endif

// ---- jobs and barriers ----

// Wait until `value` differs from `before`; `patience` is the number of checks before sleeping.
static void wait_for_change(pool *p, atomic_uint *value, unsigned before, int patience) {
    for (int spins = PATIENCE + OFFERS - patience; atomic_load(value) == before; spins++) {
        if (spins < PATIENCE) PAUSE();
        else if (spins < PATIENCE + OFFERS) offer_core();
        else sleep_until_change(p, value, before);
    }
}

static void barrier(pool *p) {
    int threads = p->threads;  // read once: after a job's last barrier, the next job may change it
    if (threads == 1) return;
    unsigned round = atomic_load_explicit(&p->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
        atomic_store(&p->round, round + 1);  // sequentially consistent with `sleeping`, so that no sleeper misses it
        wake_for_change(p, &p->round);
        return;
    }
    wait_for_change(p, &p->round, round, PATIENCE + OFFERS);
}

// Loop of every thread besides number 0 until the pool stops. A thread that starts late joins with the next job.
static void work(pool *p, int thread) {
    int needed = 1;  // in the last job: if so, spin first, as the next one may come soon
    for (unsigned done = 0;;) {
        wait_for_change(p, &p->job, done, needed ? PATIENCE + OFFERS : 0);
        done = atomic_load(&p->job);
        if (p->stop) return;
        needed = thread < (int)(done % MOST_THREADS);
        if (!needed) continue;
        p->function(p->argument, thread);
        barrier(p);
    }
}

static void start_job(pool *p) {
    int there = 1 + atomic_load(&p->ready);
    p->threads = there < p->asked ? there : p->asked;
    unsigned before = atomic_load(&p->job);
    atomic_store(&p->job, (before / MOST_THREADS + 1) * MOST_THREADS + (unsigned)p->threads);
    if (there > 1) wake_for_change(p, &p->job);
}

// Run function(argument, thread) on every thread, with the caller as number 0, and return when all are done.
static void pool_run(pool *p, void (*function)(void *, int), void *argument) {
    p->function = function;
    p->argument = argument;
    start_job(p);
    function(argument, 0);
    barrier(p);
}

// ---- creation and destruction ----

#if defined(__wasm__)

#define STACK_BYTES 65536  // of a thread's stack; build.py gives number 0 the same

static pool *only_pool;       // in this WebAssembly memory
static char *helper_stacks;

// JavaScript starts the threads by calling `smolctl_help`; until then, number 0 works alone.
static pool *pool_create(int threads) {
    pool *p = calloc(1, sizeof *p);
    helper_stacks = aligned_alloc(64, (size_t)(threads - 1) * STACK_BYTES);
    if (!p || !helper_stacks) return NULL;
    p->most = p->asked = threads;
    return only_pool = p;
}

static void pool_destroy(pool *p) {
    p->stop = 1;
    p->asked = p->most;
    start_job(p);
}

#else

typedef struct { pool *pool; int thread; } member;

static void *worker(void *start) {
    member self = *(member *)start;
    free(start);
    work(self.pool, self.thread);
    return NULL;
}

static void pool_destroy(pool *p) {
    p->stop = 1;
    start_job(p);
    for (int i = 1; i <= p->ready; i++) pthread_join(p->handles[i], NULL);
    free(p->handles);
    free(p);
}

// A pool of `threads` threads, or of as many as the system allows.
static pool *pool_create(int threads) {
    pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->most = threads < MOST_THREADS ? threads : MOST_THREADS - 1;
    p->handles = calloc((size_t)p->most, sizeof *p->handles);
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    for (int i = 1; i < p->most; i++) {
        member *self = malloc(sizeof *self);
        *self = (member){p, i};
        if (pthread_create(&p->handles[i], NULL, worker, self)) {
            free(self);
            p->most = i;
        } else p->ready = i;
    }
    p->asked = p->most;
    return p;
}

#endif
