/* Small floats in small groups (flightquant/reference/micro.py): mxfp4 and mxfp8 of compressed-tensors, with a power of
 * two for each 32 weights; nvfp4, with an e4m3 for each 16 and a float32 for all. */
#include "minifloat.h"

enum { FQ_GROUPS = FQ_SPAN / 16 };

/* Weights of a group; the element's format; for powers of two, the exponent of its largest value, else 0. */
typedef struct {
  int group;
  const minifloat *element;
  int top;
} micro;

static const micro mxfp4 = {32, &e2m1, 2}, mxfp8 = {32, &e4m3, 8}, nvfp4 = {16, &e2m1, 0};

/* Quotients up to here are zero, without a sign, in the dtype of the arithmetic. */
FQ_INLINE int32_t zero_until(const fq_job *job) {
  return job->arithmetic == FQ_F16 ? 0x33000000 : job->arithmetic == FQ_BF16 ? 0x00008000 : 0;
}

#ifdef FQ_HAS_CELLS

/* e2m1 by cells, as in fq_bounds, of which one holds a bound at most. They are as wide as the least step, so that up to
 * 2 a quotient is rounded right by the sum that makes its cell. One of up to 7 has the place, in the order of the
 * values, of its cell's upper end, or the one before if it is less than the bound. That of the cell of 0 is the last
 * one that is zero without a sign. */
static const float origin = 0x1.8p22f, most_quotient = 7;
static const float bounds[32] = {
    0,         -INFINITY,      -INFINITY,     -INFINITY, -INFINITY, 0x1.400002p1f, -INFINITY, 3.5f,
    -INFINITY, -INFINITY,      0x1.400002p2f, -INFINITY, -INFINITY, -INFINITY,     -INFINITY, -INFINITY,
    -INFINITY, -INFINITY,      -INFINITY,     -INFINITY, -INFINITY, -INFINITY,     -5,        -INFINITY,
    -INFINITY, -0x1.bffffep1f, -INFINITY,     -2.5f,     -INFINITY, -INFINITY,     -INFINITY, -INFINITY};
static const int32_t places[32] = {8, 9, 10, 11, 12, 13, 13, 14, 14, 14, 15, 15, 15, 15, 15, 15,
                                   0, 0, 0,  0,  0,  0,  1,  1,  1,  2,  2,  3,  3,  4,  5,  6};
