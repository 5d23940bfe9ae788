/* ggml's Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 (flightquant/reference/gguf.py): blocks of 32 weights that hold a float16
 * scale and, in some, a float16 minimum. */
#include "families.h"

typedef struct {
  int bits;    /* of a code; of 8 each is a signed byte, else they count from 0 up */
  int minimum; /* codes count up from the block's least weight, which is stored */
  float divisor, bias;
  float middle; /* the code of 0, or of the minimum */
} block_format;

static const block_format q8_0 = {.bits = 8, .minimum = 0, .divisor = 127, .bias = 0, .middle = 0};
static const block_format q4_0 = {.bits = 4, .minimum = 0, .divisor = -8, .bias = 8.5f, .middle = 8};
static const block_format q4_1 = {.bits = 4, .minimum = 1, .divisor = 15, .bias = 0.5f, .middle = 0};
static const block_format q5_0 = {.bits = 5, .minimum = 0, .divisor = -16, .bias = 16.5f, .middle = 16};
static const block_format q5_1 = {.bits = 5, .minimum = 1, .divisor = 31, .bias = 0.5f, .middle = 0};

/* A scale, a minimum if there is one, 32 codes. */
FQ_INLINE int block_bytes(const block_format *f) { return (f->minimum ? 4 : 2) + FQ_BLOCK / 8 * f->bits; }

typedef struct {
  _Alignas(64) int32_t high[FQ_BLOCKS], low[FQ_BLOCKS];
  _Alignas(64) float scale[FQ_BLOCKS], inverse[FQ_BLOCKS], bias[FQ_BLOCKS];
  _Alignas(64) float least[FQ_BLOCKS], offset[FQ_BLOCKS];           /* the minimum, and what makes the codes of it */
  _Alignas(64) char half[FQ_BLOCKS * 2], least_half[FQ_BLOCKS * 2]; /* scale and minimum as float16 */
} span_scales;

