/* What all families share: how tiles are cut into spans, loading, ranges, quality sums. */
#ifndef FQ_TILE_H
#define FQ_TILE_H

#include "stores.h"

enum { FQ_STEP = 64, FQ_BLOCK = 32, FQ_BLOCKS = FQ_SPAN / FQ_BLOCK };

#define FQ_CAT_(a, b) a##b
#define FQ_CAT(a, b) FQ_CAT_(a, b)
#define FQ_NAME(name) FQ_CAT(FQ_CAT(fq_##name, _), FQ_ISA)

static const int fq_dtype_bytes[] = {4, 2, 2, 8};

/* While codes are made and measured, what is read later is fetched, so that memory does not rest. Not while ranges are
 * found: that is over so soon that it would wait. An address past the end is harmless: a prefetch never faults. */
typedef struct {
  uintptr_t at, vector_bytes;
} fetcher;

/* How far beyond the next span float32 weights are fetched, so that its first ones are there in time; and what the
 * second-level cache holds of a unit that is read twice. In weights. */
enum { FQ_AHEAD = 1024, FQ_FAR = 65536 };

FQ_INLINE fetcher fetch_from(const fq_job *job, int64_t index) {
  const uintptr_t width = (uintptr_t)fq_dtype_bytes[job->dtype];
  return (fetcher){(uintptr_t)job->weights + (uintptr_t)index * width, FQ_LANES * width};
}

/* While the n weights from an index on are computed on. A unit longer than a span has been read for its range, as a
 * whole: what follows it is next. */
FQ_INLINE fetcher fetch_after(const fq_job *job, int64_t at, int64_t n) {
  const int known = job->unit > n && job->unit <= FQ_FAR && !job->given_scales;
  return fetch_from(job, at + (known ? job->unit : n) + (job->dtype == FQ_F32 ? FQ_AHEAD : 0));
}

/* Fetch so many more vectors of weights: a line for each. Float32 goes to the second-level cache, for the first one's
 * misses are too few at a time for memory's latency. Of other weights there are fewer lines in the same time, and they
 * are wanted at once, to be converted. */
FQ_INLINE void fetch_vectors(fetcher *next, uintptr_t count) {
  const uintptr_t at = next->at, each = next->vector_bytes;
  next->at += count * each;
  if (each == FQ_LANES * sizeof(float))
    for (uintptr_t v = 0; v < count; v++)
      __builtin_prefetch((const char *)(at + v * each), 0, 2);
  else
    for (uintptr_t v = 0; v < count; v++)
      __builtin_prefetch((const char *)(at + v * each), 0, 3);
}

/* What a step of making codes fetches: all, or all but what measuring does. */
FQ_INLINE void fetch_step(fetcher *next, int measured) { fetch_vectors(next, measured ? 3 : 4); }

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

/* The span's n weights as they are, of two bytes each, followed by zeros up to a whole step: in place, or in rest. */
FQ_INLINE const char *halves_span(const fq_job *job, int64_t begin, int64_t n, char *rest) {
  const char *from = (const char *)job->weights + begin * 2;
  if (n % FQ_STEP == 0)
    return from;
  memcpy(rest, from, (size_t)n * 2);
  memset(rest + n * 2, 0, (size_t)(round_up(n, FQ_STEP) - n) * 2);
  return rest;
}

/* What is known of some weights while their range is sought, a part's lanes each for themselves. Integers order like
 * the magnitudes whose bits they are, infinity and NaN on top: the highest of them is the largest weight, or magnitude
 * if symmetric, unless it is negative; the highest unsigned one is the least weight if it has the sign bit. */
typedef struct {
  pi high, low;
} range_part;

enum { FQ_INFINITY_BITS = 0x7f800000, FQ_INFINITY_HALF = 0x7c000000 };

