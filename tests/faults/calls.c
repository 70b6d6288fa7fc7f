/* A library to preload: it counts the calls that change what is below a folder, and ends the process at one.

   `watch(folder, k, part, log)` begins to count in this process; `watched()` returns the number of calls so far.
   At the k-th call the process kills itself by SIGKILL before the call is made, or after `part` (0 to 1) of its
   bytes if it writes. With a descriptor `log`, each call is written there, once it was made, as a line of its name
   (`failed` if it did), offset, size and paths, separated by tabs, and the bytes that it wrote.

   It sees every language and library of the process alike, as long as they call the C library. A call that would
   change nothing (the making of a folder that is there, the opening of a file to read) isn't counted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name)                                             \
    static __typeof__(&name) real;                             \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static char root[PATH_MAX];
static size_t root_size;
static long due, count;
static double part;
static int log_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void watch(const char *folder, long k, double some, int log) {
    root_size = strlen(strcpy(root, folder));
    due = k, count = 0, part = some, log_fd = log;
}

long watched(void) { return count; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int inside(const char *path) {
    return root_size && !strncmp(path, root, root_size) && (!path[root_size] || path[root_size] == '/');
}

static const char *of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = root_size ? readlink(link, path, PATH_MAX - 1) : -1;
    path[n < 0 ? 0 : n] = 0;
    return path;
}

static const char *full(int folder, const char *name, char *path) {
    if (!root_size || *name == '/') return name;
    if (folder != AT_FDCWD) of_fd(folder, path);
    else if (!getcwd(path, PATH_MAX)) *path = 0;
    size_t n = strlen(path);
    snprintf(path + n, PATH_MAX - n, "/%s", name);
    return path;
}

static int there(const char *path) {
    struct stat found;
    int old = errno, none = fstatat(AT_FDCWD, path, &found, AT_SYMLINK_NOFOLLOW);
    errno = old;
    return !none;
}

/* Count a call, and hold the lock until `leave`. A write dies by itself, when part of it is done. */
static int enter(int writes) {
    pthread_mutex_lock(&lock);
    if (++count != due) return 0;
    if (!writes || part <= 0) die();
    return 1;
}

static void leave(int done, const char *name, const char *a, const char *b, off_t offset, off_t size) {
    int old = errno;
    if (log_fd >= 0) {
        if (!done) name = "failed";
        dprintf(log_fd, "%s\t%lld\t%lld\t%s\t%s\n", name, (long long)offset, (long long)size, a, b);
        if (!strcmp(name, "write")) {
            int fd = syscall(SYS_openat, AT_FDCWD, a, O_RDONLY);
            char block[1 << 16];
            for (ssize_t n; size > 0; offset += n, size -= n) {
                n = pread(fd, block, size < (off_t)sizeof block ? size : (off_t)sizeof block, offset);
                if (n <= 0 || syscall(SYS_write, log_fd, block, n) != n) abort();
            }
            syscall(SYS_close, fd);
        }
    }
    pthread_mutex_unlock(&lock);
    errno = old;
}

/* --- opening --- */

static const char *opening(const char *path, int flags) {
    if (!inside(path)) return NULL;
    if (!there(path)) return flags & O_CREAT ? "create" : NULL;
    return flags & O_TRUNC ? "truncate" : NULL;
}

#define OPENED(path, flags, call)                              \
    const char *what = opening(path, flags);                   \
    if (!what) return call;                                    \
    enter(0);                                                  \
    __typeof__(call) result = call;                            \
    leave(result != (__typeof__(call))(long)FAILED(call), what, path, "", 0, 0); \
    return result
#define FAILED(call) _Generic((call), FILE *: 0, int: -1)
#define MODE                                                   \
    mode_t mode = 0;                                           \
    if (flags & (O_CREAT | O_TMPFILE)) {                       \
        va_list more;                                          \
        va_start(more, flags), mode = va_arg(more, mode_t), va_end(more); \
    }

