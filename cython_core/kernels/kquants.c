/* ggml's Q2_K to Q6_K (flightquant/reference/kquants.py): blocks of 256 weights in sub-blocks of 16 or 32, whose scales
 * are quantized themselves. */
#include "search.h"

enum { WIDE = 256, SUBS = FQ_SPAN / 16, WIDE_BLOCKS = FQ_SPAN / WIDE };

typedef struct {
  int family, bits;
  int sub;    /* weights of a sub-block */
  int bytes;  /* of a block */
  int head;   /* where float16 scale and, right after it, minimum stand in a block */
  int levels; /* steps of a sub-block's scale and minimum */
  fq_trials trials, weighted;
} k_format;

/* Codes of q3_k and q6_k lie around 0, the others count up from a minimum. */
#define SEARCHED(top, first, step, last, absolute)                                                                     \
  .trials = {top, first, step, last, absolute}, .weighted = {top, -0.9f, 0.05f, 36, 0}
static const k_format q2_k = {FQ_Q2_K, 2, 16, 84, 80, 15, SEARCHED(3, -0.5f, 0.1f, 15, 1)};
static const k_format q3_k = {.family = FQ_Q3_K, .bits = 3, .sub = 16, .bytes = 110, .head = 108};
static const k_format q4_k = {FQ_Q4_K, 4, 32, 144, 0, 63, SEARCHED(15, -1, 0.1f, 20, 0)};
static const k_format q5_k = {FQ_Q5_K, 5, 32, 176, 0, 63, SEARCHED(31, -0.5f, 0.1f, 15, 0)};
static const k_format q6_k = {.family = FQ_Q6_K, .bits = 6, .sub = 16, .bytes = 210, .head = 208};

typedef struct {
  _Alignas(64) float scale[SUBS], least[SUBS];    /* as the search found them */
  _Alignas(64) float inverse[SUBS], origin[SUBS]; /* what makes the search's codes */
  _Alignas(64) float sum_w[SUBS];                 /* what errors count in all */
  _Alignas(64) float divisor[SUBS], offset[SUBS]; /* scale and minimum as stored */
  _Alignas(64) float code[SUBS][FQ_LANES]; /* of q3_k's sub-blocks in moved: codes that no inverse makes, from 0 */
  uint32_t moved[SUBS / FQ_LANES];         /* a bit for each */
} span_search;

/* Rounded to float16 and stored; a NaN has its sign bit set, as what x86 makes has. */
FQ_INLINE float store_half(uint8_t *to, float a) {
  char halves[FQ_LANES * 2];
  float again[FQ_LANES];
  if (a != a) {
    const uint32_t bits = 0xffc00000;
    memcpy(&a, &bits, sizeof a);
  }
  vf_store_f16(halves, vf_set(a));
  memcpy(to, halves, 2);
  vf_store(again, vf_load_f16(halves));
  return again[0];
}

FQ_INLINE int32_t nearest_one(float a) {
  int32_t lanes[FQ_LANES];
  const vi found = nearest_any(vf_set(a));
  memcpy(lanes, &found, sizeof lanes);
  return lanes[0];
}

/* The mean square of each block's weights times a factor, each block's sum in the order of its elements. */
FQ_INLINE void mean_squares(const float *x, int64_t blocks, float factor, float *to) {
  float sum[WIDE_BLOCKS] = {0};
  for (int i = 0; i < WIDE; i++)
    for (int64_t b = 0; b < blocks; b++) {
      float v;
      memcpy(&v, x + b * WIDE + i, sizeof v);
      sum[b] += v * v;
    }
  for (int64_t b = 0; b < blocks; b++)
    to[b] = factor * sum[b] / WIDE;
}

/* What an error counts in 16 rows whose first weight is number at of the layer. */
FQ_INLINE void weigh_rows(const fq_job *job, const k_format *f, fq_rows *r, int64_t at, int64_t rows,
                          const float *means) {
  if (job->importance) {
    fq_rows importance;
    const int64_t cols = job->cols;
    for (int64_t k = 0; k < FQ_LANES; k++) {
      const float *from = job->importance + (k < rows ? (at + k * f->sub) % cols : 0);
      for (int i = 0; i < f->sub; i++)
        memcpy(&importance.x[i][k], from + i, sizeof(float));
    }
    _Alignas(64) float mean[FQ_LANES];
    for (int k = 0; k < FQ_LANES; k++)
      mean[k] = means[k * f->sub / WIDE];
    for (int i = 0; i < f->sub; i++) {
      const vf x = vf_load(r->x[i]), given = vf_load(importance.x[i]);
      const vf usual = vf_sqrt(vf_add(vf_load(mean), vf_mul(x, x)));
      vf_store(r->w[i], f->family == FQ_Q6_K ? given : vf_mul(given, usual));
    }
    return;
  }
  vf usual = vf_set(0);
  if (f->sub == 32) {
    for (int i = 0; i < f->sub; i++)
      usual = vf_add(usual, vf_mul(vf_load(r->x[i]), vf_load(r->x[i])));
    usual = vf_sqrt(vf_div(usual, vf_set(32)));
  }
  for (int i = 0; i < f->sub; i++) {
    const vf x = vf_load(r->x[i]);
    if (f->sub == 32)
      vf_store(r->w[i], vf_add(usual, magnitude(x)));
    else
      vf_store(r->w[i], f->family == FQ_Q2_K ? magnitude(x) : vf_mul(x, x));
  }
}

