// Replaces the C library, which wasm32-freestanding lacks, so that the memory remains the only import.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define memcpy __builtin_memcpy
#define memset __builtin_memset
#define sqrtf __builtin_sqrtf
#define fabsf __builtin_fabsf
#define INFINITY __builtin_inff()
#define WASM_PAGE 65536

// A stack allocator, in the memory above the data that the page has placed there: see `smolctl_heap`.
static uintptr_t heap;

static void *aligned_alloc(size_t alignment, size_t bytes) {
    uintptr_t end = __builtin_wasm_memory_size(0) * WASM_PAGE, start = (heap + alignment - 1) / alignment * alignment;
    if (start > end || bytes > end - start) return NULL;
    heap = start + bytes;
    return (void *)start;
}

static void *calloc(size_t count, size_t size) {
    void *memory = aligned_alloc(64, count * size);
    return memory ? memset(memory, 0, count * size) : NULL;
}

// Frees a block and everything that was allocated after it.
static void free(void *block) {
    if (block && (uintptr_t)block < heap) heap = (uintptr_t)block;
}
