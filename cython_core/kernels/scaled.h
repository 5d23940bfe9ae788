/* What the families share whose scales stand apart from the codes, one for each unit or one in all: ranges,
 * parameters, and the way through a tile. */
#ifndef FQ_SCALED_H
#define FQ_SCALED_H

#include "families.h"

static const float dtype_eps[] = {0x1p-23f, 0x1p-10f, 0x1p-7f, 0x1p-23f};
static const float dtype_max[] = {INFINITY, 65504.0f, 0x1.fep127f, INFINITY};

/* Ranges and parameters of the units of one span. Block i of 32 weights has those of unit i >> shift. */
typedef struct {
  _Alignas(64) int32_t high[FQ_BLOCKS], low[FQ_BLOCKS];
  _Alignas(64) float scale[FQ_BLOCKS], inverse[FQ_BLOCKS], zero[FQ_BLOCKS];
  int shift;
  int streams; /* codes are stored where they stay, past the caches */
  int careful; /* the shortcuts of the common loop do not hold for some scale */
} span_units;

/* Where the shortcuts hold: no product with the scale or its inverse over- or underflows, and the scale is so near to
 * what amax asks for that no code can fall below the lowest. */
static const float least_usual[] = {0x1p-80f, 0x1p-14f, 0x1p-80f, 0x1p-80f};
static const float most_usual[] = {0x1p100f, 65503.0f, 0x1p100f, 0x1p100f};

FQ_INLINE int unusual(const fq_job *job, vf scale) {
  const vi bits = vf_bits(scale), least = vf_bits(vf_set(least_usual[job->scale_dtype]));
  const vi most = vf_bits(vf_set(most_usual[job->scale_dtype]));
  return vi_highest(vi_max(vi_sub(least, bits), vi_sub(bits, most))) > 0;
}

/* The dtype in which a span's weights are taken: 16-bit ones as they are where the arithmetic is theirs, converted by
 * the loops over them; all others as float32. */
FQ_INLINE int span_dtype(const fq_job *job) { return job->arithmetic; }

/* The span's n weights in this dtype, followed by zeros up to a whole step: in place, or in buffer. */
FQ_INLINE const char *weights_span(const fq_job *job, int64_t begin, int64_t n, float *buffer) {
  if (span_dtype(job) != FQ_F32)
    return halves_span(job, begin, n, (char *)buffer);
  return (const char *)load_span(job, begin, n, buffer);
}

/* The same weights as float32, once a quantizer that measures has been over them. */
FQ_INLINE const float *wide_span(const fq_job *job, const char *x, const float *wide) {
  return span_dtype(job) != FQ_F32 ? wide : (const float *)(const void *)x;
}

/* The magnitude, in steps of the scale, of the largest weight of a symmetric unit. */
FQ_INLINE float highest_level(const fq_job *job) {
  switch (job->family) {
  case FQ_FP8_E4M3:
    return 448;
  case FQ_FP8_E5M2:
    return 57344;
  default:
    return (float)((1 << job->bits) - 1) / 2;
  }
}