static const float values[16] = {-6, -4, -3, -2, -1.5f, -1, -0.5f, -0.0f, 0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
static const uint8_t codes_of_places[16] = {7, 6, 5, 4, 3, 2, 1, 0, 248, 249, 250, 251, 252, 253, 254, 255};

typedef struct {
  _Alignas(64) float bounds[32];
} zero_e2m1;

/* For quotients that are zero without a sign up to this magnitude. */
FQ_INLINE void set_zero(zero_e2m1 *z, int32_t zero) {
  memcpy(z->bounds, bounds, sizeof bounds);
  zero |= INT32_MIN;
  memcpy(z->bounds, &zero, sizeof zero);
}

/* Places of 16 quotients, and their values. */
FQ_INLINE vi codes_e2m1(vf q, const zero_e2m1 *z, vf *value) {
  vi place;
  FQ_EACH {
    const pi cell = pf_cell(q.p[k], 1, origin);
    place.p[k] = pi_discount_below(pi_lookup_32(cell, places), q.p[k], pf_lookup_32(cell, z->bounds));
  }
  *value = vi_lookup_16(place, values);
  return place;
}

/* Codes less 8 of 64 places. */
FQ_INLINE void settle_e2m1(int8_t *codes) { lookup_64(codes, codes_of_places); }

#else

static const float most_quotient = 0x1p100f;

typedef struct {
  int32_t magnitude;
} zero_e2m1;

FQ_INLINE void set_zero(zero_e2m1 *z, int32_t zero) { z->magnitude = zero; }

/* Codes less 8 of 16 quotients as e2m1, and their values. */
FQ_INLINE vi codes_e2m1(vf q, const zero_e2m1 *z, vf *value) {
  const vi bits = vf_bits(q), magnitude = vi_and(bits, vi_set(INT32_MAX));
  const vi sign = vi_and(vi_and(vi_sub(vi_set(z->magnitude), magnitude), bits), vi_set(INT32_MIN));
  const vi code = nearest_minifloat(vf_bits(vf_min(vi_float(magnitude), vf_set(6))), e2m1, value);
  *value = vi_float(vi_or(vf_bits(*value), sign));
  return vi_sub(vi_sub(code, vi_set(8)), vi_shift_28(sign));
}
FQ_INLINE void settle_e2m1(int8_t *codes) { (void)codes; }

#endif

typedef struct {
  _Alignas(64) int32_t high[FQ_GROUPS]; /* the largest magnitudes */
  /* What is stored, what weights are divided by, and its inverse. */
  _Alignas(64) float stored[FQ_GROUPS], scale[FQ_GROUPS], inverse[FQ_GROUPS];
  zero_e2m1 zero;
  /* nvfp4: where it is above 0 vf_quotient does not hold, or may lose the sign of what rounds to 0, or quotients are
   * too large. */
  vi careful;
  int streams; /* codes are stored where they stay, past the caches */
} span_scales;

/* Powers of two for 16 groups: the magnitude's own, rounded up from 1.75 times one, over the element's. */
FQ_INLINE void powers_16(const fq_job *job, int top, span_scales *s, int64_t at) {
  vi high;
  memcpy(&high, s->high + at, sizeof high);
  const vi least = job->arithmetic == FQ_F16 ? vi_max(high, vf_bits(vf_set(0x1p-14f))) : high;
  const vi rounded = vi_and(vi_add(least, vi_set(1 << 21)), vi_set(0x7f800000));
  const vi power = vi_sub(rounded, vi_set(top << 23));
  vi scale = vi_max(power, vi_set(0x00400000)); /* 2^-127 is the least */
  vi inverse = vi_sub(vi_set(254 << 23), vi_max(power, vi_set(0)));
  if (job->arithmetic == FQ_F16) {
    /* The library rounds the bits of float16's denormals, to its least power or to 0, for which it takes 1. */
    const vi none = vi_shift_31(vi_sub(high, vf_bits(vf_set(0x1.8p-15f)))), one = vf_bits(vf_set(1));
    scale = vi_choose(none, one, scale);
    inverse = vi_choose(none, one, inverse);
  }
  vf_store(s->stored + at, vi_float(scale));
  vf_store(s->scale + at, vi_float(scale));
  vf_store(s->inverse + at, vi_float(inverse));
}

/* The scales of 16 groups of nvfp4, under the tensor's own. */
FQ_INLINE void scales_16(const fq_job *job, float global, span_scales *s, int64_t at) {
  const vf amax = vf_load((const float *)(const void *)(s->high + at)), all = vf_set(global);
  const vf local = vf_mul(round_to(vf_div(amax, vf_set(6)), job->arithmetic), all);
  vf stored;
  nearest_minifloat(vf_bits(vf_min(local, vf_set(448))), e4m3, &stored);
  stored = vf_where_zero(stored, vf_set(0.125f), stored);
  const vf scale = vf_div(stored, all);
  vf_store(s->stored + at, stored);
  vf_store(s->scale + at, scale);
  vf_store(s->inverse + at, vf_div(vf_set(1), scale));
  const vi bits = vf_bits(scale), least = vf_bits(vf_set(0x1p-80f)), most = vf_bits(vf_set(1));
  /* Under a given magnitude that the weights exceed, or a scale of few bits, quotients may be large, or infinite. */
  const vi largest = vf_bits(vf_mul(amax, vf_load(s->inverse + at)));
  const vi above = vi_max(vi_sub(bits, most), vi_sub(largest, vf_bits(vf_set(most_quotient))));
  s->careful = vi_max(s->careful, vi_max(vi_sub(least, bits), above));
}

/* Codes, and weights again where they are wanted, of n weights (a multiple of 64): of 4 bits, less 8. */
FQ_INLINE void quantize_span(const micro *f, int careful, int measured, fetcher *next, const float *x, int64_t n,
                             const span_scales *s, int8_t *codes, float *y) {
  for (int64_t at = 0; at < n; at += FQ_STEP) {
    vi code[FQ_STEP / FQ_LANES];
    fetch_step(next, measured);
    for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
      const int64_t i = at + v * FQ_LANES, group = i / f->group;
      const vf weight = vf_load(x + i), scale = vf_set(s->scale[group]), inverse = vf_set(s->inverse[group]);
      vf q, value;
      if (f->group == 32)
        q = vf_mul(weight, inverse); /* by a power of two: as exact as a division */
      else
        q = careful ? vf_max(vf_min(vf_div(weight, scale), vf_set(6)), vf_set(-6))
                    : vf_quotient(weight, scale, inverse, 0);
      if (f->element->bits == 3) {
        code[v] = codes_e2m1(q, &s->zero, &value);
      } else {
        code[v] = nearest_float8(q, weight, *f->element, &value);
      }
      if (measured)
        vf_store(y + i, vf_mul(value, scale));
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, code, sizeof parts);
    store_64(codes + at, parts, s->streams);
    if (f->element->bits == 3)
      settle_e2m1(codes + at);
  }
}