FQ_INLINE void keep_found(span_search *s, int64_t first, fq_found found) {
  vf_store(s->scale + first, found.scale);
  vf_store(s->least + first, found.least);
  vf_store(s->inverse + first, found.inverse);
  vf_store(s->origin + first, found.origin);
}

/* Search the scales of a span's sub-blocks, 16 at a time. */
FQ_INLINE void search_span(const fq_job *job, const k_format *f, int weighted, const float *x, int64_t at, int64_t n,
                           span_search *s) {
  const int64_t subs = n / f->sub;
  float means[WIDE_BLOCKS + 2] = {0};
  if (weighted && f->family != FQ_Q6_K)
    mean_squares(x, n / WIDE, f->family == FQ_Q2_K ? 1 : 2, means);
  for (int64_t first = 0; first < subs; first += FQ_LANES) {
    fq_rows r;
    const int64_t rows = subs - first < FQ_LANES ? subs - first : FQ_LANES;
    take_rows(&r, x + first * f->sub, rows, f->sub);
    weigh_rows(job, f, &r, at + first * f->sub, rows, means + first * f->sub / WIDE);
    if (weighted) {
      vf sum = vf_set(0);
      for (int i = 0; i < f->sub; i++)
        sum = vf_add(sum, vf_load(r.w[i]));
      vf_store(s->sum_w + first, sum);
    }
    if (f->levels)
      keep_found(s, first, search_minimum(&r, f->sub, weighted ? &f->weighted : &f->trials));
    else
      keep_found(s, first, search_signed(&r, f->sub, (float)(1 << (f->bits - 1)), 1));
  }
}

/* The same for q3_k without weights: few sub-blocks go beyond their plain codes. A move of one waits for the one
 * before: all that are left make theirs in turn. */
FQ_INLINE void descend_span(const float *x, int64_t n, span_search *s) {
  const int64_t subs = n / FQ_LANES;
  _Alignas(64) float lx[SUBS], l2[SUBS];
  uint32_t next[SUBS];
  int32_t which[SUBS + 1];
  int64_t moving = 0;
  for (int64_t first = 0; first < subs; first += FQ_LANES) {
    fq_rows r;
    vf inverse;
    take_rows(&r, x + first * FQ_LANES, subs - first < FQ_LANES ? subs - first : FQ_LANES, FQ_LANES);
    const fq_descent d = begin_descent(&r, FQ_LANES, 4, &inverse);
    const uint32_t moves = may_move(&r, FQ_LANES, 4, &d);
    s->moved[first / FQ_LANES] = moves;
    vf_store(s->inverse + first, inverse);
    vf_store(lx + first, d.lx);
    vf_store(l2 + first, d.l2);
    for (int k = 0; k < FQ_LANES; k++) {
      which[moving] = (int32_t)first + k;
      moving += moves >> k & 1;
    }
  }
  for (int64_t i = 0; i < moving; i++) {
    const int32_t k = which[i];
    next[k] = 0;
    vf_store(s->code[k], nearest_within(vf_mul(vf_set(s->inverse[k]), vf_load(x + k * FQ_LANES)), -4, 3, 1));
  }
  for (int64_t left = moving; left;) {
    const int64_t count = left;
    left = 0;
    for (int64_t i = 0; i < count; i++) {
      const int32_t k = which[i];
      which[left] = k;
      left += move_next(x + k * FQ_LANES, 4, s->code[k], lx + k, l2 + k, next + k);
    }
  }
  for (int64_t first = 0; first < subs; first += FQ_LANES) {
    const vf sum_l2 = vf_load(l2 + first), zero = vf_set(0);
    vf_store(s->scale + first, vf_where_less(zero, sum_l2, vf_div(vf_load(lx + first), sum_l2), zero));
  }
}

