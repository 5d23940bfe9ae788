/* MLX's affine codes (flightquant/reference/mlx.py): groups of 32 to 128 weights with a scale of either sign and a
 * bias, the end of the range that has the larger magnitude. */
#include "ends.h"
#include "families.h"

typedef struct {
  _Alignas(64) int32_t high[FQ_BLOCKS], low[FQ_BLOCKS];
  _Alignas(64) float least[FQ_BLOCKS], most[FQ_BLOCKS];
  _Alignas(64) float scale[FQ_BLOCKS], inverse[FQ_BLOCKS], bias[FQ_BLOCKS];
  _Alignas(64) float stored_scale[FQ_BLOCKS],
      stored_bias[FQ_BLOCKS]; /* rounded to their dtype; codes come before that */
  int careful;                /* the inverse of some scale is no shortcut */
} group_parameters;

static const float smallest_scale = 1e-7f;

FQ_INLINE void make_parameters(const fq_job *job, group_parameters *g, int64_t groups) {
  const float levels = (float)((1 << job->bits) - 1);
  g->careful = 0;
  for (int64_t i = 0; i < groups; i++) {
    const float least = g->least[i], most = g->most[i];
    const int below = fabsf(least) > fabsf(most);
    const float edge = below ? least : most;
    float step = (most - least) / levels;
    step = step > smallest_scale ? step : smallest_scale;
    const float scale = below ? step : -step, count = rintf(edge / scale);
    g->scale[i] = count != 0 ? edge / count : scale;
    g->bias[i] = count != 0 ? edge : 0;
    const float magnitude = fabsf(g->scale[i]);
    g->careful |= !(magnitude > 0x1p-80f && magnitude < 0x1p100f);
  }
  for (int64_t i = 0; i < groups; i += FQ_LANES) {
    const vf scale = vf_load(g->scale + i);
    vf_store(g->inverse + i, vf_div(vf_set(1), scale));
    vf_store(g->stored_scale + i, round_to(scale, job->scale_dtype));
    vf_store(g->stored_bias + i, round_to(vf_load(g->bias + i), job->scale_dtype));
  }
}

/* Parameters of the groups of a span. */
FQ_INLINE void span_groups(const fq_job *job, const float *x, int64_t begin, int64_t n, group_parameters *g,
                           fq_result *result) {
  const int64_t groups = n / job->unit, first = begin / job->unit;
  for (int64_t i = 0; i < groups; i += FQ_LANES) {
    if (range_units(x + i * job->unit, job->unit, groups - i, 0, g->high + i, g->low + i) >= FQ_INFINITY_BITS)
      note_bad(x, begin, n, result);
    for (int64_t k = i; k < i + FQ_LANES && k < groups; k++) {
      int32_t least, most;
      both_ends(x + k * job->unit, job->unit, g->high[k], g->low[k], &least, &most);
      g->least[k] = float_of(least);
      g->most[k] = float_of(most);
    }
  }
  make_parameters(job, g, groups);
  memcpy(job->scales + first, g->stored_scale, (size_t)groups * sizeof(float));
  memcpy(job->zeros + first, g->stored_bias, (size_t)groups * sizeof(float));
}

/* Codes less half their range, and weights again where they are wanted, of n weights (a multiple of 64). */
FQ_INLINE void quantize_span(const fq_job *job, fetcher *next, const float *x, int64_t n, const group_parameters *g,
                             int careful, int measured, int8_t *codes, float *y) {
  const vf levels = vf_set((float)((1 << job->bits) - 1));
  const vi half = vi_set(-(1 << (job->bits - 1)));
  const int64_t blocks_each = job->unit / FQ_BLOCK;
  const int shift = blocks_each == 4 ? 2 : blocks_each == 2 ? 1 : 0;
  for (int64_t at = 0; at < n; at += FQ_STEP) {
    vi code[FQ_STEP / FQ_LANES];
    fetch_step(next, measured);
    for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
      const int64_t i = at + v * FQ_LANES, group = (i / FQ_BLOCK) >> shift;
      const vf scale = vf_set(g->scale[group]), above = vf_sub(vf_load(x + i), vf_set(g->bias[group]));
      const vf q = careful ? vf_div(above, scale) : vf_quotient(above, scale, vf_set(g->inverse[group]), 1);
      code[v] = vf_nearest(vf_max(vf_min(q, levels), vf_set(0)));
      if (measured) {
        const vf scaled = vf_mul(vi_convert(code[v]), vf_set(g->stored_scale[group]));
        vf_store(y + i, vf_add(scaled, vf_set(g->stored_bias[group])));
      }
      code[v] = vi_add(code[v], half);
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, code, sizeof parts);
    pack_64(codes + at, parts);
  }
}

void FQ_NAME(mlx_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t codes[FQ_SPAN + 8];
  group_parameters g;
  memset(&g, 0, sizeof g);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, padded = round_up(n, FQ_STEP);
    const float *x = load_span(job, at, n, buffer);
    span_groups(job, x, at, n, &g, result);
    fetcher next = fetch_after(job, at, n);
    if (g.careful)
      quantize_span(job, &next, x, padded, &g, 1, 1, codes, again);
    else if (job->measure)
      quantize_span(job, &next, x, padded, &g, 0, 1, codes, again);
    else
      quantize_span(job, &next, x, padded, &g, 0, 0, codes, again);
    if (job->bits == 8)
      store_raised(job, job->data + at, codes, n);
    else
      FQ_NAME(pack_codes)(job, at, n, codes);
    if (job->measure)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}
