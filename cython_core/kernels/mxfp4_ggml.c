/* ggml's MXFP4 (flightquant/reference/gguf.py): blocks of 32 weights in a byte for the power of two and 16 of codes. */
#include "families.h"

enum { BLOCK_BYTES = 17 };

/* Values of e2m1 in their order, both zeros with code 0; a weight on a bound belongs to the value nearer to 0. */
static const fq_bounds bounds = {
    {INFINITY, 0, -0x1.c00002p0f, 1.75f, -0x1.c00002p1f, -0x1.800002p-1f, 0.75f, 3.5f, -0x1.400002p2f, -0x1.400002p1f,
     -0x1.400002p0f, -0x1.000002p-2f, 0.25f, 1.25f, 2.5f, 5},
    {0,
     0.25f,
     0.75f,
     1.25f,
     1.75f,
     INFINITY,
     2.5f,
     INFINITY,
     3.5f,
     INFINITY,
     INFINITY,
     5,
     INFINITY,
     INFINITY,
     INFINITY,
     INFINITY,
     INFINITY,
     INFINITY,
     INFINITY,
     INFINITY,
     INFINITY,
     -0x1.400002p2f,
     INFINITY,
     INFINITY,
     -0x1.c00002p1f,
     INFINITY,
     -0x1.400002p1f,
     INFINITY,
     -0x1.c00002p0f,
     -0x1.400002p0f,
     -0x1.800002p-1f,
     -0x1.000002p-2f},
    {7, 8, 9, 10, 11, 12, 12, 13, 13, 14, 14, 14, 15, 15, 15, 15, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6},
    2.2f,
    0x1.8p23f,
    0,
    6};
static const float values[16] = {-6, -4, -3, -2, -1.5f, -1, -0.5f, 0, 0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
static const uint8_t codes_of_places[16] = {15, 14, 13, 12, 11, 10, 9, 0, 0, 1, 2, 3, 4, 5, 6, 7};

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

/* What a block's values are multiplied with, 2^(e - 127), and what its weights are, the inverse. Those near the ends
 * are not of weights that count: the largest e are of magnitudes too small for the least one. */
FQ_INLINE void set_power(int e, float *scale, float *inverse) {
  const int32_t up = e == 0 ? 0x00400000 : (e < 254 ? e : 254) << 23, down = (e < 253 ? 254 - e : 1) << 23;
  memcpy(scale, &up, sizeof up);
  memcpy(inverse, &down, sizeof down);
}

FQ_INLINE void quantize_blocks(const fq_job *job, int measured, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN], scale[FQ_BLOCKS], inverse[FQ_BLOCKS];
  _Alignas(64) int32_t high[FQ_BLOCKS];
  uint8_t apart[FQ_BLOCKS * BLOCK_BYTES];
  memset(scale, 0, sizeof scale); /* an odd last block has a neighbour of zeros */
  memset(inverse, 0, sizeof inverse);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, blocks = n / FQ_BLOCK;
    const float *x = load_span(job, at, n, buffer);
    fetcher next = fetch_after(job, at, n);
    for (int64_t b = 0; b < blocks; b += FQ_LANES)
      if (range_units(x + b * FQ_BLOCK, FQ_BLOCK, blocks - b, 1, high + b, high + b) >= FQ_INFINITY_BITS)
        note_bad(x, at, n, result);
    uint8_t *place = job->data + at / FQ_BLOCK * BLOCK_BYTES, *to = packed_place(job, place, apart);
    for (int64_t b = 0; b < blocks; b++) {
      const int e = exponent_of(high[b]);
      set_power(e, scale + b, inverse + b);
      to[b * BLOCK_BYTES] = (uint8_t)e;
    }
    for (int64_t b = 0; b < blocks; b += 2) {
      int8_t codes[FQ_STEP];
      vi place[FQ_STEP / FQ_LANES];
      fetch_step(&next, measured);
      for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
        const int64_t i = b * FQ_BLOCK + v * FQ_LANES, block = i / FQ_BLOCK;
        place[v] = vf_count_below(vf_mul(vf_load(x + i), vf_set(inverse[block])), &bounds);
        if (measured)
          vf_store(again + i, vf_mul(vi_lookup_16(place[v], values), vf_set(scale[block])));
      }
      pi parts[FQ_STEP / FQ_PART];
      memcpy(parts, place, sizeof parts);
      pack_64(codes, parts);
      lookup_64(codes, codes_of_places);
      pack_halves_32(to + b * BLOCK_BYTES + 1, codes);
      if (b + 1 < blocks)
        pack_halves_32(to + (b + 1) * BLOCK_BYTES + 1, codes + FQ_BLOCK);
    }
    store_packed(job, place, to, blocks * BLOCK_BYTES);
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
