/* ggml's MXFP4 (flightquant/reference/gguf.py): blocks of 32 weights in a byte for the power of two and 16 of codes. */
#include "families.h"

enum { BLOCK_BYTES = 17 };

/* What code 1 stands for, 2^(e - 128). */
FQ_INLINE float half_power(int e) {
  const int32_t bits = e < 2 ? 0x00200000 << e : (e - 1) << 23;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* floor(log2(amax)) + 125, as a byte. Within 44 steps below a power of two the float32 logarithm is the power's own. */
FQ_INLINE int exponent_of(int32_t bits) {
  float amax;
  memcpy(&amax, &bits, sizeof amax);
  if (bits == 0 || bits >= FQ_INFINITY_BITS)
    return 0;
  int exponent = (bits >> 23) - 127;
  if (exponent == -127 || (bits & 0x7fffff) >= 0x7fffff - 64)
    exponent = (int)floorf((float)log2((double)amax));
  return (exponent + 125) & 255;
}

FQ_INLINE void quantize_blocks(const fq_job *job, int measured, int64_t begin, int64_t end, fq_result *result) {
  static const float bounds[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5, 7, 10};
  static const float values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int32_t high[FQ_BLOCKS];
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, blocks = n / FQ_BLOCK;
    const float *x = load_span(job, at, n, buffer);
    fetcher next = fetch_after(job, at, n);
    for (int64_t b = 0; b < blocks; b += FQ_LANES)
      if (range_units(x + b * FQ_BLOCK, FQ_BLOCK, blocks - b, 1, high + b, high + b) >= FQ_INFINITY_BITS)
        note_bad(x, at, n, result);
    uint8_t *to = job->data + at / FQ_BLOCK * BLOCK_BYTES;
    for (int64_t b = 0; b < blocks; b++, to += BLOCK_BYTES) {
      const int e = exponent_of(high[b]);
      const vf step = vf_set(half_power(e)), one = vf_set(1), none = vf_set(0);
      int8_t codes[FQ_STEP];
      vi code[FQ_STEP / FQ_LANES];
      if (b % 2 == 0)
        fetch_step(&next, measured);
      memset(code, 0, sizeof code);
      for (int v = 0; v < FQ_BLOCK / FQ_LANES; v++) {
        const int64_t i = b * FQ_BLOCK + v * FQ_LANES;
        const vi bits = vf_bits(vf_load(x + i));
        const vf magnitude = vi_float(vi_and(bits, vi_set(INT32_MAX)));
        vf count = none; /* of values passed: on a bound it is the one nearer to 0 */
        for (int k = 0; k < 7; k++)
          count = vf_add(count, vf_where_less(vf_mul(step, vf_set(bounds[k])), magnitude, one, none));
        const vi index = vf_truncate(count), minus = vi_and(vi_shift_28(bits), vi_set(8));
        code[v] = vi_and(vi_or(index, minus), vi_sub(vi_set(0), vf_truncate(vf_where_zero(count, none, one))));
        if (measured)
          vf_store(again + i, vf_mul(vi_lookup_16(code[v], values), step));
      }
      pi parts[FQ_STEP / FQ_PART];
      memcpy(parts, code, sizeof parts);
      pack_64(codes, parts);
      to[0] = (uint8_t)e;
      pack_halves_32(to + 1, codes);
    }
    if (measured)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}

void FQ_NAME(mxfp4_ggml_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  if (job->measure)
    quantize_blocks(job, 1, begin, end, result);
  else
    quantize_blocks(job, 0, begin, end, result);
}
