/* ggml's Q8_0 and Q4_0 (flightquant/reference/gguf.py): blocks of 32 weights with a float16 scale inside. */
#include "families.h"

typedef struct {
  _Alignas(64) int32_t high[FQ_BLOCKS], low[FQ_BLOCKS];
  _Alignas(64) float scale[FQ_BLOCKS], inverse[FQ_BLOCKS], bias[FQ_BLOCKS];
  _Alignas(64) char half[FQ_BLOCKS * 2]; /* scale as float16 */
} span_scales;

/* From the extremes in scale[]: the scale that is stored, the inverse and bias that make the codes. */
FQ_INLINE void block_scales(span_scales *s, int64_t blocks, float divisor, float bias) {
  for (int64_t i = 0; i < blocks; i += FQ_LANES) {
    const vf scale = vf_div(vf_load(s->scale + i), vf_set(divisor));
    const vf inverse = vf_where_zero(scale, vf_set(0), vf_div(vf_set(1), scale));
    /* An inverse that overflows makes ggml cast infinities and NaN to int8: code 0. */
    const vf finite = vf_mul(inverse, vf_set(0));
    vf_store(s->inverse + i, vf_where_zero(finite, inverse, vf_set(0)));
    vf_store(s->bias + i, vf_where_zero(finite, vf_set(bias), vf_set(0)));
    vf_store_f16(s->half + i * 2, scale);
    vf_store(s->scale + i, vf_load_f16(s->half + i * 2));
  }
}

/* The first weight of a block that has this magnitude. */
static __attribute__((noinline)) float first_extreme(const float *x, int32_t bits) {
  for (int i = 0; i < FQ_BLOCK; i++) {
    int32_t found;
    memcpy(&found, x + i, sizeof found);
    if ((found & INT32_MAX) == bits) {
      float value;
      memcpy(&value, &found, sizeof value);
      return value;
    }
  }
  return 0; /* NaN: the span is refused */
}

/* Of 16 blocks whose ranges are known, the value of largest magnitude of each, the first where two signs tie: zeros
 * too, as in gguf (ggml's C takes them for +0). */
FQ_INLINE void extremes_16(const float *x, int64_t blocks, span_scales *s, int64_t at) {
  vi high, low;
  memcpy(&high, s->high + at, sizeof high);
  memcpy(&low, s->low + at, sizeof low);
  const vi difference = vi_sub(high, low), opposite = vi_sub(low, high);
  vf_store(s->scale + at, vi_float(vi_or(vi_max(high, low), vi_and(difference, vi_set(INT32_MIN)))));
  if (vi_highest(vi_sub(vi_set(0), vi_max(difference, opposite))) < 0)
    return;
  for (int64_t k = at; k < at + FQ_LANES && k < blocks; k++)
    if (s->high[k] == s->low[k])
      s->scale[k] = first_extreme(x + k * FQ_BLOCK, s->high[k]);
}

/* Half away from zero, as roundf: the largest float32 below a half, with the sign of a, then cut. */
FQ_INLINE vi round_away(vf a) {
  const vi sign = vi_and(vf_bits(a), vi_set(INT32_MIN));
  return vf_truncate(vf_add(a, vi_float(vi_or(sign, vf_bits(vf_set(0x1.fffffep-2f))))));
}

FQ_INLINE void quantize_blocks(const fq_job *job, int q8, int measured, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t codes[FQ_SPAN];
  span_scales s;
  memset(&s, 0, sizeof s);
  const int block_bytes = q8 ? 34 : 18;
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, blocks = n / FQ_BLOCK;
    const float *x = load_span(job, at, n, buffer);
    int32_t highest = 0;
    for (int64_t b = 0; b < blocks; b += FQ_LANES) {
      int32_t top;
      if (q8)
        top = range_units(x + b * FQ_BLOCK, FQ_BLOCK, blocks - b, 1, s.high + b, s.low + b);
      else
        top = range_units(x + b * FQ_BLOCK, FQ_BLOCK, blocks - b, 0, s.high + b, s.low + b);
      highest = top > highest ? top : highest;
      if (q8)
        memcpy(s.scale + b, s.high + b, FQ_LANES * sizeof(float));
      else
        extremes_16(x, blocks, &s, b);
    }
    if (highest >= FQ_INFINITY_BITS)
      note_bad(x, at, n, result);
    block_scales(&s, blocks, q8 ? 127.0f : -8.0f, q8 ? 0 : 8.5f);
    const float *from = x, *inverse = s.inverse, *bias = s.bias, *scale = s.scale;
    float *y = again;
    int8_t *code = codes;
    fetcher next = fetch_from(job, stop);
    for (; from < x + n; from += FQ_STEP, y += FQ_STEP, code += FQ_STEP) {
      vi step[FQ_STEP / FQ_LANES];
      fetch_vectors(&next, measured ? 2 : 4);
      for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
        const int half = v * FQ_LANES / FQ_BLOCK;
        const vf scaled = vf_mul(vf_load(from + v * FQ_LANES), vf_set(inverse[half]));
        if (q8)
          step[v] = round_away(scaled);
        else
          step[v] = vf_truncate(vf_min(vf_add(scaled, vf_set(bias[half])), vf_set(15)));
        if (measured) {
          const vf level = vi_convert(step[v]);
          vf_store(y + v * FQ_LANES, vf_mul(q8 ? level : vf_sub(level, vf_set(8)), vf_set(scale[half])));
        }
      }
      pi parts[FQ_STEP / FQ_PART];
      memcpy(parts, step, sizeof parts);
      pack_64(code, parts);
      inverse += 2, bias += 2, scale += 2;
    }
    uint8_t *to = job->data + at / FQ_BLOCK * block_bytes;
    for (int64_t b = 0; b < blocks; b++, to += block_bytes) {
      memcpy(to, s.half + b * 2, 2);
      if (q8)
        memcpy(to + 2, codes + b * FQ_BLOCK, FQ_BLOCK);
      else
        pack_halves_32(to + 2, codes + b * FQ_BLOCK);
    }
    if (measured)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}

void FQ_NAME(gguf_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  const int q8 = job->family == FQ_Q8_0;
  if (q8 && job->measure)
    quantize_blocks(job, 1, 1, begin, end, result);
  else if (q8)
    quantize_blocks(job, 1, 0, begin, end, result);
  else if (job->measure)
    quantize_blocks(job, 0, 1, begin, end, result);
  else
    quantize_blocks(job, 0, 0, begin, end, result);
}