/* Scales, their inverses and zero points of 16 units at once. */
FQ_INLINE void parameters_16(const fq_job *job, span_units *u, int at) {
  const float levels = (float)((1 << job->bits) - 1), low = (float)-(1 << (job->bits - 1));
  vf scale, zero = vf_set(0);
  if (job->symmetric) {
    const vf amax = vf_load((const float *)(const void *)(u->high + at));
    scale = round_to(vf_div(amax, vf_set(highest_level(job))), job->arithmetic);
  } else {
    const vf smallest = vf_sub(vf_set(0), vf_load((const float *)(const void *)(u->low + at)));
    const vf largest = vf_load((const float *)(const void *)(u->high + at));
    const vf range = round_to(vf_sub(largest, smallest), job->arithmetic);
    scale = round_to(vf_div(range, vf_set(levels)), job->arithmetic);
    const vf steps = round_to(vf_div(smallest, scale), job->arithmetic);
    zero = round_to(vf_sub(vf_set(low), steps), job->arithmetic);
    /* 0 / 0: an all-zero unit, whose NaN the library turns into 0 */
    zero = vf_where_zero(scale, vf_where_zero(smallest, vf_set(0), zero), zero);
    zero = vf_min(vf_max(zero, vf_set(low)), vf_set(-low - 1));
    zero = vi_convert(vf_nearest(zero));
  }
  if (job->scale_dtype != job->arithmetic)
    scale = round_to(vf_min(scale, vf_set(dtype_max[job->scale_dtype])), job->scale_dtype);
  scale = vf_where_zero(scale, vf_set(dtype_eps[job->scale_dtype]), scale);
  vf_store(u->scale + at, scale);
  vf_store(u->inverse + at, vf_div(vf_set(1), scale));
  vf_store(u->zero + at, zero);
  u->careful |= unusual(job, scale);
}

/* Let block i find its unit by a shift: units of 2^k blocks do, others are spread over their blocks. */
FQ_INLINE void spread(span_units *u, int64_t units, int64_t blocks_each) {
  u->shift = 0;
  while ((int64_t)1 << u->shift < blocks_each)
    u->shift++;
  if ((int64_t)1 << u->shift == blocks_each)
    return;
  u->shift = 0;
  for (int64_t block = units * blocks_each - 1; block >= 0; block--) {
    u->scale[block] = u->scale[block / blocks_each];
    u->inverse[block] = u->inverse[block / blocks_each];
    u->zero[block] = u->zero[block / blocks_each];
  }
}

/* The low bits that a 16-bit dtype drops from a float32. A quotient of two values of that dtype is never halfway
 * between two others (it would need one bit more than the divisor can cancel), nor is its product with the inverse on
 * the other side: so adding half and cutting rounds it right. A sum can be halfway: round_bf16, round_f16. */
FQ_INLINE vf round_quotient(vf a, int arithmetic) {
  const int32_t drop = arithmetic == FQ_BF16 ? 0x10000 : 0x2000;
  return vi_float(vi_and(vi_add(vf_bits(a), vi_set(drop / 2)), vi_set(-drop)));
}

/* The ranges of at most 16 units; the highest of them all. */
FQ_INLINE int32_t ranges_16(const fq_job *job, const char *x, int64_t units, int symmetric, int32_t *high,
                            int32_t *low) {
  switch (span_dtype(job)) {
  case FQ_BF16:
    return range_units_of(x, FQ_BF16, job->unit, units, symmetric, high, low);
  case FQ_F16:
    return range_units_of(x, FQ_F16, job->unit, units, symmetric, high, low);
  default:
    return range_units_of(x, FQ_F32, job->unit, units, symmetric, high, low);
  }
}

static __attribute__((noinline)) void shrink_16(const fq_job *job, int64_t begin, int64_t units, int32_t *high,
                                                int32_t *low) {
  _Alignas(64) float buffer[FQ_SPAN];
  const float *x = load_span(job, begin, units * job->unit, buffer);
  FQ_NAME(shrink_units)(job, x, begin, units, high, low);
}

/* Ranges, then parameters, of the units that a span joins. */
FQ_INLINE void span_parameters(const fq_job *job, const char *x, int64_t begin, int64_t n, span_units *u,
                               fq_result *result) {
  const int64_t units = n / job->unit, first = begin / job->unit;
  u->careful = 0;
  for (int64_t i = 0; i < units; i += FQ_LANES) {
    const char *from = x + i * job->unit * fq_dtype_bytes[span_dtype(job)];
    int32_t highest;
    if (job->symmetric)
      highest = ranges_16(job, from, units - i, 1, u->high + i, u->low + i);
    else
      highest = ranges_16(job, from, units - i, 0, u->high + i, u->low + i);
    if (highest >= FQ_INFINITY_BITS)
      FQ_NAME(note_bad_weights)(job, begin, begin + n, result);
    if (job->shrinks)
      shrink_16(job, begin + i * job->unit, units - i < FQ_LANES ? units - i : FQ_LANES, u->high + i, u->low + i);
    parameters_16(job, u, (int)i);
  }
  u->careful |= job->shrinks;
  memcpy(job->scales + first, u->scale, (size_t)units * sizeof(float));
  if (job->zeros)
    memcpy(job->zeros + first, u->zero, (size_t)units * sizeof(float));
  spread(u, units, job->unit / FQ_BLOCK);
}

