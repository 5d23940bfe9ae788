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

/* The value of largest magnitude of a block whose range is known, the first where two signs tie: zeros too, as in gguf
 * (ggml's C takes them for +0). */
FQ_INLINE float extreme(const float *x, int32_t high, int32_t low) {
  float value;
  const int32_t bits = high > low ? high : low;
  memcpy(&value, &bits, sizeof value);
  if (high > low)
    return value;
  for (int i = 0; i < FQ_BLOCK && high == low; i++) {
    float v;
    memcpy(&v, x + i, sizeof v);
    if (v == value || v == -value)
      return v;
  }
  return -value;
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
      range_units(x + b * FQ_BLOCK, FQ_BLOCK, blocks - b, q8, s.high + b, s.low + b);
      for (int k = 0; k < FQ_LANES; k++) {
        const int32_t high = s.high[b + k], low = s.low[b + k], bits = high > low ? high : low;
        highest = bits > highest ? bits : highest;
        if (q8)
          memcpy(s.scale + b + k, &high, sizeof high);
        else if (b + k < blocks)
          s.scale[b + k] = extreme(x + (b + k) * FQ_BLOCK, high, low);
      }
    }
    if (highest >= FQ_INFINITY_BITS)
      note_bad(x, at, n, result);
    block_scales(&s, blocks, q8 ? 127.0f : -8.0f, q8 ? 0 : 8.5f);
    for (int64_t i = 0; i < round_up(n, FQ_STEP); i += FQ_STEP) {
      vi code[FQ_STEP / FQ_LANES];
      fetch_ahead(job, at + i, n, n);
      for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
        const int64_t j = i + v * FQ_LANES, b = j / FQ_BLOCK;
        const vf scaled = vf_mul(vf_load(x + j), vf_set(s.inverse[b]));
        if (q8)
          code[v] = round_away(scaled);
        else
          code[v] = vf_truncate(vf_min(vf_add(scaled, vf_set(s.bias[b])), vf_set(15)));
        if (measured)
          vf_store(again + j, vf_mul(vf_add(vi_convert(code[v]), vf_set(q8 ? 0.0f : -8.0f)), vf_set(s.scale[b])));
      }
      pi parts[FQ_STEP / FQ_PART];
      memcpy(parts, code, sizeof parts);
      pack_64(codes + i, parts);
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
      measure(x, again, round_up(n, FQ_LANES), result);
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