FQ_INLINE range_part range_bits(const float *x, int64_t n, int symmetric) {
  const vi mask = vi_set(symmetric ? INT32_MAX : -1);
  vi high[2], low[2];
  int64_t i = 0;
  if (n == 2 * FQ_LANES) { /* so short that it is worth saving what the loop begins with */
    for (int k = 0; k < 2; k++)
      high[k] = low[k] = vi_and(vf_bits(vf_load(x + k * FQ_LANES)), mask);
    i = n;
  } else if (n == FQ_LANES) {
    high[0] = high[1] = low[0] = low[1] = vi_and(vf_bits(vf_load(x)), mask);
    i = n;
  } else {
    high[0] = high[1] = low[0] = low[1] = vi_set(0);
  }
  for (; i + 2 * FQ_LANES <= n; i += 2 * FQ_LANES) {
    for (int k = 0; k < 2; k++) {
      const vi bits = vi_and(vf_bits(vf_load(x + i + k * FQ_LANES)), mask);
      high[k] = vi_max(high[k], bits);
      low[k] = vi_max_unsigned(low[k], bits);
    }
  }
  if (i < n) {
    const vi bits = vi_and(vf_bits(vf_load(x + i)), mask);
    high[0] = vi_max(high[0], bits);
    low[0] = vi_max_unsigned(low[0], bits);
  }
  range_part r = {vi_fold(vi_max(high[0], high[1])), pi_set(0)};
  if (!symmetric) {
    low[0] = vi_max_unsigned(low[0], low[1]);
    r.low = low[0].p[0];
    for (int k = 1; k < FQ_PARTS; k++)
      r.low = pi_max_unsigned(r.low, low[0].p[k]);
  }
  return r;
}

/* 32 16-bit weights. */
FQ_INLINE vi halves_at(const char *x) {
  vi r;
  memcpy(&r, x, sizeof r);
  return r;
}

/* The same of n 16-bit weights (a multiple of 32) as they are: 16-bit floats order as float32 do. The lanes found hold
 * one in their upper halves. */
FQ_INLINE range_part range_halves(const char *x, int64_t n, int symmetric) {
  const vi mask = vi_set(symmetric ? 0x7fff7fff : -1), upper = vi_set(-0x10000);
  vi high[2], low[2];
  high[0] = high[1] = low[0] = low[1] = vi_set(0);
  int64_t i = 0;
  for (; i + 4 * FQ_LANES <= n; i += 4 * FQ_LANES) {
    for (int k = 0; k < 2; k++) {
      const vi bits = vi_and(halves_at(x + i * 2 + k * 4 * FQ_LANES), mask);
      high[k] = vi_max_halves(high[k], bits);
      low[k] = vi_max_unsigned_halves(low[k], bits);
    }
  }
  if (i < n) {
    const vi bits = vi_and(halves_at(x + i * 2), mask);
    high[0] = vi_max_halves(high[0], bits);
    low[0] = vi_max_unsigned_halves(low[0], bits);
  }
  high[0] = vi_max_halves(high[0], high[1]);
  range_part r = {vi_fold(vi_max(vi_and(high[0], upper), vi_shift_left_16(high[0]))), pi_set(0)};
  if (!symmetric) {
    low[0] = vi_max_unsigned_halves(low[0], low[1]);
    low[0] = vi_max_unsigned(vi_and(low[0], upper), vi_shift_left_16(low[0]));
    r.low = low[0].p[0];
    for (int k = 1; k < FQ_PARTS; k++)
      r.low = pi_max_unsigned(r.low, low[0].p[k]);
  }
  return r;
}

/* The range of n weights of a dtype (a multiple of 32). */
FQ_INLINE range_part range_of(const char *x, int64_t n, int symmetric, int dtype) {
  return dtype == FQ_F32 ? range_bits((const float *)(const void *)x, n, symmetric) : range_halves(x, n, symmetric);
}

/* 16 positive ends of ranges as bits of float32, of such 16-bit floats in upper halves. */
FQ_INLINE void widen_ends(int32_t *ends, int dtype) {
  if (dtype == FQ_F16) {
    uint16_t halves[FQ_LANES];
    for (int k = 0; k < FQ_LANES; k++)
      halves[k] = (uint16_t)(ends[k] >> 16);
    const vf wide = vf_load_f16((const char *)halves);
    memcpy(ends, &wide, sizeof wide);
  }
}