/* The parameters of one unit longer than a span, or of a width that spans do not join. */
FQ_INLINE void unit_parameters(const fq_job *job, int64_t begin, int64_t end, span_units *u, fq_result *result) {
  const int64_t unit = job->shared_scale ? 0 : begin / job->unit;
  u->shift = 31;
  u->careful = 0;
  if (!job->given_scales) {
    fq_result found = {.first_bad = -1};
    FQ_NAME(integer_reduce)(job, begin, end, &found);
    if (result->first_bad < 0)
      result->first_bad = found.first_bad;
    if (job->shrinks) {
      double errors[FQ_SHRINKS];
      FQ_NAME(shrink_errors)(job, &found.range, begin, end, errors);
      FQ_NAME(shrink_range)(errors, &found.range);
    }
    u->high[0] = found.range.high;
    u->low[0] = found.range.low;
    parameters_16(job, u, 0);
    u->careful |= job->shrinks;
    job->scales[unit] = u->scale[0];
    if (job->zeros)
      job->zeros[unit] = u->zero[0];
  } else {
    u->scale[0] = job->scales[unit];
    u->inverse[0] = 1.0f / u->scale[0];
    u->zero[0] = job->zeros ? job->zeros[unit] : 0;
    u->careful = unusual(job, vf_set(u->scale[0])) || job->given_scales > 1;
  }
}

/* Codes of n weights in span_dtype (a multiple of 64); where they are measured also weights again, and 16-bit ones as
 * float32. */
typedef void span_quantizer(const fq_job *job, fetcher *next, const char *x, int64_t n, const span_units *u,
                            int8_t *codes, float *wide, float *y);
/* Write the codes of n weights from an index on; codes may be changed past the n-th. */
typedef void span_packer(const fq_job *job, int64_t begin, int64_t n, int8_t *codes);

/* Quantize a tile, span by span: parameters, codes, packed bytes, quality sums. */
FQ_INLINE void quantize_tile(const fq_job *job, int64_t begin, int64_t end, fq_result *result,
                             span_quantizer *quantizer, span_packer *packer) {
  _Alignas(64) float buffer[FQ_SPAN], wide[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t bytes[FQ_SPAN];
  span_units u;
  memset(&u, 0, sizeof u);
  const int joined = joins_units(job->unit) && !job->given_scales;
  int64_t known_until = begin; /* u holds the parameters of the unit that ends here */
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, padded = round_up(n, FQ_STEP);
    if (!joined && at == known_until) {
      const int64_t unit_end = job->shared_scale ? end : at - at % job->unit + job->unit;
      known_until = unit_end < end ? unit_end : end;
      unit_parameters(job, at, known_until, &u, result);
    }
    const char *x = weights_span(job, at, n, buffer);
    fetcher next = fetch_after(job, at, n);
    if (joined)
      span_parameters(job, x, at, n, &u, result);
    /* 8-bit codes are the packed bytes. */
    int8_t *codes = job->bits == 8 && stay_in_place(job, job->data + at, n) ? (int8_t *)job->data + at : bytes;
    u.streams = data_stream(job) && codes != bytes;
    quantizer(job, &next, x, padded, &u, codes, wide, again);
    packer(job, at, n, codes);
    /* not up to padded: past the last unit a step has no parameters */
    if (job->measure)
      measure(wide_span(job, x, wide), again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}

#endif