static __attribute__((noinline)) void quantize_extreme(fetcher *next, const float *x, int64_t n, const span_scales *s,
                                                       int8_t *codes, float *y) {
  quantize_span(&nvfp4, 1, 1, next, x, n, s, codes, y);
}

/* Write the 4-bit codes of n weights from an index on. */
FQ_INLINE void pack_span(const fq_job *job, int64_t begin, int64_t n, const int8_t *codes) {
  uint8_t apart[FQ_SPAN / 2], *place = job->data + begin / 2, *to = packed_place(job, place, apart);
  int64_t i = 0;
  for (; i + FQ_STEP <= n; i += FQ_STEP)
    pack_nibbles_64(to + i / 2, codes + i);
  if (i < n) {
    uint8_t rest[FQ_STEP / 2];
    pack_nibbles_64(rest, codes + i);
    memcpy(to + i / 2, rest, (size_t)(n - i) / 2);
  }
  store_packed(job, place, to, n / 2);
}

FQ_INLINE void quantize_groups(const fq_job *job, const micro *f, int measured, int64_t begin, int64_t end,
                               fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t bytes[FQ_SPAN];
  span_scales s;
  memset(&s, 0, sizeof s);
  set_zero(&s.zero, f->group == 32 ? zero_until(job) : 0);
  const float global = f->top ? 1 : job->scales[job->n / f->group];
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, padded = round_up(n, FQ_STEP), groups = n / f->group;
    const float *x = load_span(job, at, n, buffer);
    fetcher next = fetch_after(job, at, n);
    vi highest = vi_set(0);
    s.careful = highest;
    for (int64_t g = 0; g < groups; g += FQ_LANES) {
      /* of magnitudes there is no low */
      range_units(x + g * f->group, f->group, groups - g, 1, s.high + g, s.high + g);
      highest = vi_max(highest, vf_bits(vf_load((const float *)(const void *)(s.high + g))));
      if (f->top)
        powers_16(job, f->top, &s, g);
      else
        scales_16(job, global, &s, g);
    }
    if (vi_highest(highest) >= FQ_INFINITY_BITS)
      note_bad(x, at, n, result);
    memcpy(job->scales + at / f->group, s.stored, (size_t)groups * sizeof(float));
    int8_t *codes = f->element->bits == 7 && stay_in_place(job, job->data + at, n) ? (int8_t *)job->data + at : bytes;
    s.streams = data_stream(job) && codes != bytes;
    if (vi_highest(s.careful) > 0)
      quantize_extreme(&next, x, padded, &s, codes, again);
    else
      quantize_span(f, 0, measured, &next, x, padded, &s, codes, again);
    if (f->element->bits == 3)
      pack_span(job, at, n, codes);
    else
      store_packed(job, job->data + at, (const uint8_t *)codes, n);
    if (measured)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}

FQ_INLINE void quantize_format(const fq_job *job, const micro *f, int64_t begin, int64_t end, fq_result *result) {
  if (job->measure)
    quantize_groups(job, f, 1, begin, end, result);
  else
    quantize_groups(job, f, 0, begin, end, result);
}

void FQ_NAME(micro_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  switch (job->family) {
  case FQ_MXFP4:
    quantize_format(job, &mxfp4, begin, end, result);
    break;
  case FQ_MXFP8:
    quantize_format(job, &mxfp8, begin, end, result);
    break;
  default:
    quantize_format(job, &nvfp4, begin, end, result);
  }
}

/* The tensor's own scale of nvfp4, for its largest magnitude: the least group's scale that e4m3 holds is 448. */
void FQ_NAME(nvfp4_parameters)(const fq_job *job, const fq_range *range, float *global) {
  static const float least_normal[] = {0x1p-126f, 0x1p-14f, 0x1p-126f, 0x1p-126f};
  float amax;
  memcpy(&amax, &range->high, sizeof amax);
  const vf least = vf_set(least_normal[job->arithmetic]);
  const vf inverse = round_to(vf_div(vf_set(1), vf_max(vf_set(amax), least)), job->arithmetic);
  float lanes[FQ_LANES];
  vf_store(lanes, round_to(vf_mul(inverse, vf_set(2688)), job->arithmetic));
  *global = isfinite(lanes[0]) ? lanes[0] : 1; /* so does the library where 1 / amax or its product overflows */
}