/* The largest weight, or magnitude, and the magnitude of the least, as far as they lie beyond 0. */
FQ_INLINE range_part beyond_zero(range_part r) {
  r.high = pi_max(r.high, pi_set(0));
  r.low = pi_and(pi_and(r.low, pi_shift_right(r.low, 31)), pi_set(INT32_MAX));
  return r;
}

/* The range of n weights (a multiple of 16), a part's lanes each for themselves. */
FQ_INLINE void range_lanes(const float *x, int64_t n, int symmetric, pi *high, pi *low) {
  const range_part r = beyond_zero(range_bits(x, n, symmetric));
  *high = r.high;
  *low = r.low;
}

/* Units of so many weights, one after the other; those past the last one stand for it. */
typedef struct {
  const char *x;
  int dtype;
  int64_t unit, units;
  int symmetric;
  const pi *high, *low; /* the parts of each unit, if they are known already */
} range_source;

FQ_INLINE range_part range_1(const range_source *s, int i) {
  if (s->high)
    return (range_part){s->high[i], s->symmetric ? pi_set(0) : s->low[i]};
  const int64_t unit = i < s->units ? i : s->units - 1;
  return range_of(s->x + unit * s->unit * fq_dtype_bytes[s->dtype], s->unit, s->symmetric, s->dtype);
}

/* Two parts of which every second so many lanes belong to the same units become one, without going through memory. */
#define FQ_MERGE(count, half)                                                                                          \
  FQ_INLINE range_part range_##count(const range_source *s, int i) {                                                   \
    const range_part a = range_##half(s, i), b = range_##half(s, i + half);                                            \
    pi stay, come;                                                                                                     \
    range_part r;                                                                                                      \
    pi_neighbours_##half(a.high, b.high, &stay, &come);                                                                \
    r.high = pi_max(stay, come);                                                                                       \
    pi_neighbours_##half(a.low, b.low, &stay, &come);                                                                  \
    r.low = pi_max_unsigned(stay, come);                                                                               \
    return r;                                                                                                          \
  }
FQ_MERGE(2, 1)
FQ_MERGE(4, 2)
#if FQ_PART_LANES >= 8
FQ_MERGE(8, 4)
#endif
#if FQ_PART_LANES >= 16
FQ_MERGE(16, 8)
#endif

/* The ranges of units of so many weights of a dtype (of 16 bits: a multiple of 32), one after the other, at most 16 at
 * a time; the highest of them all. */
FQ_INLINE int32_t range_units_of(const void *x, int dtype, int64_t unit, int64_t units, int symmetric, int32_t *high,
                                 int32_t *low) {
  pi highs[FQ_LANES], lows[FQ_LANES];
  range_source s = {x, dtype, unit, units, symmetric, NULL, NULL};
  if (unit == FQ_BLOCK) {
    s.unit = FQ_BLOCK; /* for the compiler */
  } else if (unit == FQ_LANES && dtype == FQ_F32) {
    s.unit = FQ_LANES;
  } else {
    for (int i = 0; i < FQ_LANES && i < units; i++) {
      const range_part r = range_1(&s, i);
      highs[i] = r.high;
      if (!symmetric)
        lows[i] = r.low;
    }
    for (int64_t i = units; i < FQ_LANES; i++)
      highs[i] = lows[i] = pi_set(0);
    s.high = highs;
    s.low = lows;
  }
  pi all = pi_set(0);
  for (int k = 0; k < FQ_LANES; k += FQ_PART) {
    const range_part r = beyond_zero(FQ_CAT(range_, FQ_PART_LANES)(&s, k));
    memcpy(high + k, &r.high, sizeof r.high);
    all = pi_max(all, r.high);
    if (!symmetric) {
      memcpy(low + k, &r.low, sizeof r.low);
      all = pi_max(all, r.low);
    }
  }
  widen_ends(high, dtype);
  if (!symmetric)
    widen_ends(low, dtype);
  return dtype == FQ_F16 && pi_highest(all) >= FQ_INFINITY_HALF ? FQ_INFINITY_BITS : pi_highest(all);
}
FQ_INLINE int32_t range_units(const float *x, int64_t unit, int64_t units, int symmetric, int32_t *high, int32_t *low) {
  return range_units_of(x, FQ_F32, unit, units, symmetric, high, low);
}

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

