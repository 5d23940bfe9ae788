/* ggml's IQ4_NL (flightquant/reference/kquants.py): blocks of 32 weights, a float16 scale and codes of 16 values. */
#include "search.h"

/* Each bound is the float32 right below the middle of two values, which itself belongs to the upper one. */
static const float values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const fq_bounds bounds = {
    {INFINITY, -0x1.200002p+2f, -0x1.c80002p+5f, 0x1.6bfffep+5f, -0x1.760002p+6f, -0x1.c80002p+4f, 0x1.2ffffep+4f,
     0x1.3bfffep+6f, -0x1.ce0002p+6f, -0x1.280002p+6f, -0x1.500002p+5f, -0x1.000002p+4f, 0x1.bffffep+2f, 0x1.f7fffep+4f,
     0x1.e7fffep+5f, 0x1.93fffep+6f},
    {INFINITY,        0x1.bffffep+2f, 0x1.2ffffep+4f,  INFINITY,       0x1.f7fffep+4f,  INFINITY, 0x1.6bfffep+5f,
     INFINITY,        0x1.e7fffep+5f, INFINITY,        0x1.3bfffep+6f, INFINITY,        INFINITY, 0x1.93fffep+6f,
     INFINITY,        INFINITY,       INFINITY,        INFINITY,       -0x1.ce0002p+6f, INFINITY, -0x1.760002p+6f,
     INFINITY,        INFINITY,       -0x1.280002p+6f, INFINITY,       -0x1.c80002p+5f, INFINITY, -0x1.500002p+5f,
     -0x1.c80002p+4f, INFINITY,       -0x1.000002p+4f, -0x1.200002p+2f},
    {8, 8, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 14, 15, 15, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 6, 7},
    1,
    0x1.8p26f,
    0,
    120}; /* cells of 8 */

enum { BLOCK_BYTES = 18 };

FQ_INLINE void sums_of(const fq_rows *r, vf inverse, vf *qx, vf *q2) {
  *qx = *q2 = vf_set(0);
  for (int i = 0; i < FQ_BLOCK; i++) {
    const vf x = vf_load(r->x[i]);
    const vf value = vi_lookup_16(vf_count_below(vf_mul(inverse, x), &bounds), values);
    const vf wq = vf_mul(vf_load(r->w[i]), value);
    *qx = vf_add(*qx, vf_mul(wq, x));
    *q2 = vf_add(*q2, vf_mul(wq, value));
  }
}

/* The scales of 16 blocks. */
FQ_INLINE vf search_blocks(const fq_rows *r) {
  const vf zero = vf_set(0);
  vf some, qx, q2;
  const vf extreme = extreme_of(r, FQ_BLOCK, 1, &some);
  sums_of(r, vf_div(vf_set(1), vf_div(negated(extreme), vf_set(values[0]))), &qx, &q2);
  vf scale = vf_where_less(zero, q2, vf_div(qx, q2), zero), best = vf_mul(scale, qx);
  for (int i = -7; i <= 7; i++) {
    sums_of(r, vf_div(vf_set((float)i + values[0]), extreme), &qx, &q2);
    const vf found = vf_div(qx, q2), least = vf_mul(best, q2);
    const vf gain = vf_where_less(zero, q2, vf_mul(qx, qx), vf_set(-INFINITY));
    scale = vf_where_less(least, gain, found, scale);
    best = vf_where_less(least, gain, vf_mul(found, qx), best);
  }
  return vf_where_zero(some, zero, scale);
}

