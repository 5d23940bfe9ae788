/* Integers of 2 to 8 bits, symmetric and asymmetric: the rule of compressed-tensors
 * (flightquant/reference/integer.py). */
#include "scaled.h"

void FQ_NAME(integer_parameters)(const fq_job *job, const fq_range *ranges, int64_t count, float *scales,
                                 float *zeros) {
  span_units u;
  for (int64_t at = 0; at < count; at += FQ_LANES) {
    memset(&u, 0, sizeof u);
    const int64_t n = count - at < FQ_LANES ? count - at : FQ_LANES;
    for (int64_t i = 0; i < n; i++) {
      u.high[i] = ranges[at + i].high;
      u.low[i] = ranges[at + i].low;
    }
    parameters_16(job, &u, 0);
    memcpy(scales + at, u.scale, (size_t)n * sizeof(float));
    if (zeros)
      memcpy(zeros + at, u.zero, (size_t)n * sizeof(float));
  }
}

FQ_INLINE void quantize_span(fetcher *next, const char *x, int64_t n, const span_units *u, int bits, int arithmetic,
                             int symmetric, int careful, int measured, int8_t *codes, float *wide, float *y) {
  enum { VECTORS = FQ_STEP / FQ_LANES, EACH = FQ_BLOCK / FQ_LANES };
  const int32_t half_range = 1 << (bits - 1);
  const vi low = vi_set(-half_range), high = vi_set(half_range - 1);
  const int64_t width = fq_dtype_bytes[arithmetic];
  const char *end = x + n * width;
  for (uint32_t block = 0; x < end; x += FQ_STEP * width, wide += FQ_STEP, y += FQ_STEP, codes += FQ_STEP) {
    vi code[VECTORS];
    fetch_step(next, measured);
    for (int half = 0; half < 2; half++, block++) {
      const uint32_t unit = block >> u->shift;
      const vf scale = vf_set(u->scale[unit]), inverse = vf_set(u->inverse[unit]), zero = vf_set(u->zero[unit]);
      for (int v = half * EACH; v < (half + 1) * EACH; v++) {
        const vf weight = load_one(x + v * FQ_LANES * width, arithmetic);
        if (measured && arithmetic != FQ_F32)
          vf_store(wide + v * FQ_LANES, weight);
        vf q;
        if (careful)
          q = vf_div(weight, scale);
        else if (arithmetic != FQ_F32)
          q = vf_mul(weight, inverse);
        else
          q = vf_quotient(weight, scale, inverse, !symmetric);
        if (arithmetic != FQ_F32)
          q = round_quotient(q, arithmetic);
        if (!symmetric)
          q = round_to(vf_add(q, zero), arithmetic);
        if (careful) /* what no int32 holds too */
          q = vf_min(vf_max(q, vi_convert(low)), vi_convert(high));
        code[v] = vf_nearest(q);
        if (measured) {
          if (!careful)
            code[v] = vi_min(code[v], high);
          if (!careful && !symmetric)
            code[v] = vi_max(code[v], low);
          const vf level = vi_convert(code[v]);
          vf_store(y + v * FQ_LANES, vf_mul(symmetric ? level : vf_sub(level, zero), scale));
        }
      }
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, code, sizeof parts);
    if (u->streams) {
      _Alignas(64) int8_t line[FQ_LINE];
      pack_64_within(line, parts, (int8_t)-half_range, (int8_t)(half_range - 1));
      stream_line(codes, line);
    } else {
      pack_64_within(codes, parts, (int8_t)-half_range, (int8_t)(half_range - 1));
    }
  }
}

/* One copy of the loop for each set of options that changes its instructions. */
FQ_INLINE void quantize_options(const fq_job *job, fetcher *next, const char *x, int64_t n, const span_units *u,
                                int8_t *codes, float *wide, float *y) {
#define FQ_LOOP(arithmetic, symmetric, measured)                                                                       \
  quantize_span(next, x, n, u, job->bits, arithmetic, symmetric, 0, measured, codes, wide, y)
#define FQ_LOOPS(arithmetic)                                                                                           \
  if (job->symmetric && job->measure)                                                                                  \
    FQ_LOOP(arithmetic, 1, 1);                                                                                         \
  else if (job->symmetric)                                                                                             \
    FQ_LOOP(arithmetic, 1, 0);                                                                                         \
  else if (job->measure)                                                                                               \
    FQ_LOOP(arithmetic, 0, 1);                                                                                         \
  else                                                                                                                 \
    FQ_LOOP(arithmetic, 0, 0);
  switch (job->arithmetic) {
  case FQ_BF16:
    FQ_LOOPS(FQ_BF16)
    break;
  case FQ_F16:
    FQ_LOOPS(FQ_F16)
    break;
  default:
    FQ_LOOPS(FQ_F32)
  }
}

static __attribute__((noinline)) void quantize_extreme(const fq_job *job, fetcher *next, const char *x, int64_t n,
                                                       const span_units *u, int8_t *codes, float *wide, float *y) {
  quantize_span(next, x, n, u, job->bits, job->arithmetic, job->symmetric, 1, job->measure, codes, wide, y);
}