/* One number of each sub-block of the span's blocks as rows: element i of row k is that of block k's sub-block i. */
FQ_INLINE void take_numbers(fq_rows *r, const float *numbers, const float *counts, int64_t blocks, int each) {
  memset(r, 0, sizeof *r);
  for (int64_t k = 0; k < blocks; k++)
    for (int i = 0; i < each; i++) {
      r->x[i][k] = numbers[k * each + i];
      r->w[i][k] = counts[k * each + i];
    }
}

/* Steps of one block's sub-blocks, as bytes, and what one step is worth: the largest number has all levels. */
FQ_INLINE float plain_steps(const float *numbers, int each, int levels, uint8_t *steps) {
  float largest = 0;
  for (int i = 0; i < each; i++)
    largest = numbers[i] > largest ? numbers[i] : largest;
  const float inverse = largest > 0 ? (float)levels / largest : 0;
  for (int i = 0; i < each; i++) {
    steps[i] = (uint8_t)nearest_one(inverse * numbers[i]);
    if (levels == 63 && steps[i] > levels)
      steps[i] = (uint8_t)levels;
  }
  return largest / (float)levels;
}

/* A step of a searched scale, 0 to 255; q5_k alone holds it to its levels. */
FQ_INLINE float held(const k_format *f, float step) { return f->family == FQ_Q5_K && step > 63 ? 63 : step; }

/* What is stored of the scales and minima of q2_k, q4_k and q5_k. */
FQ_INLINE void store_scales(const k_format *f, int weighted, int64_t blocks, span_search *s, uint8_t *to) {
  const int each = WIDE / f->sub;
  _Alignas(64) float unit[2][FQ_LANES];
  uint8_t steps[2][SUBS];
  for (int part = 0; part < 2; part++) {
    const float *numbers = part ? s->least : s->scale;
    if (weighted) {
      fq_rows r;
      take_numbers(&r, numbers, s->sum_w, blocks, each);
      vf_store(unit[part], search_positive(&r, each, (float)f->levels));
      for (int64_t b = 0; b < blocks; b++)
        for (int i = 0; i < each; i++)
          steps[part][b * each + i] = (uint8_t)held(f, r.code[i][b]);
    } else {
      for (int64_t b = 0; b < blocks; b++)
        unit[part][b] = plain_steps(numbers + b * each, each, f->levels, steps[part] + b * each);
    }
  }
  for (int64_t b = 0; b < blocks; b++, to += f->bytes) {
    const uint8_t *scale = steps[0] + b * each, *least = steps[1] + b * each;
    const float d = store_half(to + f->head, unit[0][b]), m = store_half(to + f->head + 2, unit[1][b]);
    uint8_t packed[16];
    float *divisor = s->divisor + b * each, *offset = s->offset + b * each;
    if (f->family == FQ_Q2_K) {
      for (int i = 0; i < 16; i++) {
        packed[i] = (uint8_t)(scale[i] | least[i] << 4);
        divisor[i] = d * (float)(packed[i] & 15);
        offset[i] = m * (float)(packed[i] >> 4);
      }
      memcpy(to, packed, 16);
      continue;
    }
    for (int i = 0; i < 4; i++) {
      packed[i] = (uint8_t)(scale[i] | (scale[i + 4] >> 4) << 6);
      packed[i + 4] = (uint8_t)(least[i] | (least[i + 4] >> 4) << 6);
      packed[i + 8] = (uint8_t)((scale[i + 4] & 15) | (least[i + 4] & 15) << 4);
      divisor[i] = d * (float)(packed[i] & 63);
      offset[i] = m * (float)(packed[i + 4] & 63);
      divisor[i + 4] = d * (float)((packed[i + 8] & 15) | packed[i] >> 6 << 4);
      offset[i + 4] = m * (float)(packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4);
    }
    memcpy(to + 4, packed, 12);
  }
}

/* The scale of largest magnitude of a block's 16, the first of several; 0 if there is none but NaN. */
FQ_INLINE float first_largest(const float *scales) {
  const vf size = magnitude(vf_load(scales)), zero = vf_set(0);
  const int32_t highest = vi_highest(vf_bits(vf_where_less(zero, size, size, zero)));
  float largest;
  memcpy(&largest, &highest, sizeof largest);
  const uint32_t those = vf_bits_less(zero, size) & ~vf_bits_less(size, vf_set(largest));
  return those ? scales[__builtin_ctz(those)] : 0;
}

