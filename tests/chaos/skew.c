/* Preloaded into processes, shifts their wall clock by as many seconds as stand in the file that CLOCK_SKEW names.
 *
 * The file holds one 64-bit integer and is mapped into memory, so the clocks of all who have it jump at once. Clocks
 * that count from the start of the machine are left alone. Whoever waits until a time of the shifted clock has it
 * translated for the kernel, which knows nothing of the shift.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* No clock that counts from the start of a machine has come so far, and no wall clock of ours is set so early. */
#define EPOCH_S 1000000000

static int64_t none;
static volatile int64_t *skew = &none;

__attribute__((constructor)) static void map_skew(void) {
  const char *path = getenv("CLOCK_SKEW");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, file, 0);
  if (mapped != MAP_FAILED) skew = mapped;
  close(file);
}

/* What the kernel calls the moment that the process calls `theirs`. */
static const struct timespec *unshifted(const struct timespec *theirs, struct timespec *ours) {
  if (!theirs || theirs->tv_sec < EPOCH_S) return theirs;
  *ours = *theirs;
  ours->tv_sec -= *skew;
  return ours;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*get)(clockid_t, struct timespec *);
  if (!get) get = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = get(clock, now);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *skew;
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec exact;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &exact);
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *now) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (now) *now = exact.tv_sec;
  return exact.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
  static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  struct timespec ours;
  if (!wait) wait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (!wait) wait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  return wait(condition, mutex, unshifted(until, &ours));
}

int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock,
                           const struct timespec *until) {
  static int (*wait)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
  struct timespec ours;
  if (!wait) wait = dlsym(RTLD_NEXT, "pthread_cond_clockwait");
  return wait(condition, mutex, clock, unshifted(until, &ours));
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
  static int (*wait)(sem_t *, const struct timespec *);
  struct timespec ours;
  if (!wait) wait = dlsym(RTLD_NEXT, "sem_timedwait");
  return wait(semaphore, unshifted(until, &ours));
}

long syscall(long number, ...) {
  static long (*call)(long, ...);
  struct timespec ours;
  long a[6];
  va_list arguments;
  va_start(arguments, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(arguments, long);
  va_end(arguments);
  if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME)) a[3] = (long)unshifted((const struct timespec *)a[3], &ours);
  if (!call) call = dlsym(RTLD_NEXT, "syscall");
  return call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