int open(const char *path, int flags, ...) {
    REAL(open);
    MODE char at[PATH_MAX];
    const char *all = full(AT_FDCWD, path, at);
    OPENED(all, flags, real(path, flags, mode));
}
int open64(const char *path, int flags, ...) {
    REAL(open64);
    MODE char at[PATH_MAX];
    const char *all = full(AT_FDCWD, path, at);
    OPENED(all, flags, real(path, flags, mode));
}
int openat(int folder, const char *path, int flags, ...) {
    REAL(openat);
    MODE char at[PATH_MAX];
    const char *all = full(folder, path, at);
    OPENED(all, flags, real(folder, path, flags, mode));
}
int openat64(int folder, const char *path, int flags, ...) {
    REAL(openat64);
    MODE char at[PATH_MAX];
    const char *all = full(folder, path, at);
    OPENED(all, flags, real(folder, path, flags, mode));
}
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static int flags_of(const char *mode) {
    return *mode == 'w' ? O_CREAT | O_TRUNC : *mode == 'a' ? O_CREAT : 0;
}
FILE *fopen(const char *path, const char *mode) {
    REAL(fopen);
    char at[PATH_MAX];
    const char *all = full(AT_FDCWD, path, at);
    OPENED(all, flags_of(mode), real(path, mode));
}
FILE *fopen64(const char *path, const char *mode) {
    REAL(fopen64);
    char at[PATH_MAX];
    const char *all = full(AT_FDCWD, path, at);
    OPENED(all, flags_of(mode), real(path, mode));
}

/* --- writing --- */

static void part_of(int fd, const struct iovec *parts, int n, off_t offset, size_t size) {
    for (size_t done = 0; size > done; parts++, n--) {
        size_t want = parts->iov_len < size - done ? parts->iov_len : size - done;
        if (n < 1) return;
        if (offset < 0) syscall(SYS_write, fd, parts->iov_base, want);
        else syscall(SYS_pwrite64, fd, parts->iov_base, want, offset + done);
        done += want;
    }
}

/* Count a write by `call`, of `parts` at an offset, or at the file's own place if that is negative. */
#define WRITTEN(parts, n, offset, call)                        \
    char path[PATH_MAX];                                       \
    off_t from = offset;                                       \
    if (!counts(fd, parts, n, path)) return call;              \
    if (enter(1)) part_of(fd, parts, n, from, part * size_of(parts, n)), die(); \
    if (from < 0 || fcntl(fd, F_GETFL) & O_APPEND) from = place(fd); \
    ssize_t done = call;                                       \
    leave(done > 0, "write", path, "", from, done);            \
    return done

static size_t size_of(const struct iovec *parts, int n) {
    size_t size = 0;
    for (int i = 0; i < n; i++) size += parts[i].iov_len;
    return size;
}
static int counts(int fd, const struct iovec *parts, int n, char *path) {
    return root_size && size_of(parts, n) && inside(of_fd(fd, path));
}
static off_t place(int fd) {
    return lseek(fd, 0, fcntl(fd, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR);
}

#define ONE struct iovec one = {(void *)data, size}
ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    ONE;
    WRITTEN(&one, 1, -1, real(fd, data, size));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    ONE;
    WRITTEN(&one, 1, at, real(fd, data, size, at));
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    ONE;
    WRITTEN(&one, 1, at, real(fd, data, size, at));
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    REAL(writev);
    WRITTEN(v, n, -1, real(fd, v, n));
}
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at) {
    REAL(pwritev);
    WRITTEN(v, n, at, real(fd, v, n, at));
}
ssize_t pwritev64(int fd, const struct iovec *v, int n, off64_t at) {
    REAL(pwritev64);
    WRITTEN(v, n, at, real(fd, v, n, at));
}
ssize_t pwritev2(int fd, const struct iovec *v, int n, off_t at, int flags) {
    REAL(pwritev2);
    WRITTEN(v, n, at, real(fd, v, n, at, flags));
}
ssize_t pwritev64v2(int fd, const struct iovec *v, int n, off64_t at, int flags) {
    REAL(pwritev64v2);
    WRITTEN(v, n, at, real(fd, v, n, at, flags));
}

