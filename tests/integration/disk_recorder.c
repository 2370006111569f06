/* Preloaded into a process: writes down, in order, what it does to the files whose paths begin with
 * DISK_RECORDER_PREFIX, and when their folder is synced.
 *
 * A record in the file DISK_RECORDER_TRACE is a header of four 64-bit numbers, then the file's path, then the data:
 *
 *     operation (1 write, 2 sync, 3 truncate, 4 remove), offset or new size, bytes of path, bytes of data
 *
 * A write is recorded before it is made and a sync after it was, so that a trace cut off anywhere promises no more
 * than the disk had. One record is one append: `tests/integration/disk.py` reads them while more come.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, SYNC, TRUNCATE, REMOVE };

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static int trace = -1;

static void record(uint64_t operation, const char *path, uint64_t offset, const void *data, uint64_t length) {
    const char *prefix = getenv("DISK_RECORDER_PREFIX");
    if (prefix == NULL) return;
    const size_t folder = (size_t)(strrchr(prefix, '/') - prefix);
    const int is_folder = operation == SYNC && strlen(path) == folder && strncmp(path, prefix, folder) == 0;
    if (!is_folder && strncmp(path, prefix, strlen(prefix)) != 0) return;
    const int before = errno;
    pthread_mutex_lock(&turn);
    if (trace < 0) trace = open(getenv("DISK_RECORDER_TRACE"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    uint64_t header[4] = {operation, offset, strlen(path), length};
    struct iovec parts[3] = {{header, sizeof header}, {(void *)path, header[2]}, {(void *)data, length}};
    const ssize_t whole = (ssize_t)(sizeof header + header[2] + length);
    if (writev(trace, parts, 3) != whole) abort(); /* a trace with a gap would prove nothing */
    pthread_mutex_unlock(&turn);
    errno = before;
}

static void record_of(uint64_t operation, int file, uint64_t offset, const void *data, uint64_t length) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    const ssize_t found = readlink(link, path, sizeof path - 1);
    if (found <= 0) return;
    path[found] = 0;
    record(operation, path, offset, data, length);
}

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (next == NULL) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t pwrite(int file, const void *data, size_t length, off_t offset) {
    NEXT(pwrite);
    record_of(WRITE, file, (uint64_t)offset, data, length);
    return next(file, data, length, offset);
}

ssize_t pwrite64(int file, const void *data, size_t length, off64_t offset) {
    NEXT(pwrite64);
    record_of(WRITE, file, (uint64_t)offset, data, length);
    return next(file, data, length, offset);
}

ssize_t write(int file, const void *data, size_t length) {
    NEXT(write);
    const int before = errno;
    const off_t offset = lseek(file, 0, SEEK_CUR);
    errno = before;
    if (offset >= 0) record_of(WRITE, file, (uint64_t)offset, data, length);
    return next(file, data, length);
}

int fsync(int file) {
    NEXT(fsync);
    const int done = next(file);
    if (done == 0) record_of(SYNC, file, 0, NULL, 0);
    return done;
}

int fdatasync(int file) {
    NEXT(fdatasync);
    const int done = next(file);
    if (done == 0) record_of(SYNC, file, 0, NULL, 0);
    return done;
}

int ftruncate(int file, off_t size) {
    NEXT(ftruncate);
    record_of(TRUNCATE, file, (uint64_t)size, NULL, 0);
    return next(file, size);
}

int ftruncate64(int file, off64_t size) {
    NEXT(ftruncate64);
    record_of(TRUNCATE, file, (uint64_t)size, NULL, 0);
    return next(file, size);
}

int unlink(const char *path) {
    NEXT(unlink);
    record(REMOVE, path, 0, NULL, 0);
    return next(path);
}
