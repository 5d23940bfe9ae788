/* FBGEMM's rows (flightquant/reference/fbgemm.py): codes, then the row's scale and bias, float32 for 8 bits, else
 * float16. */
#include "ends.h"
#include "families.h"

typedef struct {
  float bias, scale, inverse;
  uint8_t tail[8]; /* what is stored */
} row_parameters;

FQ_INLINE float to_half(float value, uint8_t *half) {
  float lanes[FQ_LANES] = {value};
  char halves[FQ_LANES * 2];
  vf_store_f16(halves, vf_load(lanes));
  memcpy(half, halves, 2);
  vf_store(lanes, vf_load_f16(halves));
  return lanes[0];
}

/* Of the row that begins at an index. */
static row_parameters of_row(const fq_job *job, int64_t begin, fq_result *result) {
  fq_result found = {.first_bad = -1};
  FQ_NAME(affine_reduce)(job, begin, begin + job->cols, &found);
  if (result->first_bad < 0)
    result->first_bad = found.first_bad;
  const float least = float_of(ordered(~found.range.low)), most = float_of(ordered(found.range.high));
  const float levels = (float)((1 << job->bits) - 1);
  row_parameters p = {.bias = least};
  if (job->bits == 8) {
    const float span = most - least;
    p.scale = span / levels;
    p.inverse = levels / (span + 1e-8f);
    memcpy(p.tail, &p.scale, sizeof p.scale);
    memcpy(p.tail + sizeof p.scale, &p.bias, sizeof p.bias);
    return p;
  }
  p.bias = to_half(least, p.tail + 2);
  const float span = most - p.bias;
  p.scale = to_half(span == 0 ? 1 : span / levels, p.tail);
  if (p.scale == 0)
    p.scale = to_half(1, p.tail);
  p.inverse = 1.0f / p.scale;
  return p;
}

/* Codes less half their range, and weights again where they are wanted, of n weights of a row; whole steps. */
FQ_INLINE void quantize_row(const fq_job *job, fetcher *next, const float *x, int64_t n, row_parameters p, int measured,
                            int8_t *codes, float *y) {
  const vf levels = vf_set((float)((1 << job->bits) - 1)), none = vf_set(0);
  const vf scale = vf_set(p.scale), bias = vf_set(p.bias), inverse = vf_set(p.inverse);
  const vi half = vi_set(-(1 << (job->bits - 1)));
  for (int64_t at = 0; at < n; at += FQ_STEP) {
    vi code[FQ_STEP / FQ_LANES];
    fetch_step(next, measured);
    for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
      const int64_t i = at + v * FQ_LANES;
      vf q = vf_mul(vf_sub(vf_load(x + i), bias), inverse);
      q = vf_where_less(none, q, q, none); /* of 0 times infinity too */
      code[v] = vf_nearest(vf_where_less(q, levels, q, levels));
      if (measured)
        vf_store(y + i, vf_add(vf_mul(vi_convert(code[v]), scale), bias));
      code[v] = vi_add(code[v], half);
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, code, sizeof parts);
    pack_64(codes + at, parts);
  }
}

void FQ_NAME(fbgemm_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN + FQ_STEP], again[FQ_SPAN + FQ_STEP];
  _Alignas(64) int8_t codes[FQ_SPAN + FQ_STEP];
  row_parameters p = {.bias = 0};
  int64_t known = -1;
  const int64_t used = job->cols * job->bits / 8;
  memset(buffer, 0, sizeof buffer);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at;
    const float *x = load_span(job, at, n, buffer);
    if (x != buffer && job->cols % FQ_STEP) { /* a row's last step reaches beyond it */
      memcpy(buffer, x, (size_t)n * sizeof(float));
      x = buffer;
    }
    fetcher next = fetch_after(job, at, n);
    for (int64_t i = 0; i < n;) {
      const int64_t row = (at + i) / job->cols, col = (at + i) % job->cols;
      const int64_t rest = job->cols - col < n - i ? job->cols - col : n - i;
      if (row != known)
        p = of_row(job, row * job->cols, result);
      known = row;
      if (job->measure)
        quantize_row(job, &next, x + i, round_up(rest, FQ_STEP), p, 1, codes, again + i);
      else
        quantize_row(job, &next, x + i, round_up(rest, FQ_STEP), p, 0, codes, again + i);
      if (job->bits == 8)
        store_raised(job, job->data + row * job->row_bytes + col, codes, rest);
      else
        FQ_NAME(pack_codes)(job, at + i, rest, codes);
      if (col + rest == job->cols)
        memcpy(job->data + row * job->row_bytes + used, p.tail, (size_t)(job->row_bytes - used));
      i += rest;
    }
    if (job->measure) {
      for (int64_t i = n; i < round_up(n, FQ_LANES); i++)
        again[i] = 0;
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    }
    at = stop;
  }
}