FQ_INLINE void store_scales_q3(int weighted, int64_t blocks, span_search *s, uint8_t *to) {
  fq_rows r;
  _Alignas(64) float unit[FQ_LANES], inverse[FQ_LANES];
  if (weighted) {
    take_numbers(&r, s->scale, s->sum_w, blocks, 16);
    const fq_found found = search_signed(&r, 16, 32, 0);
    vf_store(unit, found.scale);
    vf_store(inverse, found.inverse);
  }
  for (int64_t b = 0; b < blocks; b++, to += q3_k.bytes) {
    const float *scales = s->scale + b * 16, largest = first_largest(scales);
    const int none = weighted ? fabsf(largest) < fq_nothing : largest == 0;
    int32_t steps[FQ_LANES];
    if (!weighted) {
      inverse[b] = none ? 0 : -32 / largest;
      unit[b] = none ? 0 : 1 / inverse[b];
    }
    vi step = nearest_any(vf_mul(vf_set(inverse[b]), vf_load(scales)));
    if (!weighted) /* as a signed byte */
      step = vi_sub(vi_xor(vi_and(step, vi_set(255)), vi_set(128)), vi_set(128));
    step = none ? vi_set(-32) : vi_min(vi_max(step, vi_set(-32)), vi_set(31));
    const float d = store_half(to + q3_k.head, unit[b]);
    vf_store(s->divisor + b * 16, vf_mul(vf_set(d), vi_convert(step)));
    step = vi_add(step, vi_set(32));
    memcpy(steps, &step, sizeof steps);
    for (int i = 0; i < 8; i++)
      to[96 + i] = (uint8_t)((steps[i] & 15) | (steps[i + 8] & 15) << 4);
    for (int i = 0; i < 4; i++)
      to[104 + i] =
          (uint8_t)(steps[i] >> 4 | steps[i + 4] >> 4 << 2 | steps[i + 8] >> 4 << 4 | steps[i + 12] >> 4 << 6);
  }
}

FQ_INLINE void store_scales_q6(int64_t blocks, span_search *s, uint8_t *to) {
  for (int64_t b = 0; b < blocks; b++, to += q6_k.bytes) {
    const float *scales = s->scale + b * 16, largest = first_largest(scales);
    const int none = fabsf(largest) < fq_nothing;
    const float inverse = none ? 0 : -128 / largest;
    const float d = store_half(to + q6_k.head, none ? 0 : 1 / inverse);
    const vi step = none ? vi_set(0) : vi_min(nearest_any(vf_mul(vf_set(inverse), vf_load(scales))), vi_set(127));
    int32_t steps[FQ_LANES];
    memcpy(steps, &step, sizeof steps);
    for (int i = 0; i < 16; i++) {
      const int8_t stored = (int8_t)steps[i];
      memcpy(to + 192 + i, &stored, 1);
      s->divisor[b * 16 + i] = d * (float)stored;
      if (none)
        s->inverse[b * 16 + i] = 0;
    }
  }
}

/* Codes of 16 weights of one sub-block, those for the stored scale; where that came out as 0, the search's own. */
FQ_INLINE vi codes_of(const k_format *f, int weighted, const span_search *s, vf x, int64_t sub) {
  const int middle = f->levels ? 0 : 1 << (f->bits - 1);
  const vi low = vi_set(-middle), high = vi_set((1 << f->bits) - 1 - middle);
  const float divisor = s->divisor[sub];
  vi code;
  if (divisor != 0) {
    const vf moved = f->levels ? vf_add(x, vf_set(s->offset[sub])) : x;
    code = nearest_any(vf_div(moved, vf_set(divisor)));
  } else if (f->levels) {
    code = nearest_any(vf_mul(vf_set(s->inverse[sub]), vf_sub(x, vf_set(s->origin[sub]))));
  } else if (f->family == FQ_Q3_K && !weighted && s->moved[sub / FQ_LANES] >> sub % FQ_LANES & 1) {
    code = vf_truncate(vf_load(s->code[sub]));
  } else if (s->inverse[sub] != 0) {
    code = nearest_any(vf_mul(vf_set(s->inverse[sub]), x));
  } else { /* no code was searched for */
    return vi_set(0);
  }
  return vi_add(vi_min(vi_max(code, low), high), vi_set(middle));
}

