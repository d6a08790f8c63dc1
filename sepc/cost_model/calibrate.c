/* Measures this machine for sepc.calibrate. Arguments: threads, seconds per sample, samples, then the bytes of one
   thread's working set per memory level. Prints lines of a name and a number. Needs GCC or Clang. */

#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef VECTOR_BYTES
#error "give -DVECTOR_BYTES"
#endif
typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
enum { LANES = VECTOR_BYTES / 4, CHAINS = 12, UNROLLED = 8 };
/* The compiler is to assume that the value was changed, or read, here. */
#define OPAQUE_VECTOR(x) __asm__ volatile("" : "+" VECTOR_REGISTER(x))
#if defined(__aarch64__)
#define VECTOR_REGISTER "w"
#else
#define VECTOR_REGISTER "v"
#endif

/* A chain of dependent integer additions, which every core does one of per cycle. */
static void add_chain(int64_t rounds) {
  uint64_t sum = 1, step = (uint64_t)rounds;
  for (int64_t i = 0; i < rounds; ++i) {
    for (int j = 0; j < 16; ++j) {
      sum += step;
      __asm__ volatile("" : "+r"(sum), "+r"(step));
    }
  }
}

/* Multiply-adds in as many independent chains as hide the latency; in variables, as GCC keeps an array in memory. */
#define EACH_CHAIN(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)
#define BEGIN_CHAIN(j) vector sum##j = term;
#define ADVANCE_CHAIN(j)  \
  OPAQUE_VECTOR(factor); /* or the product would be computed once */ \
  sum##j += factor * term;
#define END_CHAIN(j) OPAQUE_VECTOR(sum##j);
static void multiply_adds(int64_t rounds) {
  vector factor, term;
  for (int lane = 0; lane < LANES; ++lane) factor[lane] = 0.5f, term[lane] = 1.0f;
  OPAQUE_VECTOR(term);
  EACH_CHAIN(BEGIN_CHAIN)
  for (int64_t i = 0; i < rounds; ++i) {
    EACH_CHAIN(ADVANCE_CHAIN)
  }
  EACH_CHAIN(END_CHAIN)
}

static void read_all(const vector* data, int64_t vectors, int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t i = 0; i + UNROLLED <= vectors; i += UNROLLED)
      for (int j = 0; j < UNROLLED; ++j) {
        vector value = *(const volatile vector*)&data[i + j];
        OPAQUE_VECTOR(value);
      }
}

static void write_all(vector* data, int64_t vectors, int64_t rounds) {
  vector value = data[0];
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t i = 0; i + UNROLLED <= vectors; i += UNROLLED)
      for (int j = 0; j < UNROLLED; ++j) *(volatile vector*)&data[i + j] = value;
}

typedef struct {
  enum { ADDS, MULTIPLY_ADDS, READ, WRITE, READ_TOGETHER, REGIONS, BARRIERS } what;
  vector** data; /* one buffer per thread */
  int64_t vectors;
  int threads;
} work;

static void run(const work* w, int64_t rounds) {
  switch (w->what) {
    case ADDS: add_chain(rounds); break;
    case MULTIPLY_ADDS: multiply_adds(rounds); break;
    case READ: read_all(w->data[0], w->vectors, rounds); break;
    case WRITE: write_all(w->data[0], w->vectors, rounds); break;
    case READ_TOGETHER:
#pragma omp parallel num_threads(w->threads)
      read_all(w->data[omp_get_thread_num()], w->vectors, rounds);
      break;
    case REGIONS:
      for (int64_t i = 0; i < rounds; ++i) {
#pragma omp parallel num_threads(w->threads)
        __asm__ volatile("" ::: "memory");
      }
      break;
    case BARRIERS:
#pragma omp parallel num_threads(w->threads)
      for (int64_t i = 0; i < rounds; ++i) {
#pragma omp barrier
      }
      break;
  }
}

static double sample(const work* w, int64_t rounds) {
  double start = omp_get_wtime();
  run(w, rounds);
  return (omp_get_wtime() - start) / rounds;
}

/* Least nanoseconds per round over samples of so many rounds, as many as take `seconds`, and three at least. */
static double least(const work* w, int64_t rounds, double seconds) {
  double end = omp_get_wtime() + seconds, best = sample(w, rounds);
  for (int i = 0; i < 3 || omp_get_wtime() < end; ++i) {
    double now = sample(w, rounds);
    if (now < best) best = now;
  }
  return best * 1e9;
}

/* The same, over `samples` samples of about `seconds` each. Finding out how many rounds that is warms up caches, pages
   and clock. */
static double nanoseconds(const work* w, double seconds, int samples) {
  int64_t rounds = 1;
  double each = sample(w, 1);
  while (each * rounds < seconds / 4 && rounds < INT64_MAX / 8) {
    rounds *= 4;
    each = sample(w, rounds);
  }
  return least(w, (int64_t)(seconds / each) + 1, seconds * samples);
}

int main(int count, char** arguments) {
  if (count < 5) return 2;
  int threads = atoi(arguments[1]), samples = atoi(arguments[3]);
  double seconds = atof(arguments[2]);
  vector** data = calloc(threads, sizeof *data);
  if (!data) return 3;
  work w = {ADDS, data, 0, threads};
  printf("clock_ghz %.6f\n", 16 / nanoseconds(&w, seconds, samples));
  w.what = MULTIPLY_ADDS;
  printf("fma_per_ns %.6f\n", CHAINS / nanoseconds(&w, seconds, samples));
  for (int level = 0; level + 4 < count; ++level) {
    int64_t bytes = atoll(arguments[level + 4]) / 4096 * 4096 + 4096;
    int failed = 0;
    w.vectors = bytes / VECTOR_BYTES;
#pragma omp parallel num_threads(threads)
    { /* Each thread writes its buffer first, so that its pages are near it. */
      float* own = aligned_alloc(4096, bytes);
      if (own) for (int64_t i = 0; i < bytes / 4; ++i) own[i] = 1.0f;
      data[omp_get_thread_num()] = (vector*)own;
      if (!own) {
#pragma omp atomic write
        failed = 1;
      }
    }
    if (failed) return 3;
    double size = (double)(w.vectors / UNROLLED * UNROLLED * VECTOR_BYTES);
    w.what = READ;
    printf("read_gb_per_s.%d %.6f\n", level, size / nanoseconds(&w, seconds, samples));
    w.what = WRITE;
    printf("write_gb_per_s.%d %.6f\n", level, size / nanoseconds(&w, seconds, samples));
    w.what = READ_TOGETHER;
    printf("all_read_gb_per_s.%d %.6f\n", level, threads * size / nanoseconds(&w, seconds, samples));
    for (int thread = 0; thread < threads; ++thread) free(data[thread]);
  }
  /* Short samples: where others keep a processor busy, few long ones see all threads run all the time. */
  w.what = REGIONS;
  printf("parallel_region_us %.6f\n", least(&w, 20, seconds * samples) / 1e3);
  w.what = BARRIERS;
  printf("barrier_us %.6f\n", least(&w, 50, seconds * samples) / 1e3);
  return 0;
}
