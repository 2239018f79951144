// A thread that waits at a barrier for one that is very late shall sleep: answers 0 once it is seen asleep.
#include "../../smolctl/native/threads.h"

#include <stdio.h>
#include <unistd.h>

static int asleep;

static char state_of_thread_0(void) {
    char path[64], line[256] = "";
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)getpid());
    FILE *file = fopen(path, "r");
    if (!file || !fgets(line, sizeof line, file)) return '?';
    fclose(file);
    return strrchr(line, ')')[2];
}

static void come_late(void *argument, int thread) {
    (void)argument;
    for (int tries = 0; thread == 1 && !asleep && tries < 5000; tries++) {
        usleep(1000);
        asleep = state_of_thread_0() == 'S';
    }
}

int main(void) {
    pool *p = pool_create(2);
    while (p && !asleep) {
        pool_run(p, come_late, NULL);
        if (p->threads == 2) break;  // else thread 1 had not begun
    }
    pool_destroy(p);
    return !asleep;
}