/* The codes' bytes of one block; those of its scales stand in it already. */
FQ_INLINE void store_codes(const k_format *f, uint8_t *to, const uint8_t *code) {
  if (f->family == FQ_Q4_K || f->family == FQ_Q5_K) {
    uint8_t *low = to + f->bytes - WIDE / 2;
    for (int half = 0; half < WIDE / 2; half += 32)
      for (int i = 0; i < 32; i++)
        low[half + i] = (uint8_t)((code[2 * half + i] & 15) | (code[2 * half + i + 32] & 15) << 4);
  }
  if (f->family == FQ_Q6_K)
    for (int half = 0; half < WIDE / 2; half += 64)
      for (int i = 0; i < 64; i++)
        to[half + i] = (uint8_t)((code[2 * half + i] & 15) | (code[2 * half + i + 64] & 15) << 4);
  if (f->family != FQ_Q4_K && f->family != FQ_Q5_K) {
    uint8_t *two = to + (f->family == FQ_Q2_K ? 16 : f->family == FQ_Q3_K ? 32 : 128);
    const int shift = f->family == FQ_Q6_K ? 4 : 0;
    for (int half = 0; half < 2; half++, two += 32, code += WIDE / 2)
      for (int i = 0; i < 32; i++) {
        const int a = code[i] >> shift & 3, b = code[i + 32] >> shift & 3;
        const int c = code[i + 64] >> shift & 3, d = code[i + 96] >> shift & 3;
        two[i] = (uint8_t)(a | b << 2 | c << 4 | d << 6);
      }
    code -= WIDE;
  }
  if (f->family == FQ_Q3_K || f->family == FQ_Q5_K) {
    uint8_t *one = to + (f->family == FQ_Q3_K ? 0 : 16);
    for (int i = 0; i < 32; i++) {
      int bits = 0;
      for (int k = 0; k < 8; k++)
        bits |= (code[32 * k + i] >> (f->bits - 1) & 1) << k;
      one[i] = (uint8_t)bits;
    }
  }
}

FQ_INLINE void quantize_blocks(const fq_job *job, const k_format *f, int weighted, int64_t begin, int64_t end,
                               fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t codes[FQ_SPAN];
  span_search s;
  const int measured = job->measure, middle = f->levels ? 0 : 1 << (f->bits - 1);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, blocks = n / WIDE;
    const float *x = load_span(job, at, n, buffer);
    uint8_t *to = job->data + at / WIDE * f->bytes;
    fetcher next = fetch_after(job, at, n);
    pi high, low;
    range_lanes(x, n, 1, &high, &low);
    if (pi_highest(high) >= FQ_INFINITY_BITS)
      note_bad(x, at, n, result);
    if (f->family == FQ_Q3_K && !weighted)
      descend_span(x, n, &s);
    else
      search_span(job, f, weighted, x, at, n, &s);
    if (f->levels)
      store_scales(f, weighted, blocks, &s, to);
    else if (f->family == FQ_Q3_K)
      store_scales_q3(weighted, blocks, &s, to);
    else
      store_scales_q6(blocks, &s, to);
    for (int64_t i = 0; i < n; i += FQ_STEP) {
      vi code[FQ_STEP / FQ_LANES];
      fetch_step(&next, measured);
      for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
        const int64_t j = i + v * FQ_LANES, sub = j / f->sub;
        code[v] = codes_of(f, weighted, &s, vf_load(x + j), sub);
        if (!measured)
          continue;
        const vf steps = vi_convert(vi_sub(code[v], vi_set(middle))), scaled = vf_mul(vf_set(s.divisor[sub]), steps);
        vf_store(again + j, f->levels ? vf_sub(scaled, vf_set(s.offset[sub])) : scaled);
      }
      pi parts[FQ_STEP / FQ_PART];
      memcpy(parts, code, sizeof parts);
      pack_64(codes + i, parts);
    }
    for (int64_t b = 0; b < blocks; b++)
      store_codes(f, to + b * f->bytes, (const uint8_t *)codes + b * WIDE);
    if (measured)
      measure(x, again, n, &next, result);
    at = stop;
  }
}

FQ_INLINE void quantize_format(const fq_job *job, const k_format *f, int64_t begin, int64_t end, fq_result *result) {
  if (job->importance)
    quantize_blocks(job, f, 1, begin, end, result);
  else
    quantize_blocks(job, f, 0, begin, end, result);
}

void FQ_NAME(kquants_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  switch (job->family) {
  case FQ_Q2_K:
    quantize_format(job, &q2_k, begin, end, result);
    break;
  case FQ_Q3_K:
    quantize_format(job, &q3_k, begin, end, result);
    break;
  case FQ_Q4_K:
    quantize_format(job, &q4_k, begin, end, result);
    break;
  case FQ_Q5_K:
    quantize_format(job, &q5_k, begin, end, result);
    break;
  default:
    quantize_format(job, &q6_k, begin, end, result);
  }
}
