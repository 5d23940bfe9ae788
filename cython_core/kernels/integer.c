/* int8 and int4, symmetric and asymmetric: the rule of compressed-tensors (flightquant/reference/integer.py). */
#include "families.h"

static const float dtype_eps[] = {0x1p-23f, 0x1p-10f, 0x1p-7f, 0x1p-23f};
static const float dtype_max[] = {INFINITY, 65504.0f, 0x1.fep127f, INFINITY};

/* Ranges and parameters of the units of one span. Block i of 32 weights has those of unit i >> shift. */
typedef struct {
  _Alignas(64) int32_t high[FQ_BLOCKS], low[FQ_BLOCKS];
  _Alignas(64) float scale[FQ_BLOCKS], inverse[FQ_BLOCKS], zero[FQ_BLOCKS];
  int shift;
  int careful; /* the shortcuts of the common loop do not hold for some scale */
} span_units;

/* Where the shortcuts hold: the product with an inverse neither over- nor underflows, and the scale is so near to
 * amax / 7.5 that no code can fall below the lowest. */
static const float least_usual[] = {0x1p-100f, 0x1p-14f, 0x1p-100f, 0x1p-100f};
static const float most_usual[] = {0x1p100f, 65503.0f, 0x1p100f, 0x1p100f};

FQ_INLINE int unusual(const fq_job *job, vf scale) {
  const vi bits = vf_bits(scale), least = vf_bits(vf_set(least_usual[job->scale_dtype]));
  const vi most = vf_bits(vf_set(most_usual[job->scale_dtype]));
  return vi_highest(vi_max(vi_sub(least, bits), vi_sub(bits, most))) > 0;
}

/* Scales, their inverses and zero points of 16 units at once. */
FQ_INLINE void parameters_16(const fq_job *job, span_units *u, int at) {
  const float levels = (float)((1 << job->bits) - 1), low = (float)-(1 << (job->bits - 1));
  vf scale, zero = vf_set(0);
  if (job->symmetric) {
    const vf amax = vf_load((const float *)(const void *)(u->high + at));
    scale = round_to(vf_div(amax, vf_set(levels / 2)), job->arithmetic);
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

void FQ_NAME(integer_parameters)(const fq_job *job, const fq_range *ranges, int64_t count, float *scales,
                                 float *zeros) {
  span_units u;
  for (int64_t at = 0; at < count; at += FQ_LANES) {
    memset(&u, 0, sizeof u);
    const int64_t n = count - at < FQ_LANES ? count - at : FQ_LANES;
    for (int64_t i = 0; i < n; i++) {
      u.high[i] = ranges[at + i].high;
      u.low[i] = ranges[at + i].low;
    }
    parameters_16(job, &u, 0);
    memcpy(scales + at, u.scale, (size_t)n * sizeof(float));
    if (zeros)
      memcpy(zeros + at, u.zero, (size_t)n * sizeof(float));
  }
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

/* Codes, and weights again where they are wanted, of n weights (a multiple of 64). */
FQ_INLINE void quantize_span(fetcher *next, const float *x, int64_t n, const span_units *u, int bits, int arithmetic,
                             int symmetric, int careful, int measured, int8_t *codes, float *y) {
  enum { VECTORS = FQ_STEP / FQ_LANES, EACH = FQ_BLOCK / FQ_LANES };
  const vf low = vf_set((float)-(1 << (bits - 1))), high = vf_set((float)((1 << (bits - 1)) - 1));
  const float *end = x + n;
  for (uint32_t block = 0; x < end; x += FQ_STEP, y += FQ_STEP, codes += FQ_STEP) {
    vi code[VECTORS];
    fetch_vectors(next, measured ? VECTORS / 2 : VECTORS);
    for (int half = 0; half < 2; half++, block++) {
      const uint32_t unit = block >> u->shift;
      const vf scale = vf_set(u->scale[unit]), inverse = vf_set(u->inverse[unit]), zero = vf_set(u->zero[unit]);
      for (int v = half * EACH; v < (half + 1) * EACH; v++) {
        const vf weight = vf_load(x + v * FQ_LANES);
        vf q;
        if (careful)
          q = vf_div(weight, scale);
        else if (arithmetic != FQ_F32)
          q = vf_mul(weight, inverse);
        else
          q = vf_quotient(weight, scale, inverse, !symmetric);
        if (arithmetic != FQ_F32)
          q = round_quotient(q, arithmetic);
        if (!symmetric)
          q = round_to(vf_add(q, zero), arithmetic);
        if (careful || !symmetric)
          q = vf_max(q, low);
        code[v] = vf_nearest(vf_min(q, high));
        if (measured) {
          const vf level = vi_convert(code[v]);
          vf_store(y + v * FQ_LANES, vf_mul(symmetric ? level : vf_sub(level, zero), scale));
        }
      }
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, code, sizeof parts);
    pack_64(codes, parts);
  }
}

/* One copy of the loop for each set of options that changes its instructions. */
FQ_INLINE void quantize_options(const fq_job *job, fetcher *next, const float *x, int64_t n, const span_units *u,
                                int bits, int8_t *codes, float *y) {
#define FQ_LOOP(arithmetic, symmetric, measured)                                                                       \
  quantize_span(next, x, n, u, bits, arithmetic, symmetric, 0, measured, codes, y)
#define FQ_LOOPS(arithmetic)                                                                                           \
  if (job->symmetric && job->measure)                                                                                  \
    FQ_LOOP(arithmetic, 1, 1);                                                                                         \
  else if (job->symmetric)                                                                                             \
    FQ_LOOP(arithmetic, 1, 0);                                                                                         \
  else if (job->measure)                                                                                               \
    FQ_LOOP(arithmetic, 0, 1);                                                                                         \
  else                                                                                                                 \
    FQ_LOOP(arithmetic, 0, 0);
  switch (job->arithmetic) {
  case FQ_BF16:
    FQ_LOOPS(FQ_BF16)
    break;
  case FQ_F16:
    FQ_LOOPS(FQ_F16)
    break;
  default:
    FQ_LOOPS(FQ_F32)
  }
}

static __attribute__((noinline)) void quantize_extreme(const fq_job *job, fetcher *next, const float *x, int64_t n,
                                                       const span_units *u, int8_t *codes, float *y) {
  quantize_span(next, x, n, u, job->bits, job->arithmetic, job->symmetric, 1, job->measure, codes, y);
}

/* Write the codes of n weights from an index on; at the end of a row, also the bytes that fill it up. */
FQ_INLINE void pack_span(const fq_job *job, int64_t begin, int64_t n, int8_t *codes) {
  const int64_t row = begin / job->cols, col = begin % job->cols;
  const int whole_rows = job->row_bytes * 8 == job->cols * job->bits;
  uint8_t *to = job->data + row * job->row_bytes + col * job->bits / 8;
  if (job->bits == 8) {
    if ((uint8_t *)codes != to)
      memcpy(to, codes, (size_t)n);
    return;
  }
  int64_t i = 0;
  for (; i + FQ_STEP <= n; i += FQ_STEP)
    pack_nibbles_64(to + i / 2, codes + i);
  if (i < n) {
    uint8_t bytes[FQ_STEP / 2];
    for (int64_t k = n; k < i + FQ_STEP; k++)
      codes[k] = -8;
    pack_nibbles_64(bytes, codes + i);
    memcpy(to + i / 2, bytes, (size_t)((n - i + 1) / 2));
  }
  if (!whole_rows && col + n == job->cols) {
    const int64_t used = (job->cols + 1) / 2;
    memset(job->data + row * job->row_bytes + used, 0, (size_t)(job->row_bytes - used));
  }
}

void FQ_NAME(integer_reduce)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN];
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, padded = round_up(n, FQ_STEP);
    const float *x = load_span(job, at, n, buffer);
    pi highs, lows;
    if (job->symmetric)
      range_lanes(x, padded, 1, &highs, &lows);
    else
      range_lanes(x, padded, 0, &highs, &lows);
    const int32_t high = pi_highest(highs), low = pi_highest(lows);
    if (high >= FQ_INFINITY_BITS || low >= FQ_INFINITY_BITS)
      note_bad(x, at, n, result);
    result->range.high = high > result->range.high ? high : result->range.high;
    result->range.low = low > result->range.low ? low : result->range.low;
    at = stop;
  }
}