/* What an error counts: the importance times sqrt(twice the block's mean square + x^2), or x^2. */
FQ_INLINE void weigh_blocks(const fq_job *job, fq_rows *r, int64_t at, int64_t blocks) {
  vf mean = vf_set(0);
  for (int i = 0; i < FQ_BLOCK; i++) {
    const vf x = vf_load(r->x[i]), square = vf_mul(x, x);
    mean = vf_add(mean, square);
    vf_store(r->w[i], square);
  }
  if (!job->importance)
    return;
  mean = vf_mul(mean, vf_set(2.0f / FQ_BLOCK));
  for (int64_t k = 0; k < FQ_LANES; k++) {
    const float *from = job->importance + (k < blocks ? (at + k * FQ_BLOCK) % job->cols : 0);
    for (int i = 0; i < FQ_BLOCK; i++)
      memcpy(&r->code[i][k], from + i, sizeof(float));
  }
  for (int i = 0; i < FQ_BLOCK; i++)
    vf_store(r->w[i], vf_mul(vf_load(r->code[i]), vf_sqrt(vf_add(mean, vf_load(r->w[i])))));
}

typedef struct {
  _Alignas(64) float scale[FQ_BLOCKS], inverse[FQ_BLOCKS];
  _Alignas(64) char half[FQ_BLOCKS * 2];
} span_scales;

FQ_INLINE void search_span(const fq_job *job, const float *x, int64_t at, int64_t blocks, span_scales *s) {
  for (int64_t b = 0; b < blocks; b += FQ_LANES) {
    fq_rows r;
    const int64_t rows = blocks - b < FQ_LANES ? blocks - b : FQ_LANES;
    take_rows(&r, x + b * FQ_BLOCK, rows, FQ_BLOCK);
    weigh_blocks(job, &r, at + b * FQ_BLOCK, rows);
    const vf scale = search_blocks(&r), zero = vf_set(0);
    vf_store(s->inverse + b, vf_where_zero(scale, zero, vf_div(vf_set(1), scale)));
    /* A NaN, of sums that overflowed, is stored with its sign bit set, as x86 makes it. */
    const vf not_below = vf_where_less(scale, vf_set(INFINITY), zero, vf_set(1));
    const vf not_above = vf_where_less(vf_set(-INFINITY), scale, zero, vf_set(1));
    const vf stored = vf_where_zero(vf_mul(not_below, not_above), scale, vi_float(vi_set((int32_t)0xffc00000)));
    vf_store_f16(s->half + b * 2, stored);
    vf_store(s->scale + b, vf_load_f16(s->half + b * 2));
  }
}

void FQ_NAME(iq4_nl_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t codes[FQ_SPAN];
  span_scales s;
  const int measured = job->measure;
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, blocks = n / FQ_BLOCK;
    const float *x = load_span(job, at, n, buffer);
    fetcher next = fetch_after(job, at, n);
    pi high, low;
    range_lanes(x, n, 1, &high, &low);
    if (pi_highest(high) >= FQ_INFINITY_BITS)
      note_bad(x, at, n, result);
    memset(&s, 0, sizeof s);
    search_span(job, x, at, blocks, &s);
    for (int64_t i = 0; i < round_up(n, FQ_STEP); i += FQ_STEP) {
      vi code[FQ_STEP / FQ_LANES];
      fetch_step(&next, measured);
      for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
        const int64_t j = i + v * FQ_LANES, b = j / FQ_BLOCK;
        const vf scaled = vf_mul(vf_load(x + j), vf_set(s.inverse[b])), zero = vf_set(0);
        /* What is no number belongs to the last value: an inverse that overflowed, times 0. */
        const vf settled = vf_where_less(scaled, zero, scaled, vf_where_less(scaled, vf_set(200), scaled, vf_set(200)));
        code[v] = vf_count_below(settled, &bounds);
        if (measured)
          vf_store(again + j, vf_mul(vi_lookup_16(code[v], values), vf_set(s.scale[b])));
      }
      pi parts[FQ_STEP / FQ_PART];
      memcpy(parts, code, sizeof parts);
      pack_64(codes + i, parts);
    }
    uint8_t *to = job->data + at / FQ_BLOCK * BLOCK_BYTES;
    for (int64_t b = 0; b < blocks; b++, to += BLOCK_BYTES) {
      memcpy(to, s.half + b * 2, 2);
      pack_halves_32(to + 2, codes + b * FQ_BLOCK);
    }
    if (measured)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}
