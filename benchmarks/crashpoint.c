/* Ends or refuses the n-th call that changes files below a directory: what a crash or a full disk does at that point.
 *
 *   cc -shared -fPIC -O1 -o crashpoint.so crashpoint.c -ldl
 *   CRASH_BELOW=/tmp/out CRASH_AT=7 CRASH_HOW=kill LD_PRELOAD=./crashpoint.so command
 *
 * CRASH_HOW: kill (SIGKILL instead of the call), full (the call and all that write after it fail with ENOSPC), or
 * count (nothing). At the end of the process the number of calls is added to the file CRASH_COUNT, if it is given.
 * Paths are compared as they are given, so the directory and the command's paths must be absolute.
 * Calls: open for writing, write, pwrite, ftruncate, fsync, mkdir, rename, renameat2, unlink.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static long seen;

static int below(const char *path) {
    const char *root = getenv("CRASH_BELOW");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int open_below(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

/* Whether this call must fail with ENOSPC; does not return where the process ends here. `grows`: it takes space. */
static int fails(int grows) {
    const char *at = getenv("CRASH_AT"), *how = getenv("CRASH_HOW");
    long number = __sync_add_and_fetch(&seen, 1);
    if (!at || !how) return 0;
    if (strcmp(how, "kill") == 0 && number == atol(at)) raise(SIGKILL);
    if (strcmp(how, "full") == 0 && grows && number >= atol(at)) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

__attribute__((destructor)) static void told(void) {
    const char *path = getenv("CRASH_COUNT");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) {
        fprintf(file, "%ld\n", seen);
        fclose(file);
    }
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                   \
        if ((flags & (O_WRONLY | O_RDWR)) && below(path) && fails(flags & O_CREAT)) return -1; \
        return NEXT(name)(path, flags, mode);                           \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int descriptor, const void *data, size_t size) {
    return open_below(descriptor) && fails(1) ? -1 : NEXT(write)(descriptor, data, size);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    return open_below(descriptor) && fails(1) ? -1 : NEXT(pwrite64)(descriptor, data, size, at);
}
int ftruncate64(int descriptor, off64_t size) {
    return open_below(descriptor) && fails(1) ? -1 : NEXT(ftruncate64)(descriptor, size);
}
int fsync(int descriptor) { return open_below(descriptor) && fails(1) ? -1 : NEXT(fsync)(descriptor); }
int mkdir(const char *path, mode_t mode) { return below(path) && fails(1) ? -1 : NEXT(mkdir)(path, mode); }
int unlink(const char *path) { return below(path) && fails(0) ? -1 : NEXT(unlink)(path); }
int rename(const char *from, const char *to) { return below(to) && fails(0) ? -1 : NEXT(rename)(from, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned int flags) {
    return below(to) && fails(0) ? -1 : NEXT(renameat2)(a, from, b, to, flags);
}
