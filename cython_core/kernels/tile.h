/* What all families share: how tiles are cut into spans, loading, ranges, quality sums. */
#ifndef FQ_TILE_H
#define FQ_TILE_H

#include "simd.h"

enum { FQ_STEP = 64, FQ_BLOCK = 32, FQ_BLOCKS = FQ_SPAN / FQ_BLOCK };

#define FQ_CAT_(a, b) a##b
#define FQ_CAT(a, b) FQ_CAT_(a, b)
#define FQ_NAME(name) FQ_CAT(FQ_CAT(fq_##name, _), FQ_ISA)

static const int fq_dtype_bytes[] = {4, 2, 2, 8};

/* While a span is computed on, what is read next is fetched, so that memory does not rest: a quarter while the ranges
 * are found, half while codes are made, a quarter while they are measured. An address past the end is harmless: a
 * prefetch never faults. */
typedef struct {
  uintptr_t at, vector_bytes;
} fetcher;

FQ_INLINE fetcher fetch_from(const fq_job *job, int64_t index) {
  const uintptr_t width = (uintptr_t)fq_dtype_bytes[job->dtype];
  return (fetcher){(uintptr_t)job->weights + (uintptr_t)index * width, FQ_LANES * width};
}

/* Fetch so many more vectors of weights: one line for each, whatever their width, so that nothing branches. */
FQ_INLINE void fetch_vectors(fetcher *next, uintptr_t count) {
  for (uintptr_t v = 0; v < count; v++)
    __builtin_prefetch((const char *)(next->at + v * next->vector_bytes), 0, 3);
  next->at += count * next->vector_bytes;
}

FQ_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* Whether a span may hold several units: whole vectors and, packed at any bit width, whole 32-bit words. */
FQ_INLINE int joins_units(int64_t unit) { return unit <= FQ_SPAN && unit % FQ_BLOCK == 0; }

/* Where the span that begins at an index ends. */
FQ_INLINE int64_t span_end(const fq_job *job, int64_t at, int64_t end) {
  int64_t length = FQ_SPAN, limit = end;
  if (joins_units(job->unit)) {
    length = FQ_SPAN / job->unit * job->unit;
  } else {
    const int64_t unit_end = at - at % job->unit + job->unit;
    limit = unit_end < end ? unit_end : end;
  }
  return at + length < limit ? at + length : limit;
}

FQ_INLINE vf load_one(const char *a, int dtype) {
  switch (dtype) {
  case FQ_F16:
    return vf_load_f16(a);
  case FQ_BF16:
    return vf_load_bf16(a);
  case FQ_F64:
    return vf_load_f64(a);
  default:
    return vf_load((const float *)(const void *)a);
  }
}

FQ_INLINE void convert(const char *from, int dtype, int64_t n, float *to) {
  const int width = fq_dtype_bytes[dtype];
  int64_t i = 0;
  for (; i + FQ_LANES <= n; i += FQ_LANES)
    vf_store(to + i, load_one(from + i * width, dtype));
  if (i < n) {
    char rest[FQ_LANES * 8] = {0};
    memcpy(rest, from + i * width, (size_t)((n - i) * width));
    vf_store(to + i, load_one(rest, dtype));
    i += FQ_LANES;
  }
  for (; i < round_up(n, FQ_STEP); i += FQ_LANES)
    vf_store(to + i, vf_set(0));
}

/* The span's n weights as float32, followed by zeros up to a whole step: in place where that is so, else in buffer. */
FQ_INLINE const float *load_span(const fq_job *job, int64_t begin, int64_t n, float *buffer) {
  const char *from = (const char *)job->weights + begin * fq_dtype_bytes[job->dtype];
  switch (job->dtype) {
  case FQ_F16:
    convert(from, FQ_F16, n, buffer);
    return buffer;
  case FQ_BF16:
    convert(from, FQ_BF16, n, buffer);
    return buffer;
  case FQ_F64:
    convert(from, FQ_F64, n, buffer);
    return buffer;
  default:
    if (n % FQ_STEP == 0)
      return (const float *)(const void *)from;
    convert(from, FQ_F32, n, buffer);
    return buffer;
  }
}

/* The range of n weights (a multiple of 16), a part's lanes each for themselves. Integers order like the magnitudes
 * whose bits they are, infinity and NaN on top, and what has the other sign is negative and falls below the 0. */
FQ_INLINE void range_lanes(fetcher *next, const float *x, int64_t n, int symmetric, pi *high, pi *low) {
  const vi mask = vi_set(INT32_MAX), sign = vi_set(INT32_MIN);
  vi highs = vi_set(0), lows = highs, more_highs = highs, more_lows = highs;
  int64_t i = 0;
  for (; i + 2 * FQ_LANES <= n; i += 2 * FQ_LANES) {
    if (next && i % (4 * FQ_LANES) == 0)
      fetch_vectors(next, 1);
    const vi bits = vf_bits(vf_load(x + i)), more = vf_bits(vf_load(x + i + FQ_LANES));
    highs = vi_max(highs, symmetric ? vi_and(bits, mask) : bits);
    more_highs = vi_max(more_highs, symmetric ? vi_and(more, mask) : more);
    if (!symmetric) {
      lows = vi_max(lows, vi_xor(bits, sign));
      more_lows = vi_max(more_lows, vi_xor(more, sign));
    }
  }
  if (i < n) {
    const vi bits = vf_bits(vf_load(x + i));
    highs = vi_max(highs, symmetric ? vi_and(bits, mask) : bits);
    if (!symmetric)
      lows = vi_max(lows, vi_xor(bits, sign));
  }
  *high = vi_fold(vi_max(highs, more_highs));
  *low = vi_fold(vi_max(lows, more_lows));
}

