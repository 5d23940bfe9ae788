/* bitsandbytes' nf4 and fp4 (flightquant/reference/nf4.py): blocks of the flat tensor, the last one maybe short. */
#include "families.h"

/* Values and codes stand in the order of the values. */
typedef struct {
  fq_bounds bounds;
  _Alignas(64) float values[16];
  _Alignas(16) uint8_t codes[16];
} codebook;

static const codebook nf4 = {
    {{INFINITY, 0x1.45f5fep-5f, -0x1.5bd4ecp-2f, 0x1.8ea7f2p-2f, -0x1.38a4e0p-1f, -0x1.1a7178p-3f, 0x1.a0cfc0p-3f,
      0x1.491b5ep-1f, -0x1.b239b0p-1f, -0x1.d70900p-2f, -0x1.e079d8p-3f, -0x1.74f0e2p-5f, 0x1.ec90c4p-4f,
      0x1.2b05a8p-2f, 0x1.00da08p-1f, 0x1.b913b4p-1f},
     {INFINITY,        0x1.45f5fep-5f,  0x1.ec90c4p-4f, 0x1.a0cfc0p-3f,  0x1.2b05a8p-2f,  INFINITY,
      0x1.8ea7f2p-2f,  INFINITY,        0x1.00da08p-1f, INFINITY,        0x1.491b5ep-1f,  INFINITY,
      INFINITY,        0x1.b913b4p-1f,  INFINITY,       INFINITY,        INFINITY,        INFINITY,
      INFINITY,        -0x1.b239b0p-1f, INFINITY,       INFINITY,        INFINITY,        -0x1.38a4e0p-1f,
      INFINITY,        -0x1.d70900p-2f, INFINITY,       -0x1.5bd4ecp-2f, -0x1.e079d8p-3f, INFINITY,
      -0x1.1a7178p-3f, -0x1.74f0e2p-5f},
     {7, 7, 8, 9, 10, 11, 11, 12, 12, 13, 13, 14, 14, 14, 15, 15, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6},
     15,
     0x1.8p23f,
     0,
     0},
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
};
static const codebook fp4 = {
    {{INFINITY, 0, -0x1.2aaaacp-2f, 0x1.2aaaacp-2f, -0x1.2aaaacp-1f, -0x1.6p-4f, 0x1.6p-4f, 0x1.2aaaacp-1f,
      -0x1.aaaaacp-1f, -0x1.aaaaacp-2f, -0x1.aaaaacp-3f, -0x1.555556p-9f, 0x1.555556p-9f, 0x1.aaaaacp-3f,
      0x1.aaaaacp-2f, 0x1.aaaaacp-1f},
     {0,        0x1.6p-4f,       INFINITY, 0x1.aaaaacp-3f,  0x1.2aaaacp-2f,
      INFINITY, 0x1.aaaaacp-2f,  INFINITY, INFINITY,        0x1.2aaaacp-1f,
      INFINITY, INFINITY,        INFINITY, 0x1.aaaaacp-1f,  INFINITY,
      INFINITY, INFINITY,        INFINITY, INFINITY,        -0x1.aaaaacp-1f,
      INFINITY, INFINITY,        INFINITY, -0x1.2aaaacp-1f, INFINITY,
      INFINITY, -0x1.aaaaacp-2f, INFINITY, -0x1.2aaaacp-2f, -0x1.aaaaacp-3f,
      INFINITY, -0x1.6p-4f},
     {6, 7, 8, 8, 9, 10, 10, 11, 11, 11, 12, 12, 12, 12, 13, 13, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5},
     15,
     0x1.8p23f,
     0x1.555556p-9f,
     0},
    {-1.0f, -0x1.555556p-1f, -0.5f, -0x1.555556p-2f, -0.25f, -0x1.555556p-3f, -0x1.555556p-8f, 0, 0, 0x1.555556p-8f,
     0x1.555556p-3f, 0.25f, 0x1.555556p-2f, 0.5f, 0x1.555556p-1f, 1.0f},
    {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3},
};

static const float smallest = 1e-38f; /* what a block is divided by, at least */

typedef struct {
  _Alignas(64) int32_t high[FQ_BLOCKS]; /* of the units of one span, as their scales */
  _Alignas(64) float scale[FQ_BLOCKS], inverse[FQ_BLOCKS];
  float block_scale[FQ_BLOCKS], block_inverse[FQ_BLOCKS]; /* the same, spread over the span's blocks of 32 weights */
  int64_t short_from; /* where a short unit begins, which is divided by its magnitude; else past the span's end */
} span_scales;

FQ_INLINE void spread(span_scales *s, int64_t units, int64_t blocks_each) {
  for (int64_t i = 0, block = 0; i < units; i++) {
    for (int64_t k = 0; k < blocks_each && block < FQ_BLOCKS; k++, block++) {
      s->block_scale[block] = s->scale[i];
      s->block_inverse[block] = s->inverse[i];
    }
  }
}

/* The scales of the units in high[], of which the one at short_unit is short. */
FQ_INLINE void unit_scales(span_scales *s, int64_t units, int64_t short_unit) {
  for (int64_t i = 0; i < units; i += FQ_LANES) {
    const vf amax = vf_load((const float *)(const void *)(s->high + i));
    vf_store(s->scale + i, amax);
    vf_store(s->inverse + i, vf_div(vf_set(1), vf_max(amax, vf_set(smallest))));
  }
  if (short_unit < units && s->scale[short_unit] < smallest)
    s->scale[short_unit] = smallest;
}

