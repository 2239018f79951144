// A few threads that run one function together, with barriers inside. They sleep between calls.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE()
#endif

// Spins before a waiting thread gives its core away: some 50 microseconds. Within a step the others are
// never that late, unless the system has taken their core.
#define PATIENCE 2000

typedef struct pool {
    int threads;
    void (*function)(void *argument, int thread);
    void *argument;
    atomic_int job, sleeping, arrived, round;
    int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t *handles;
} pool;

typedef struct { pool *pool; int thread; } member;

static void barrier(pool *p) {
    if (p->threads == 1) return;
    int round = atomic_load_explicit(&p->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) == p->threads - 1) {
        atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&p->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&p->round, memory_order_acquire) == round; spins++) {
        if (spins < PATIENCE) PAUSE(); else sched_yield();
    }
}

static void *worker(void *start) {
    member self = *(member *)start;
    free(start);
    pool *p = self.pool;
    for (int done = 0;;) {
        for (int spins = 0; spins < PATIENCE && atomic_load(&p->job) == done; spins++) PAUSE();
        if (atomic_load(&p->job) == done) {
            pthread_mutex_lock(&p->mutex);
            atomic_fetch_add(&p->sleeping, 1);
            while (atomic_load(&p->job) == done) pthread_cond_wait(&p->wake, &p->mutex);
            atomic_fetch_sub(&p->sleeping, 1);
            pthread_mutex_unlock(&p->mutex);
        }
        done = atomic_load(&p->job);
        if (p->stop) return NULL;
        p->function(p->argument, self.thread);
        barrier(p);
    }
}

static void start_job(pool *p) {
    atomic_fetch_add(&p->job, 1);
    if (atomic_load(&p->sleeping)) {
        pthread_mutex_lock(&p->mutex);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->mutex);
    }
}

// Run function(argument, thread) on every thread, this one as number 0, and return when all are done.
static void pool_run(pool *p, void (*function)(void *, int), void *argument) {
    p->function = function;
    p->argument = argument;
    if (p->threads > 1) start_job(p);
    function(argument, 0);
    barrier(p);
}

static void pool_destroy(pool *p) {
    p->stop = 1;
    start_job(p);
    for (int i = 1; i < p->threads; i++) pthread_join(p->handles[i], NULL);
    free(p->handles);
    free(p);
}

// As many threads as can be had, at most `threads`.
static pool *pool_create(int threads) {
    pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->handles = calloc((size_t)threads, sizeof *p->handles);
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->threads = threads;
    for (int i = 1; i < threads; i++) {
        member *self = malloc(sizeof *self);
        *self = (member){p, i};
        if (pthread_create(&p->handles[i], NULL, worker, self)) {
            free(self);
            p->threads = i;  // before any job: no barrier has counted on it
            break;
        }
    }
    return p;
}
