/* Makes the FAULT_AT-th operation that changes a file under FAULT_UNDER fail: with FAULT_ERROR (a number of errno.h), or
   by killing the process if that is 0. Operations are counted over all threads. For LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long count;

/* Whether the operation on this path is the one to fail; errno is set then. */
static int fails(const char *path) {
    const char *under = getenv("FAULT_UNDER"), *at = getenv("FAULT_AT"), *error = getenv("FAULT_ERROR");
    if (!under || !at || !error || strncmp(path, under, strlen(under))) return 0;
    long number = atomic_fetch_add(&count, 1) + 1;
    const char *log = getenv("FAULT_LOG");
    if (log) {
        FILE *file = fopen(log, "w");
        if (file) { fprintf(file, "%ld\n", number); fclose(file); }
    }
    if (number != atol(at)) return 0;
    if (!atoi(error)) kill(getpid(), SIGKILL);
    errno = atoi(error);
    return 1;
}

static int fails_fd(int fd) {
    char name[64], path[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return fails(path);
}

#define REAL(result, name, ...) static result (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)
ssize_t write(int fd, const void *buffer, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return fails_fd(fd) ? -1 : real(fd, buffer, size);
}
ssize_t pwrite64(int fd, const void *buffer, size_t size, off_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    return fails_fd(fd) ? -1 : real(fd, buffer, size, at);
}
ssize_t pwrite(int fd, const void *buffer, size_t size, off_t at) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    return fails_fd(fd) ? -1 : real(fd, buffer, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    return fails_fd(fd) ? -1 : real(fd, parts, n);
}
int fsync(int fd) { REAL(int, "fsync", int); return fails_fd(fd) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(int, "fdatasync", int); return fails_fd(fd) ? -1 : real(fd); }
int ftruncate(int fd, off_t size) {
    REAL(int, "ftruncate", int, off_t);
    return fails_fd(fd) ? -1 : real(fd, size);
}
int ftruncate64(int fd, off_t size) {
    REAL(int, "ftruncate64", int, off_t);
    return fails_fd(fd) ? -1 : real(fd, size);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return fails(path) ? -1 : real(path, mode);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return fails(to) ? -1 : real(from, to);
}
int unlink(const char *path) { REAL(int, "unlink", const char *); return fails(path) ? -1 : real(path); }
int rmdir(const char *path) { REAL(int, "rmdir", const char *); return fails(path) ? -1 : real(path); }

static int opens(int flags, const char *path) { return (flags & O_CREAT) && fails(path); }

int open64(const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    REAL(int, "open64", const char *, int, ...);
    return opens(flags, path) ? -1 : real(path, flags, mode);
}
int open(const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    REAL(int, "open", const char *, int, ...);
    return opens(flags, path) ? -1 : real(path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    REAL(int, "openat64", int, const char *, int, ...);
    return opens(flags, path) ? -1 : real(at, path, flags, mode);
}