/* Refused below the folder, so that callers fall back to plain reads and writes, as on other file systems. */
#define REFUSED(fd, call)                                      \
    char path[PATH_MAX];                                       \
    if (inside(of_fd(fd, path))) return errno = EINVAL, -1;    \
    return call
ssize_t sendfile(int to, int from, off_t *at, size_t n) { REAL(sendfile); REFUSED(to, real(to, from, at, n)); }
ssize_t sendfile64(int to, int from, off_t *at, size_t n) { REAL(sendfile64); REFUSED(to, real(to, from, at, n)); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned f) {
    REAL(copy_file_range);
    REFUSED(to, real(from, a, to, b, n, f));
}

/* --- all other calls --- */

#define CALL(counts, call, name, a, b, size)                   \
    if (!(counts)) return call;                                \
    enter(0);                                                  \
    int result = call;                                         \
    leave(!result, name, a, b, 0, size);                       \
    return result
#define ON_FD(call, name, size)                        \
    char path[PATH_MAX];                                       \
    CALL(inside(of_fd(fd, path)), call, name, path, "", size)
#define ON_PATH(folder, given, missing, call, name)            \
    char at[PATH_MAX];                                         \
    const char *path = full(folder, given, at);                \
    CALL(inside(path) && there(path) == !(missing), call, name, path, "", 0)
#define ON_TWO(from, a, to, b, call, name)                     \
    char at_a[PATH_MAX], at_b[PATH_MAX];                       \
    const char *first = full(from, a, at_a), *second = full(to, b, at_b); \
    CALL((inside(first) || inside(second)) && there(first), call, name, first, second, 0)

int ftruncate(int fd, off_t n) { REAL(ftruncate); ON_FD(real(fd, n), "resize", n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); ON_FD(real(fd, n), "resize", n); }
int fsync(int fd) { REAL(fsync); ON_FD(real(fd), "fsync", 0); }
int fdatasync(int fd) { REAL(fdatasync); ON_FD(real(fd), "fsync", 0); }
int syncfs(int fd) { REAL(syncfs); ON_FD(real(fd), "syncfs", 0); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); ON_PATH(AT_FDCWD, p, 1, real(p, m), "mkdir"); }
int mkdirat(int d, const char *p, mode_t m) { REAL(mkdirat); ON_PATH(d, p, 1, real(d, p, m), "mkdir"); }
int unlink(const char *p) { REAL(unlink); ON_PATH(AT_FDCWD, p, 0, real(p), "remove"); }
int rmdir(const char *p) { REAL(rmdir); ON_PATH(AT_FDCWD, p, 0, real(p), "remove"); }
int remove(const char *p) { REAL(remove); ON_PATH(AT_FDCWD, p, 0, real(p), "remove"); }
int unlinkat(int d, const char *p, int f) { REAL(unlinkat); ON_PATH(d, p, 0, real(d, p, f), "remove"); }
int link(const char *a, const char *b) { REAL(link); ON_TWO(AT_FDCWD, a, AT_FDCWD, b, real(a, b), "link"); }
int linkat(int d, const char *a, int e, const char *b, int f) {
    REAL(linkat);
    ON_TWO(d, a, e, b, real(d, a, e, b, f), "link");
}
int rename(const char *a, const char *b) {
    REAL(rename);
    ON_TWO(AT_FDCWD, a, AT_FDCWD, b, real(a, b), "rename");
}
int renameat(int d, const char *a, int e, const char *b) {
    REAL(renameat);
    ON_TWO(d, a, e, b, real(d, a, e, b), "rename");
}
int renameat2(int d, const char *a, int e, const char *b, unsigned f) {
    REAL(renameat2);
    ON_TWO(d, a, e, b, real(d, a, e, b, f), f & RENAME_EXCHANGE ? "exchange" : "rename");
}