/* From the extremes or ranges in scale[] and the minima in least[]: what is stored, and what makes the codes. */
FQ_INLINE void block_scales(span_scales *s, int64_t blocks, const block_format *f) {
  for (int64_t i = 0; i < blocks; i += FQ_LANES) {
    const vf scale = vf_div(vf_load(s->scale + i), vf_set(f->divisor));
    const vf inverse = vf_where_zero(scale, vf_set(0), vf_div(vf_set(1), scale));
    /* An inverse that overflows makes ggml cast infinities and NaN to integers: code 0 on x86. */
    const vf finite = vf_mul(inverse, vf_set(0));
    vf_store(s->inverse + i, vf_where_zero(finite, inverse, vf_set(0)));
    vf_store(s->bias + i, vf_where_zero(finite, vf_set(f->bias), vf_set(0)));
    vf_store_f16(s->half + i * 2, scale);
    vf_store(s->scale + i, vf_load_f16(s->half + i * 2));
    if (f->minimum) {
      const vf least = vf_load(s->least + i);
      /* So does a range that overflows: the inverse is 0, and a difference times 0 is 0 or NaN. */
      vf_store(s->offset + i, vf_where_zero(vf_mul(scale, vf_set(0)), least, vf_set(0)));
      vf_store_f16(s->least_half + i * 2, least);
      vf_store(s->least + i, vf_load_f16(s->least_half + i * 2));
    }
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

/* The smallest magnitude of a block. */
FQ_INLINE float smallest(const float *x) {
  const vi mask = vi_set(INT32_MAX);
  const vi first = vi_xor(vi_and(vf_bits(vf_load(x)), mask), mask);
  const vi second = vi_xor(vi_and(vf_bits(vf_load(x + FQ_LANES)), mask), mask);
  const int32_t bits = INT32_MAX - vi_highest(vi_max(first, second));
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* The least weight of a block whose range is known, and how far the largest lies above it. Of several zeros the first
 * is the least, as in ggml's C (gguf leaves it to NumPy, which takes another on each CPU). */
FQ_INLINE void least_and_range(const float *x, int32_t high, int32_t low, float *least, float *range) {
  float above, below;
  memcpy(&above, &high, sizeof above);
  memcpy(&below, &low, sizeof below);
  if (high == 0 && low != 0) /* no weight is positive */
    above = -smallest(x);
  if (low != 0) {
    *least = -below;
  } else { /* no weight is negative */
    *least = smallest(x);
    for (int i = 0; i < FQ_BLOCK && *least == 0; i++) {
      float v;
      memcpy(&v, x + i, sizeof v);
      if (v == 0) {
        *least = v;
        break;
      }
    }
  }
  *range = above - *least;
}

/* Half away from zero, as roundf: the largest float32 below a half, with the sign of a, then cut. */
FQ_INLINE vi round_away(vf a) {
  const vi sign = vi_and(vf_bits(a), vi_set(INT32_MIN));
  return vf_truncate(vf_add(a, vi_float(vi_or(sign, vf_bits(vf_set(0x1.fffffep-2f))))));
}

/* One block's bytes. */
FQ_INLINE void store_block(uint8_t *to, const block_format *f, const span_scales *s, int64_t b, const int8_t *codes) {
  memcpy(to, s->half + b * 2, 2);
  to += 2;
  if (f->minimum) {
    memcpy(to, s->least_half + b * 2, 2);
    to += 2;
  }
  if (f->bits == 8) {
    memcpy(to, codes, FQ_BLOCK);
  } else if (f->bits == 4) {
    pack_halves_32(to, codes);
  } else {
    const uint32_t fifth = pack_high_bits_32(codes);
    int8_t nibbles[FQ_BLOCK];
    for (int i = 0; i < FQ_BLOCK; i++)
      nibbles[i] = codes[i] & 15;
    memcpy(to, &fifth, sizeof fifth);
    pack_halves_32(to + sizeof fifth, nibbles);
  }
}

/* Codes of 16 weights of block b. */
FQ_INLINE vi codes_of(vf x, const block_format *f, const span_scales *s, int64_t b) {
  const vf inverse = vf_set(s->inverse[b]);
  if (f->bits == 8)
    return round_away(vf_mul(x, inverse));
  if (f->minimum) /* never past the top: a rounded quotient of a range stays below the last code and a half */
    return vf_truncate(vf_add(vf_mul(vf_sub(x, vf_set(s->offset[b])), inverse), vf_set(f->bias)));
  const vf shifted = vf_add(vf_mul(x, inverse), vf_set(s->bias[b]));
  return vf_truncate(vf_min(shifted, vf_set(2 * f->middle - 1)));
}

FQ_INLINE vf dequantized(vi codes, const block_format *f, const span_scales *s, int64_t b) {
  const vf scaled = vf_mul(vf_add(vi_convert(codes), vf_set(-f->middle)), vf_set(s->scale[b]));
  return f->minimum ? vf_add(scaled, vf_set(s->least[b])) : scaled;
}

FQ_INLINE void quantize_blocks(const fq_job *job, const block_format *f, int measured, int64_t begin, int64_t end,
                               fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  _Alignas(64) int8_t codes[FQ_SPAN];
  uint8_t apart[FQ_BLOCKS * (FQ_BLOCK + 2)];
  span_scales s;
  memset(&s, 0, sizeof s);
  const int q8 = f->bits == 8;
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, blocks = n / FQ_BLOCK;
    const float *x = load_span(job, at, n, buffer);
    int32_t highest = 0;
    fetcher next = fetch_after(job, at, n);
    for (int64_t b = 0; b < blocks; b += FQ_LANES) {
      int32_t top;
      if (q8)
        top = range_units(x + b * FQ_BLOCK, FQ_BLOCK, blocks - b, 1, s.high + b, s.low + b);
      else
        top = range_units(x + b * FQ_BLOCK, FQ_BLOCK, blocks - b, 0, s.high + b, s.low + b);
      highest = top > highest ? top : highest;
      if (q8)
        memcpy(s.scale + b, s.high + b, FQ_LANES * sizeof(float));
      else if (!f->minimum)
        extremes_16(x, blocks, &s, b);
      for (int64_t k = b; f->minimum && k < b + FQ_LANES && k < blocks; k++)
        least_and_range(x + k * FQ_BLOCK, s.high[k], s.low[k], s.least + k, s.scale + k);
    }
    if (highest >= FQ_INFINITY_BITS)
      note_bad(x, at, n, result);
    block_scales(&s, blocks, f);
    for (int64_t i = 0; i < round_up(n, FQ_STEP); i += FQ_STEP) {
      vi code[FQ_STEP / FQ_LANES];
      fetch_step(&next, measured);
      for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
        const int64_t j = i + v * FQ_LANES, b = j / FQ_BLOCK;
        code[v] = codes_of(vf_load(x + j), f, &s, b);
        if (measured)
          vf_store(again + j, dequantized(code[v], f, &s, b));
      }
      pi parts[FQ_STEP / FQ_PART];
      memcpy(parts, code, sizeof parts);
      pack_64(codes + i, parts);
    }
    uint8_t *place = job->data + at / FQ_BLOCK * block_bytes(f), *to = packed_place(job, place, apart);
    for (int64_t b = 0; b < blocks; b++)
      store_block(to + b * block_bytes(f), f, &s, b, codes + b * FQ_BLOCK);
    store_packed(job, place, to, blocks * block_bytes(f));
    if (measured)
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    at = stop;
  }
}

FQ_INLINE void quantize_format(const fq_job *job, const block_format *f, int64_t begin, int64_t end,
                               fq_result *result) {
  if (job->measure)
    quantize_blocks(job, f, 1, begin, end, result);
  else
    quantize_blocks(job, f, 0, begin, end, result);
}

void FQ_NAME(gguf_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  switch (job->family) {
  case FQ_Q8_0:
    quantize_format(job, &q8_0, begin, end, result);
    break;
  case FQ_Q4_0:
    quantize_format(job, &q4_0, begin, end, result);
    break;
  case FQ_Q4_1:
    quantize_format(job, &q4_1, begin, end, result);
    break;
  case FQ_Q5_0:
    quantize_format(job, &q5_0, begin, end, result);
    break;
  default:
    quantize_format(job, &q5_1, begin, end, result);
  }
}
