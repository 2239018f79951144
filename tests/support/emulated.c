// The compiled engine as a server, for a processor that the machine of the tests only emulates: emulated.py asks.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

// What forward.c exports; the structures are laid out alike on both processors.
int smolctl_level(void);
int smolctl_multiply(const void *m, const float *x, int tokens, float *y);
void *smolctl_create(const void *m, int chunk, int threads);
int smolctl_forward(void *context, const void *b);
int smolctl_exact(const void *context);
int smolctl_destroy(void *context);

enum { LEVEL, MULTIPLY, CREATE, FORWARD, DESTROY, EXACT };

static void take(void *to, size_t size) {
    if (fread(to, 1, size, stdin) != size) exit(0);
}

int main(void) {
    // A call: its function, two numbers, and memory that begins with a structure. Pointers in it are places in it.
    struct { uint64_t function, numbers[2], size, pointers; } call;
    for (;;) {
        take(&call, sizeof call);
        char *memory = aligned_alloc(64, (call.size + 127) / 64 * 64), **pointers = (char **)memory;
        take(memory, call.size);
        for (uint64_t i = 0, at; i < call.pointers; i++) {
            take(&at, sizeof at);
            *(char **)(memory + at) += (uintptr_t)memory;
        }
        uint64_t answer = 0;
        switch (call.function) {
        case LEVEL: answer = (uint64_t)smolctl_level(); break;
        case MULTIPLY:  // of pointers: to a matrix, to x and to y
            answer = (uint64_t)smolctl_multiply(pointers[0], (float *)pointers[1], (int)call.numbers[0], (float *)pointers[2]);
            break;
        case CREATE: answer = (uintptr_t)smolctl_create(memory, (int)call.numbers[0], (int)call.numbers[1]); break;
        case FORWARD: answer = (uint64_t)smolctl_forward((void *)call.numbers[0], memory); break;
        case DESTROY: answer = (uint64_t)smolctl_destroy((void *)call.numbers[0]); break;
        case EXACT: answer = (uint64_t)smolctl_exact((void *)call.numbers[0]); break;
        }
        fwrite(&answer, sizeof answer, 1, stdout);
        if (call.function == MULTIPLY || call.function == FORWARD) fwrite(memory, 1, call.size, stdout);
        fflush(stdout);
        if (call.function != CREATE) free(memory);  // the network of a context stays
    }
}