/* The ranges of units of so many weights, one after the other, at most 16 at a time; the highest of them all. */
FQ_INLINE int32_t range_units(fetcher *next, const float *x, int64_t unit, int64_t units, int symmetric, int32_t *high,
                              int32_t *low) {
  pi highs[FQ_LANES], lows[FQ_LANES];
  for (int64_t i = 0; i < FQ_LANES; i++) {
    highs[i] = lows[i] = pi_set(0);
    if (i < units)
      range_lanes(next, x + i * unit, unit, symmetric, highs + i, lows + i);
  }
  pi all = pi_set(0);
  for (int k = 0; k < FQ_PARTS; k++) {
    const pi h = pi_highest_each(highs + k * FQ_PART);
    memcpy(high + k * FQ_PART, &h, sizeof h);
    all = pi_max(all, h);
    if (!symmetric) {
      const pi l = pi_highest_each(lows + k * FQ_PART);
      memcpy(low + k * FQ_PART, &l, sizeof l);
      all = pi_max(all, l);
    }
  }
  return pi_highest(all);
}

enum { FQ_INFINITY_BITS = 0x7f800000 };

/* Remember the first weight of the span that is not finite, if there is one. */
FQ_INLINE void note_bad(const float *x, int64_t begin, int64_t n, fq_result *result) {
  for (int64_t i = 0; i < n && result->first_bad < 0; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    if ((bits & 0x7fffffff) >= FQ_INFINITY_BITS)
      result->first_bad = begin + i;
  }
}

FQ_INLINE double add_lanes(vf a) {
  float lanes[FQ_LANES];
  vf_store(lanes, a);
  double sum = lanes[0];
  for (int k = 1; k < FQ_LANES; k++)
    sum += (double)lanes[k];
  return sum;
}

/* The same sums in float64 lanes, for spans whose squares leave the range of float32, or hold a NaN. */
static __attribute__((noinline)) int32_t measure_wide(const float *x, const float *y, int64_t n, double sums[3]) {
  double lanes[3][FQ_LANES] = {{0}};
  int32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    float a, b;
    memcpy(&a, x + i, sizeof a);
    memcpy(&b, y + i, sizeof b);
    const float error = b - a;
    const double v = (double)a, e = (double)error;
    int32_t bits;
    memcpy(&bits, &error, sizeof bits);
    bits &= INT32_MAX;
    largest = bits > largest ? bits : largest;
    lanes[0][i % FQ_LANES] += v * v;
    lanes[1][i % FQ_LANES] += e * e;
    lanes[2][i % FQ_LANES] += v * e;
  }
  for (int s = 0; s < 3; s++) {
    sums[s] = lanes[s][0];
    for (int k = 1; k < FQ_LANES; k++)
      sums[s] += lanes[s][k];
  }
  return largest;
}

/* Add the quality sums of one span: n weights x (a multiple of 16, zeros at the end) and their dequantized y. */
FQ_INLINE void measure(const float *x, const float *y, int64_t n, fetcher *next, fq_result *result) {
  vf x2 = vf_set(0), e2 = x2, xe = x2, largest = x2;
  for (int64_t i = 0; i < n; i += FQ_LANES) {
    if (i % (4 * FQ_LANES) == 0)
      fetch_vectors(next, 1);
    const vf v = vf_load(x + i), e = vf_sub(vf_load(y + i), v);
    x2 = vf_add(x2, vf_mul(v, v));
    e2 = vf_add(e2, vf_mul(e, e));
    xe = vf_add(xe, vf_mul(v, e));
    largest = vf_max_magnitude(e, largest);
  }
  double sums[3] = {add_lanes(x2), add_lanes(e2), add_lanes(xe)};
  int32_t bits = vi_highest(vf_bits(largest)), known;
  if (!(sums[0] > 0x1p-80 && sums[0] < 0x1p100 && sums[1] < 0x1p100))
    bits = measure_wide(x, y, n, sums);
  result->sum_x2 += sums[0];
  result->sum_e2 += sums[1];
  result->sum_xe += sums[2];
  memcpy(&known, &result->max_error, sizeof known);
  if (bits > known)
    memcpy(&result->max_error, &bits, sizeof bits);
}

/* float32 to the nearest bfloat16, ties to even; 0 and finite values only. */
FQ_INLINE vf round_bf16(vf a) {
  const vi bits = vf_bits(a), odd = vi_and(vi_upper_half(bits), vi_set(1));
  return vi_float(vi_and(vi_add(vi_add(bits, vi_set(0x7fff)), odd), vi_set((int32_t)0xffff0000)));
}
FQ_INLINE vf round_f16(vf a) {
  char halves[FQ_LANES * 2];
  vf_store_f16(halves, a);
  return vf_load_f16(halves);
}
FQ_INLINE vf round_to(vf a, int dtype) { return dtype == FQ_BF16 ? round_bf16(a) : dtype == FQ_F16 ? round_f16(a) : a; }

#endif