/* Ranges, then parameters, of the units that a span joins. */
FQ_INLINE void span_parameters(const fq_job *job, const float *x, int64_t begin, int64_t n, span_units *u,
                               fq_result *result) {
  const int64_t units = n / job->unit, first = begin / job->unit;
  u->careful = 0;
  for (int64_t i = 0; i < units; i += FQ_LANES) {
    const float *from = x + i * job->unit;
    int32_t highest;
    if (job->symmetric)
      highest = range_units(from, job->unit, units - i, 1, u->high + i, u->low + i);
    else
      highest = range_units(from, job->unit, units - i, 0, u->high + i, u->low + i);
    if (highest >= FQ_INFINITY_BITS)
      note_bad(x, begin, n, result);
    parameters_16(job, u, (int)i);
  }
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
    u->high[0] = found.range.high;
    u->low[0] = found.range.low;
    parameters_16(job, u, 0);
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

void FQ_NAME(integer_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
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
    const float *x = load_span(job, at, n, buffer);
    if (joined)
      span_parameters(job, x, at, n, &u, result);
    fetcher next = fetch_from(job, at + (job->unit > n ? job->unit : n));
    /* 8-bit codes are the packed bytes, if no step reaches past them. */
    int8_t *codes = job->bits == 8 && padded == n ? (int8_t *)job->data + at : bytes;
    if (u.careful)
      quantize_extreme(job, &next, x, padded, &u, codes, again);
    else if (job->bits == 8)
      quantize_options(job, &next, x, padded, &u, 8, codes, again);
    else
      quantize_options(job, &next, x, padded, &u, 4, codes, again);
    pack_span(job, at, n, codes);
    /* not up to padded: past the last unit a step has no parameters */
    if (job->measure)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}
