/* The codes of ONNX Runtime's MatMulNBits (flightquant/reference/onnx.py): groups of 16 to 256 weights with a scale,
 * which is negative where the extreme is, and a zero point or none. */
#include "families.h"

enum { GROUPS = FQ_SPAN / FQ_LANES };

typedef struct {
  _Alignas(64) int32_t high[GROUPS], low[GROUPS];
  _Alignas(64) float scale[GROUPS], inverse[GROUPS], stored[GROUPS], zero[GROUPS];
} group_parameters;

FQ_INLINE float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* From both ends of 16 groups, drawn to 0: scales, their inverses, zero points. */
FQ_INLINE void make_parameters(const fq_job *job, const float *x, int64_t groups, group_parameters *g, int64_t at) {
  const float levels = (float)((1 << job->bits) - 1), middle = (float)(1 << (job->bits - 1));
  for (int64_t i = at; i < at + FQ_LANES && i < groups; i++) {
    const float above = float_of(g->high[i]), below = float_of(g->low[i]);
    if (!job->symmetric) {
      g->scale[i] = (above + below) / levels;
      g->zero[i] = 0;
      if (g->scale[i] != 0) {
        const float zero = below / g->scale[i];
        g->zero[i] = truncf((zero < levels ? zero : levels) + 0x1.fffffep-2f);
      }
      continue;
    }
    float extreme = above > below ? above : -below;
    if (g->high[i] == 0 && g->low[i] == 0)
      memcpy(&extreme, x + i * job->group, sizeof extreme); /* a zero keeps its sign */
    g->scale[i] = extreme / -middle;
    g->zero[i] = middle;
  }
  const vf stored = round_to(vf_load(g->scale + at), job->scale_dtype);
  vf_store(g->stored + at, stored);
  const vf scale = job->arithmetic == FQ_F16 ? stored : vf_load(g->scale + at);
  vf_store(g->inverse + at, vf_where_zero(scale, vf_set(0), vf_div(vf_set(1), scale)));
}

/* Parameters of the groups of a span. */
FQ_INLINE void span_groups(const fq_job *job, const float *x, int64_t begin, int64_t n, group_parameters *g,
                           fq_result *result) {
  const int64_t groups = n / job->group, first = begin / job->group;
  for (int64_t i = 0; i < groups; i += FQ_LANES) {
    const float *from = x + i * job->group;
    if (range_units(from, job->group, groups - i, 0, g->high + i, g->low + i) >= FQ_INFINITY_BITS)
      note_bad(x, begin, n, result);
    make_parameters(job, x, groups, g, i);
  }
  memcpy(job->scales + first, g->stored, (size_t)groups * sizeof(float));
  for (int64_t i = 0; job->zeros && i < groups; i++)
    job->zeros[first + i] = g->zero[i] - (float)(1 << (job->bits - 1));
}

/* Codes less half their range, and weights again where they are wanted, of n weights (a multiple of 64). */
FQ_INLINE void quantize_span(const fq_job *job, fetcher *next, const float *x, int64_t n, const group_parameters *g,
                             int measured, int8_t *codes, float *y) {
  const vf levels = vf_set((float)((1 << job->bits) - 1)), none = vf_set(0);
  const vi half = vi_set(-(1 << (job->bits - 1)));
  int shift = 0;
  while (FQ_LANES << shift < job->group)
    shift++;
  for (int64_t at = 0; at < n; at += FQ_STEP) {
    vi code[FQ_STEP / FQ_LANES];
    fetch_step(next, measured);
    for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
      const int64_t i = at + v * FQ_LANES, group = (i / FQ_LANES) >> shift;
      const vf zero = vf_set(g->zero[group]);
      vf q = vf_add(vf_mul(vf_load(x + i), vf_set(g->inverse[group])), zero);
      q = vf_where_less(none, q, q, none); /* of 0 times infinity too */
      q = vf_where_less(q, levels, q, levels);
      code[v] = vf_truncate(vf_add(q, vf_set(0x1.fffffep-2f))); /* half away from zero */
      if (measured)
        vf_store(y + i, vf_mul(vf_sub(vi_convert(code[v]), zero), vf_set(g->stored[group])));
      code[v] = vi_add(code[v], half);
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, code, sizeof parts);
    pack_64(codes + at, parts);
  }
}

void FQ_NAME(onnx_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t codes[FQ_SPAN + 8];
  group_parameters g;
  memset(&g, 0, sizeof g);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, padded = round_up(n, FQ_STEP);
    const float *x = load_span(job, at, n, buffer);
    fetcher next = fetch_after(job, at, n);
    span_groups(job, x, at, n, &g, result);
    if (job->measure)
      quantize_span(job, &next, x, padded, &g, 1, codes, again);
    else
      quantize_span(job, &next, x, padded, &g, 0, codes, again);
    if (job->bits == 8)
      store_raised(job, job->data + at, codes, n);
    else
      FQ_NAME(pack_codes)(job, at, n, codes);
    if (job->measure)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}

/* The zero points of some rows; a row's last byte is filled up with middles. */
void FQ_NAME(onnx_points)(const fq_job *job, int64_t row, int64_t end) {
  const int64_t groups = job->cols / job->group, each = 8 / job->bits, line = (groups + each - 1) / each;
  const int32_t middle = 1 << (job->bits - 1);
  for (; row < end; row++) {
    for (int64_t byte = 0; byte < line; byte++) {
      int32_t packed = 0;
      for (int64_t k = 0; k < each; k++) {
        const int64_t group = byte * each + k;
        const int32_t point = group < groups ? (int32_t)job->zeros[row * groups + group] + middle : middle;
        packed |= point << (k * job->bits);
      }
      job->packed[row * line + byte] = (uint8_t)packed;
    }
  }
}
