/* Codes between the least and the largest weight of a unit, with a float zero point: arrow_quant_v2's rule
 * (flightquant/reference/arrowquant.py).
 *
 * Here fq_range holds both ends as integers that order like the weights themselves: high is the largest weight's, low
 * the complement of the least one's. */
#include "ends.h"
#include "scaled.h"

/* From the ends in zero[] (the least) and scale[] (the largest): scales, their inverses and zero points of 16 units. */
FQ_INLINE void ends_to_parameters_16(const fq_job *job, span_units *u, int64_t at) {
  const vf least = vf_load(u->zero + at), most = vf_load(u->scale + at);
  const vf range = vf_min(vf_sub(most, least), vf_set(0x1.fffffep127f));
  vf scale = vf_div(range, vf_set((float)((1 << job->bits) - 1)));
  scale = vf_where_zero(scale, vf_set(1), scale);
  vf_store(u->scale + at, scale);
  vf_store(u->inverse + at, vf_div(vf_set(1), scale));
  vf_store(u->zero + at, vf_sub(vf_set(0), vf_div(least, scale)));
  u->careful |= unusual(job, scale);
}

void FQ_NAME(affine_reduce)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN];
  result->range = (fq_range){INT32_MIN, INT32_MIN};
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at;
    const float *x = load_span(job, at, n, buffer);
    pi highs, lows;
    range_lanes(x, round_up(n, FQ_STEP), 0, &highs, &lows);
    const int32_t high = pi_highest(highs), low = pi_highest(lows);
    if (high >= FQ_INFINITY_BITS || low >= FQ_INFINITY_BITS)
      note_bad(x, at, n, result);
    int32_t least, most;
    both_ends(x, n, high, low, &least, &most);
    const int32_t above = ordered(most), below = ~ordered(least);
    result->range.high = above > result->range.high ? above : result->range.high;
    result->range.low = below > result->range.low ? below : result->range.low;
    at = stop;
  }
}

void FQ_NAME(affine_parameters)(const fq_job *job, const fq_range *ranges, int64_t count, float *scales, float *zeros) {
  span_units u;
  for (int64_t i = 0; i < count; i++) {
    memset(&u, 0, sizeof u);
    u.scale[0] = float_of(ordered(ranges[i].high));
    u.zero[0] = float_of(ordered(~ranges[i].low));
    ends_to_parameters_16(job, &u, 0);
    scales[i] = u.scale[0];
    zeros[i] = u.zero[0];
  }
}

/* The parameters of the units that a span joins. */
FQ_INLINE void joined_parameters(const fq_job *job, const float *x, int64_t begin, int64_t n, span_units *u,
                                 fq_result *result) {
  const int64_t units = n / job->unit, first = begin / job->unit;
  u->careful = 0;
  for (int64_t i = 0; i < units; i += FQ_LANES) {
    if (range_units(x + i * job->unit, job->unit, units - i, 0, u->high + i, u->low + i) >= FQ_INFINITY_BITS)
      note_bad(x, begin, n, result);
    for (int64_t k = i; k < i + FQ_LANES; k++) {
      int32_t least = 0, most = 0;
      if (k < units)
        both_ends(x + k * job->unit, job->unit, u->high[k], u->low[k], &least, &most);
      u->zero[k] = float_of(least);
      u->scale[k] = float_of(most);
    }
    ends_to_parameters_16(job, u, i);
  }
  memcpy(job->scales + first, u->scale, (size_t)units * sizeof(float));
  memcpy(job->zeros + first, u->zero, (size_t)units * sizeof(float));
  spread(u, units, job->unit / FQ_BLOCK);
}

/* Those of one unit longer than a span, or of a width that spans do not join. */
FQ_INLINE void single_parameters(const fq_job *job, int64_t begin, int64_t end, span_units *u, fq_result *result) {
  const int64_t unit = job->shared_scale ? 0 : begin / job->unit;
  u->shift = 31;
  u->careful = 0;
  if (!job->given_scales) {
    fq_result found = {.first_bad = -1};
    FQ_NAME(affine_reduce)(job, begin, end, &found);
    if (result->first_bad < 0)
      result->first_bad = found.first_bad;
    FQ_NAME(affine_parameters)(job, &found.range, 1, job->scales + unit, job->zeros + unit);
  }
  u->scale[0] = job->scales[unit];
  u->inverse[0] = 1.0f / u->scale[0];
  u->zero[0] = job->zeros[unit];
  u->careful = unusual(job, vf_set(u->scale[0]));
}

/* Codes less 128, and weights again where they are wanted, of n weights (a multiple of 64). */
FQ_INLINE void quantize_span(fetcher *next, const float *x, int64_t n, const span_units *u, int bits, int careful,
                             int measured, int8_t *codes, float *y) {
  const vf levels = vf_set((float)((1 << bits) - 1));
  for (int64_t at = 0; at < n; at += FQ_STEP) {
    vi code[FQ_STEP / FQ_LANES];
    fetch_step(next, measured);
    for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
      const int64_t i = at + v * FQ_LANES;
      const uint32_t unit = (uint32_t)(i / FQ_BLOCK) >> u->shift;
      const vf scale = vf_set(u->scale[unit]), zero = vf_set(u->zero[unit]), weight = vf_load(x + i);
      vf q = careful ? vf_div(weight, scale) : vf_quotient(weight, scale, vf_set(u->inverse[unit]), 1);
      q = vf_max(vf_min(vf_add(q, zero), levels), vf_set(0));
      code[v] = vf_truncate(vf_add(q, vf_set(0x1.fffffep-2f))); /* half away from zero */
      if (measured)
        vf_store(y + i, vf_mul(vf_sub(vi_convert(code[v]), zero), scale));
      code[v] = vi_add(code[v], vi_set(-128));
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, code, sizeof parts);
    pack_64(codes + at, parts);
  }
}

static void quantize(const fq_job *job, fetcher *next, const float *x, int64_t n, const span_units *u, int8_t *codes,
                     float *y) {
  if (u->careful)
    quantize_span(next, x, n, u, job->bits, 1, 1, codes, y);
  else if (job->measure)
    quantize_span(next, x, n, u, job->bits, 0, 1, codes, y);
  else
    quantize_span(next, x, n, u, job->bits, 0, 0, codes, y);
}

void FQ_NAME(affine_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t codes[FQ_SPAN];
  span_units u;
  memset(&u, 0, sizeof u);
  const int joined = joins_units(job->unit) && !job->given_scales;
  int64_t known_until = begin; /* u holds the parameters of the unit that ends here */
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, padded = round_up(n, FQ_STEP);
    if (!joined && at == known_until) {
      const int64_t unit_end = job->shared_scale ? end : at - at % job->unit + job->unit;
      known_until = unit_end < end ? unit_end : end;
      single_parameters(job, at, known_until, &u, result);
    }
    const float *x = load_span(job, at, n, buffer);
    if (joined)
      joined_parameters(job, x, at, n, &u, result);
    fetcher next = fetch_after(job, at, n);
    quantize(job, &next, x, padded, &u, codes, again);
    store_raised(job, job->data + at, codes, n);
    if (job->measure) {
      for (int64_t i = n; i < round_up(n, FQ_LANES); i++) /* the zeros that fill x up need not have come back as such */
        again[i] = 0;
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    }
    at = stop;
  }
}