/* The scales of the units that a span joins. */
FQ_INLINE void joined_scales(const fq_job *job, const float *x, int64_t begin, int64_t n, span_scales *s,
                             fq_result *result) {
  const int64_t unit = job->unit, whole = n / unit, rest = n % unit, units = whole + (rest > 0);
  for (int64_t i = 0; i < whole; i += FQ_LANES)
    range_units(x + i * unit, unit, whole - i, 1, s->high + i, s->high + i); /* of magnitudes there is no low */
  if (rest) {
    pi highs, lows;
    range_lanes(x + whole * unit, round_up(rest, FQ_LANES), 1, &highs, &lows);
    s->high[whole] = pi_highest(highs);
  }
  int32_t highest = 0;
  for (int64_t i = 0; i < units; i++)
    highest = s->high[i] > highest ? s->high[i] : highest;
  if (highest >= FQ_INFINITY_BITS)
    note_bad(x, begin, n, result);
  unit_scales(s, units, whole);
  memcpy(job->scales + begin / unit, s->scale, (size_t)units * sizeof(float));
  spread(s, units, unit / FQ_BLOCK);
  s->short_from = whole * unit;
}

/* The scale of one unit longer than a span. */
FQ_INLINE void long_scale(const fq_job *job, int64_t begin, span_scales *s, fq_result *result) {
  const int is_short = job->n - begin < job->unit;
  fq_result found = {.first_bad = -1};
  FQ_NAME(integer_reduce)(job, begin, is_short ? job->n : begin + job->unit, &found);
  if (result->first_bad < 0)
    result->first_bad = found.first_bad;
  s->high[0] = found.range.high;
  unit_scales(s, 1, !is_short);
  job->scales[begin / job->unit] = s->scale[0];
  spread(s, 1, FQ_BLOCKS);
  s->short_from = is_short ? 0 : FQ_SPAN;
}

/* Which of the 16 values, and weights again where they are wanted, of n weights (a multiple of 64). */
FQ_INLINE void quantize_span(fetcher *next, const float *x, int64_t n, const span_scales *s, const codebook *book,
                             int divides, int measured, int8_t *nearest, float *y) {
  for (int64_t at = 0; at < n; at += FQ_STEP) {
    vi found[FQ_STEP / FQ_LANES];
    fetch_step(next, measured);
    for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
      const int64_t i = at + v * FQ_LANES, block = i / FQ_BLOCK;
      /* No clip to -1 and 1: what lies beyond has the same value there. */
      vf scaled = vf_mul(vf_load(x + i), vf_set(s->block_inverse[block]));
      if (divides && i >= s->short_from)
        scaled = vf_div(vf_load(x + i), vf_set(s->block_scale[block]));
      found[v] = vf_count_below(scaled, &book->bounds);
      if (measured)
        vf_store(y + i, vf_mul(vi_lookup_16(found[v], book->values), vf_set(s->block_scale[block])));
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, found, sizeof parts);
    pack_64(nearest + at, parts);
  }
}

static __attribute__((noinline)) void quantize_short(fetcher *next, const float *x, int64_t n, const span_scales *s,
                                                     const codebook *book, int8_t *nearest, float *y) {
  quantize_span(next, x, n, s, book, 1, 1, nearest, y);
}

/* Write the codes of n weights from an index on. */
FQ_INLINE void pack_span(const fq_job *job, int64_t begin, int64_t n, const codebook *book, const int8_t *nearest) {
  uint8_t apart[FQ_SPAN / 2], *place = job->data + begin / 2, *to = packed_place(job, place, apart);
  int64_t i = 0;
  for (; i + FQ_STEP <= n; i += FQ_STEP)
    pack_high_first_64(to + i / 2, nearest + i, book->codes);
  if (i < n) {
    uint8_t bytes[FQ_STEP / 2];
    pack_high_first_64(bytes, nearest + i, book->codes);
    memcpy(to + i / 2, bytes, (size_t)((n - i + 1) / 2));
  }
  store_packed(job, place, to, (n + 1) / 2);
}

FQ_INLINE void quantize_blocks(const fq_job *job, const codebook *book, int measured, int64_t begin, int64_t end,
                               fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t nearest[FQ_SPAN];
  span_scales s;
  memset(&s, 0, sizeof s);
  const int joined = joins_units(job->unit);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, padded = round_up(n, FQ_STEP);
    const float *x = load_span(job, at, n, buffer);
    if (joined)
      joined_scales(job, x, at, n, &s, result);
    else if (at % job->unit == 0)
      long_scale(job, at, &s, result);
    fetcher next = fetch_after(job, at, n);
    if (s.short_from < n)
      quantize_short(&next, x, padded, &s, book, nearest, again);
    else
      quantize_span(&next, x, padded, &s, book, 0, measured, nearest, again);
    pack_span(job, at, n, book, nearest);
    if (measured)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}

void FQ_NAME(codebook_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  if (job->family == FQ_NF4 && job->measure)
    quantize_blocks(job, &nf4, 1, begin, end, result);
  else if (job->family == FQ_NF4)
    quantize_blocks(job, &nf4, 0, begin, end, result);
  else if (job->measure)
    quantize_blocks(job, &fp4, 1, begin, end, result);
  else
    quantize_blocks(job, &fp4, 0, begin, end, result);
}
