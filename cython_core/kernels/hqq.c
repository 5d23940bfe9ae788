/* HQQ's codes (flightquant/reference/hqq.py): groups of 32 to 128 weights with a float scale and zero point, a byte
 * each at first; those of fewer bits are folded after all tiles. */
#include "ends.h"
#include "families.h"

typedef struct {
  _Alignas(64) int32_t high[FQ_BLOCKS], low[FQ_BLOCKS];
  _Alignas(64) float factor[FQ_BLOCKS], scale[FQ_BLOCKS], zero[FQ_BLOCKS];
} group_parameters;

/* The first of the weights that are 0, with its sign. */
static __attribute__((noinline)) float first_zero(const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (x[i] == 0)
      return x[i];
  return 0;
}

/* Parameters of the groups of a span. */
FQ_INLINE void span_groups(const fq_job *job, const float *x, int64_t begin, int64_t n, group_parameters *g,
                           fq_result *result) {
  const int64_t groups = n / job->unit;
  const float levels = (float)((1 << job->bits) - 1);
  for (int64_t i = 0; i < groups; i += FQ_LANES) {
    if (range_units(x + i * job->unit, job->unit, groups - i, 0, g->high + i, g->low + i) >= FQ_INFINITY_BITS)
      note_bad(x, begin, n, result);
    for (int64_t k = i; k < i + FQ_LANES && k < groups; k++) {
      const float *group = x + k * job->unit;
      int32_t low, high;
      both_ends(group, job->unit, g->high[k], g->low[k], &low, &high);
      float least = float_of(low), range = float_of(high) - least;
      if (least == 0)
        least = first_zero(group, job->unit);
      range = range < 0x1.fffffep127f ? range : 0x1.fffffep127f;
      float factor = 1.0f / range * levels;
      factor = factor < 2e4f ? factor : 2e4f;
      factor = range <= 1e-4f ? 1 : factor;
      g->factor[k] = factor;
      g->scale[k] = 1.0f / factor;
      g->zero[k] = -least * factor;
    }
  }
}

void FQ_NAME(hqq_errors)(const fq_job *job, int64_t begin, int64_t end, double *errors) {
  _Alignas(64) float buffer[FQ_SPAN];
  fq_result unused = {.first_bad = -1};
  group_parameters g;
  for (int step = 0; step < FQ_STEPS; step++)
    errors[step] = 0;
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at;
    const float *x = load_span(job, at, n, buffer);
    span_groups(job, x, at, n, &g, &unused);
    FQ_NAME(take_steps)(job, x, n, g.factor, g.zero, FQ_STEPS, errors);
    memcpy(job->zeros + at / job->unit, g.zero, (size_t)(n / job->unit) * sizeof(float));
    at = stop;
  }
}

/* Move the zero points as many steps as were counted: those of all steps stand there already. */
static void move_zeros(const fq_job *job, const float *x, int64_t begin, int64_t n, group_parameters *g) {
  if (job->steps == FQ_STEPS)
    memcpy(g->zero, job->zeros + begin / job->unit, (size_t)(n / job->unit) * sizeof(float));
  else
    FQ_NAME(take_steps)(job, x, n, g->factor, g->zero, job->steps, NULL);
}

/* Codes less 128, and weights again where they are wanted, of n weights (a multiple of 64). */
FQ_INLINE void quantize_span(const fq_job *job, fetcher *next, const float *x, int64_t n, const group_parameters *g,
                             int measured, int8_t *codes, float *y) {
  const vf levels = vf_set((float)((1 << job->bits) - 1));
  const int64_t blocks_each = job->unit / FQ_BLOCK;
  const int shift = blocks_each == 4 ? 2 : blocks_each == 2 ? 1 : 0;
  for (int64_t at = 0; at < n; at += FQ_STEP) {
    vi code[FQ_STEP / FQ_LANES];
    fetch_step(next, measured);
    for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
      const int64_t i = at + v * FQ_LANES, group = (i / FQ_BLOCK) >> shift;
      const vf zero = vf_set(g->zero[group]), q = vf_add(vf_mul(vf_load(x + i), vf_set(g->factor[group])), zero);
      code[v] = vf_nearest(vf_max(vf_min(q, levels), vf_set(0)));
      if (measured)
        vf_store(y + i, vf_mul(vf_sub(vi_convert(code[v]), zero), vf_set(g->scale[group])));
      code[v] = vi_add(code[v], vi_set(-128));
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, code, sizeof parts);
    pack_64(codes + at, parts);
  }
}

void FQ_NAME(hqq_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t codes[FQ_SPAN];
  group_parameters g;
  memset(&g, 0, sizeof g);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, padded = round_up(n, FQ_STEP);
    const float *x = load_span(job, at, n, buffer);
    span_groups(job, x, at, n, &g, result);
    if (job->shrinks)
      move_zeros(job, x, at, n, &g);
    memcpy(job->scales + at / job->unit, g.scale, (size_t)(n / job->unit) * sizeof(float));
    memcpy(job->zeros + at / job->unit, g.zero, (size_t)(n / job->unit) * sizeof(float));
    fetcher next = fetch_after(job, at, n);
    if (job->measure)
      quantize_span(job, &next, x, padded, &g, 1, codes, again);
    else
      quantize_span(job, &next, x, padded, &g, 0, codes, again);
    store_raised(job, job->data + at, codes, n);
    if (job->measure)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}

/* Bytes of two or four codes, or words of ten, from one up to another. The last tenth may be short. */
void FQ_NAME(hqq_fold)(const fq_job *job, int64_t begin, int64_t end) {
  enum { SOME = 1024 };
  const int fold = job->bits == 4 ? 2 : job->bits == 2 ? 4 : 10;
  const int64_t groups = job->n / job->unit, line = (groups + fold - 1) / fold * job->unit;
  for (int64_t at = begin; at < end; at += SOME) {
    const int64_t n = end - at < SOME ? end - at : SOME;
    uint32_t words[SOME], codes[SOME / 4];
    memset(words, 0, sizeof words);
    for (int k = 0; k < fold; k++) {
      const int64_t from = k * line + at, left = job->n - from, some = left < 0 ? 0 : left < n ? left : n;
      const int shift = job->bits * (fold - 1 - k);
      if (job->bits == 3) {
        for (int64_t i = 0; i < some; i++)
          words[i] |= (uint32_t)job->data[from + i] << shift;
      } else { /* four bytes at a time: no code reaches beyond its byte */
        memset(codes, 0, sizeof codes);
        memcpy(codes, job->data + from, (size_t)some);
        for (int i = 0; i < SOME / 4; i++)
          words[i] |= codes[i] << shift;
      }
    }
    const int64_t each = job->bits == 3 ? 4 : 1;
    store_bytes(job->streams, job->packed + at * each, (const uint8_t *)words, n * each);
  }
}