/* Quality sums are made in so many lanes, two vectors: one alone would wait for its own last addition. */
enum { FQ_SUM_LANES = 2 * FQ_LANES };

/* Lanes added up: the upper half of them to the lower one, until one is left. */
#define FQ_FOLD(type)                                                                                                  \
  FQ_INLINE type fold_##type(type *lanes, int count) {                                                                 \
    for (int half = count / 2; half > 0; half /= 2)                                                                    \
      for (int k = 0; k < half; k++)                                                                                   \
        lanes[k] += lanes[k + half];                                                                                   \
    return lanes[0];                                                                                                   \
  }
FQ_FOLD(float)
FQ_FOLD(double)

/* The sums in float64, for spans whose squares leave the range of float32, or hold a NaN. */
static __attribute__((noinline)) void sum_wide(const float *x, const float *y, int64_t n, double sums[3]) {
  double lanes[3][FQ_SUM_LANES] = {{0}};
  for (int64_t i = 0; i < n; i++) {
    float a, b;
    memcpy(&a, x + i, sizeof a);
    memcpy(&b, y + i, sizeof b);
    const float error = b - a;
    const double v = (double)a, e = (double)error;
    lanes[0][i % FQ_SUM_LANES] += v * v;
    lanes[1][i % FQ_SUM_LANES] += e * e;
    lanes[2][i % FQ_SUM_LANES] += v * e;
  }
  for (int s = 0; s < 3; s++)
    sums[s] = fold_double(lanes[s], FQ_SUM_LANES);
}

/* The running sums of every second vector, with one rounding for each product and addition. */
typedef struct {
  vf x2, e2, xe;
} sum_lanes;

FQ_INLINE pi add_vector(const float *x, const float *y, sum_lanes *s, pi largest) {
  FQ_EACH {
    const pf v = pf_load(x + k * FQ_PART), e = pf_sub(pf_load(y + k * FQ_PART), v);
    s->x2.p[k] = pf_fma(v, v, s->x2.p[k]);
    s->e2.p[k] = pf_fma(e, e, s->e2.p[k]);
    s->xe.p[k] = pf_fma(v, e, s->xe.p[k]);
    largest = pi_max(largest, pi_and(pf_bits(e), pi_set(INT32_MAX)));
  }
  return largest;
}

FQ_INLINE double add_sums(vf even, vf odd) {
  float lanes[FQ_LANES];
  vf_store(lanes, vf_add(even, odd));
  return (double)fold_float(lanes, FQ_LANES);
}

/* Add the quality sums of one span: n weights x (a multiple of 16, zeros at the end) and their dequantized y. */
FQ_INLINE void measure(const float *x, const float *y, int64_t n, fetcher *next, fq_result *result) {
  sum_lanes even = {vf_set(0), vf_set(0), vf_set(0)}, odd = even;
  pi largest = pi_set(0);
  int64_t i = 0;
  for (; i + 2 * FQ_LANES <= n; i += 2 * FQ_LANES) {
    if (i % (4 * FQ_LANES) == 0)
      fetch_vectors(next, 1);
    largest = add_vector(x + i, y + i, &even, largest);
    largest = add_vector(x + i + FQ_LANES, y + i + FQ_LANES, &odd, largest);
  }
  if (i < n)
    largest = add_vector(x + i, y + i, &even, largest);
  double sums[3] = {add_sums(even.x2, odd.x2), add_sums(even.e2, odd.e2), add_sums(even.xe, odd.xe)};
  if (!(sums[0] > 0x1p-80 && sums[0] < 0x1p100 && sums[1] < 0x1p100))
    sum_wide(x, y, n, sums);
  result->sum_x2 += sums[0];
  result->sum_e2 += sums[1];
  result->sum_xe += sums[2];
  const int32_t bits = pi_highest(largest);
  int32_t known;
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
