/* Loaded before libc (LD_PRELOAD): from fail_at() on, the n-th write or flush of a file under a folder fails with EIO, once. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX], told[PATH_MAX];
static int left; /* 0: nothing fails */

/* told_: a file that the path of what failed is written to, and the library that called. */
void fail_at(int number, const char *folder_, const char *told_) {
    snprintf(folder, sizeof folder, "%s/", folder_);
    snprintf(told, sizeof told, "%s", told_);
    left = number;
}

static int fails(int fd, void *caller) {
    Dl_info from = {0};
    char link[64], path[PATH_MAX];
    if (left == 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 2);
    if (length < 0) return 0;
    path[length] = '/', path[length + 1] = 0; /* the folder itself counts too */
    if (strncmp(path, folder, strlen(folder)) != 0) return 0;
    if (__sync_sub_and_fetch(&left, 1) != 0) return 0;
    dladdr(caller, &from);
    snprintf(path + length, sizeof path - length, "\t%s\n", from.dli_fname ? from.dli_fname : "");
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    int out = open(told, O_WRONLY | O_CREAT | O_APPEND, 0600);
    real(out, path, strlen(path));
    close(out);
    errno = EIO;
    return 1;
}

#define FAILING(type, name, parameters, arguments)                                \
    type name parameters {                                                        \
        if (fails(fd, __builtin_return_address(0))) return -1;                    \
        type(*real) parameters = (type(*) parameters)dlsym(RTLD_NEXT, #name);     \
        return real arguments;                                                    \
    }

FAILING(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
FAILING(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
FAILING(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
FAILING(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
FAILING(int, fsync, (int fd), (fd))
FAILING(int, fdatasync, (int fd), (fd))
FAILING(int, ftruncate, (int fd, off_t size), (fd, size))
FAILING(int, ftruncate64, (int fd, off64_t size), (fd, size))