static void quantize(const fq_job *job, fetcher *next, const char *x, int64_t n, const span_units *u, int8_t *codes,
                     float *wide, float *y) {
  if (u->careful)
    quantize_extreme(job, next, x, n, u, codes, wide, y);
  else
    quantize_options(job, next, x, n, u, codes, wide, y);
}

/* Codes of any width below 8, raised to 0 and up, as a dense stream, the lowest bit first: 8 codes in `bits` bytes, by
 * closing the gaps between neighbours, then between pairs, then between fours. Writes 8 bytes past the end. */
FQ_INLINE void pack_stream(uint8_t *to, const int8_t *codes, int64_t n, int bits) {
  const uint64_t code = (UINT64_C(1) << bits) - 1, bytes = UINT64_C(0x0101010101010101);
  const uint64_t ones = UINT64_C(0x0001000100010001) * code;
  const uint64_t twos = UINT64_C(0x0000000100000001) * ((code << bits) | code);
  const uint64_t fours = (UINT64_C(1) << (4 * bits)) - 1;
  uint64_t eights[FQ_SPAN / 8];
  for (int64_t i = 0; i < n / 8; i++) {
    uint64_t v;
    memcpy(&v, codes + i * 8, sizeof v);
    v ^= bytes << (bits - 1); /* in two's complement: plus half the range */
    v = (v & ones) | ((v >> (8 - bits)) & (ones << bits));
    v = (v & twos) | ((v >> (16 - 2 * bits)) & (twos << (2 * bits)));
    eights[i] = (v & fours) | ((v >> (32 - 4 * bits)) & (fours << (4 * bits)));
  }
  for (int64_t i = 0; i < n / 8; i++)
    memcpy(to + i * bits, eights + i, sizeof eights[i]);
}

/* Write the codes of n weights from an index on; at the end of a row, also the bytes that fill it up. */
static void pack(const fq_job *job, int64_t begin, int64_t n, int8_t *codes) {
  const int64_t row = begin / job->cols, col = begin % job->cols;
  const int bits = job->bits, whole_rows = job->row_bytes * 8 == job->cols * bits;
  uint8_t apart[FQ_SPAN + 8], *place = job->data + row * job->row_bytes + col * bits / 8;
  if (bits == 8) {
    store_packed(job, place, (const uint8_t *)codes, n);
    return;
  }
  uint8_t *to = bits == 4 || bits == 2 ? packed_place(job, place, apart) : apart;
  int64_t i = 0;
  if (bits == 4)
    for (; i + FQ_STEP <= n; i += FQ_STEP)
      pack_nibbles_64(to + i / 2, codes + i);
  else if (bits == 2)
    for (; i + FQ_STEP <= n; i += FQ_STEP)
      pack_quarters_64(to + i / 4, codes + i);
  if (i < n) {
    const int64_t padded = round_up(n, 8);
    uint8_t *rest = apart + i * bits / 8;
    for (int64_t k = n; k < padded; k++)
      codes[k] = (int8_t)-(1 << (bits - 1));
    pack_stream(rest, codes + i, padded - i, bits);
    if (to != apart)
      memcpy(to + i * bits / 8, rest, (size_t)(((n - i) * bits + 7) / 8));
  }
  store_packed(job, place, to, (n * bits + 7) / 8);
  if (!whole_rows && col + n == job->cols) {
    const int64_t used = (job->cols * bits + 7) / 8;
    memset(job->data + row * job->row_bytes + used, 0, (size_t)(job->row_bytes - used));
  }
}

void FQ_NAME(note_bad_weights)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN];
  for (int64_t at = begin; at < end && result->first_bad < 0; at += FQ_SPAN) {
    const int64_t n = end - at < FQ_SPAN ? end - at : FQ_SPAN;
    note_bad(load_span(job, at, n, buffer), at, n, result);
  }
}

void FQ_NAME(integer_reduce)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN];
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, padded = round_up(n, FQ_STEP);
    const int halves = job->dtype == FQ_F16 || job->dtype == FQ_BF16;
    int32_t ends[FQ_LANES] = {0};
    range_part found;
    if (!halves) {
      const float *x = load_span(job, at, n, buffer);
      found = job->symmetric ? range_bits(x, padded, 1) : range_bits(x, padded, 0);
    } else {
      const char *x = halves_span(job, at, n, (char *)buffer);
      found = job->symmetric ? range_halves(x, padded, 1) : range_halves(x, padded, 0);
    }
    found = beyond_zero(found);
    ends[0] = pi_highest(found.high);
    ends[1] = pi_highest(found.low);
    widen_ends(ends, job->dtype);
    if (ends[0] >= FQ_INFINITY_BITS || ends[1] >= FQ_INFINITY_BITS)
      FQ_NAME(note_bad_weights)(job, at, stop, result);
    result->range.high = ends[0] > result->range.high ? ends[0] : result->range.high;
    result->range.low = ends[1] > result->range.low ? ends[1] : result->range.low;
    at = stop;
  }
}

void FQ_NAME(pack_codes)(const fq_job *job, int64_t begin, int64_t n, int8_t *codes) { pack(job, begin, n, codes); }

void FQ_NAME(integer_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  quantize_tile(job, begin, end, result, quantize, pack);
}
