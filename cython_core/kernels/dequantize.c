/* Weights again from packed bytes, scales and zero points, in the arithmetic of the reference (flightquant/reference):
 * the numbers that the quality columns are made of. Whatever the bytes are, nothing here is undefined. */
#include "dequantize.h"
#include "blocks.h"
#include "dynamic_map.h"

/* n weights from an index on, as float32; up to 63 more are unspecified. */
typedef void span_restorer(const fq_job *job, int64_t begin, int64_t n, float *y);
FQ_INLINE float float_at(const float *at, int64_t index) {
  float value;
  memcpy(&value, at + index, sizeof value);
  return value;
}

/* Codes, 64 past the span's end included, to values: (code - zero) * scale. The first scale and zero point hold up to
 * weight `stop`, each other one for `step` weights more. */
FQ_INLINE void scale_by(const float *scales, const float *zeros, int64_t stop, int64_t step, int64_t n,
                        const int8_t *codes, decoder *decode, float *y) {
  int64_t i = 0;
  for (int64_t which = 0; i < n; which++, stop += step) {
    const int64_t end = stop < n ? stop : n;
    const vf scale = vf_set(float_at(scales, which));
    if (zeros) {
      const vf zero = vf_set(float_at(zeros, which));
      for (; i < end; i += FQ_LANES)
        vf_store(y + i, vf_mul(vf_sub(decode(codes + i), zero), scale));
    } else {
      for (; i < end; i += FQ_LANES)
        vf_store(y + i, vf_mul(decode(codes + i), scale));
    }
  }
}

/* The scales of the units from one on, whose codes stand behind the weights', under scales of their own. */
FQ_INLINE void unnest(const fq_job *job, int64_t first, int64_t units, float *scales) {
  enum { BLOCK = 256 };
  const int64_t count = (job->n + job->group - 1) / job->group;
  const float mean = float_at(job->outer, (count + BLOCK - 1) / BLOCK);
  for (int64_t i = 0; i < units; i++) {
    const float scaled = fq_dynamic_values[job->packed[first + i]] * float_at(job->outer, (first + i) / BLOCK);
    scales[i] = scaled + mean;
  }
}

FQ_INLINE void scale_units(const fq_job *job, int64_t begin, int64_t n, const int8_t *codes, decoder *decode,
                           float *y) {
  const int64_t unit = begin / job->group, stop = (unit + 1) * job->group - begin;
  if (job->packing == FQ_NESTED) {
    float scales[FQ_BLOCKS];
    unnest(job, unit, (begin + n - 1) / job->group + 1 - unit, scales);
    scale_by(scales, NULL, stop, job->group, n, codes, decode, y);
  } else if (job->in_blocks) { /* from the edge of one on, within a row */
    const int64_t across = (job->cols + FQ_EDGE - 1) / FQ_EDGE, row = begin / job->cols / FQ_EDGE;
    scale_by(job->scales + row * across + begin % job->cols / FQ_EDGE, NULL, FQ_EDGE, FQ_EDGE, n, codes, decode, y);
  } else if (job->shared_scale) {
    scale_by(job->scales, job->zeros, n, n, n, codes, decode, y);
  } else {
    scale_by(job->scales + unit, job->zeros ? job->zeros + unit : NULL, stop, job->group, n, codes, decode, y);
  }
}

/* Whole bytes: where they lie, or in the buffer if a vector would reach past them. */
FQ_INLINE const int8_t *load_bytes(const uint8_t *from, int64_t n, int8_t *buffer) {
  if (n % FQ_LANES == 0)
    return (const int8_t *)from;
  memcpy(buffer, from, (size_t)n);
  return buffer;
}

/* 8 codes of `bits` bits each, the lowest first, as signed bytes: open gaps between fours, then pairs, then codes. */
FQ_INLINE uint64_t unpack_8(uint64_t v, int bits) {
  const uint64_t four = (UINT64_C(1) << (4 * bits)) - 1, pair = (UINT64_C(1) << (2 * bits)) - 1;
  const uint64_t pairs = UINT64_C(0x0000000100000001) * pair;
  const uint64_t ones = UINT64_C(0x0001000100010001) * ((UINT64_C(1) << bits) - 1);
  const uint64_t bytes = UINT64_C(0x0101010101010101), high = bytes << 7;
  v = (v & four) | ((v & (four << (4 * bits))) << (32 - 4 * bits));
  v = (v & pairs) | ((v & (pairs << (2 * bits))) << (16 - 2 * bits));
  v = (v & ones) | ((v & (ones << bits)) << (8 - bits));
  return ((v | high) - (bytes << (bits - 1))) ^ high; /* less half the range, each byte for itself */
}

FQ_INLINE void unpack_stream(const uint8_t *from, int64_t n, int bits, int8_t *codes) {
  const int64_t nbytes = (n * bits + 7) / 8;
  int64_t i = 0;
  for (; i * bits / 8 + 8 <= nbytes && i < n; i += 8) {
    uint64_t v;
    memcpy(&v, from + i * bits / 8, sizeof v);
    v = unpack_8(v, bits);
    memcpy(codes + i, &v, sizeof v);
  }
  for (; i < n; i += 8) {
    uint64_t v = 0;
    memcpy(&v, from + i * bits / 8, (size_t)(nbytes - i * bits / 8 < bits ? nbytes - i * bits / 8 : bits));
    v = unpack_8(v, bits);
    memcpy(codes + i, &v, sizeof v);
  }
}

/* Two codes of half as many bits in each of n bytes, the lower one first, less half their range or not. */
FQ_INLINE void unpack_pairs(const uint8_t *from, int64_t n, int bits, int middle, int8_t *codes) {
  for (int64_t i = 0; i < n; i++) {
    codes[2 * i] = (int8_t)((from[i] & ((1 << bits) - 1)) - middle);
    codes[2 * i + 1] = (int8_t)((from[i] >> bits) - middle);
  }
}

/* Codes of fewer than 8 bits, each width compiled for itself; up to 7 more are written. */
FQ_INLINE void unpack_codes(const uint8_t *from, int64_t n, int bits, int8_t *codes) {
  switch (bits) {
  case 7:
    unpack_stream(from, n, 7, codes);
    break;
  case 6:
    unpack_stream(from, n, 6, codes);
    break;
  case 5:
    unpack_stream(from, n, 5, codes);
    break;
  case 4:
    unpack_pairs(from, (n + 1) / 2, 4, 8, codes);
    break;
  case 3:
    unpack_stream(from, n, 3, codes);
    break;
  default: {
    uint8_t nibbles[FQ_SPAN / 2 + 2];
    unpack_pairs(from, (n + 3) / 4, 4, 0, (int8_t *)nibbles);
    unpack_pairs(nibbles, (n + 3) / 4 * 2, 2, 2, codes);
  }
  }
}

/* Codes of the rows' dense streams less half their range: where they lie, or in the buffer. */
static const int8_t *signed_codes(const fq_job *job, int64_t begin, int64_t n, int8_t *buffer) {
  const uint8_t *rows = job->packed ? job->packed : job->data;
  const uint8_t *from = rows + begin / job->cols * job->row_bytes + begin % job->cols * job->bits / 8;
  memset(buffer + n, 0, FQ_STEP);
  if (job->bits == 8)
    return load_bytes(from, n, buffer);
  unpack_codes(from, n, job->bits, buffer);
  return buffer;
}

static void restore_integer(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t buffer[FQ_SPAN + FQ_STEP];
  scale_units(job, begin, n, signed_codes(job, begin, n, buffer), signed_byte, y);
}

/* As those, but for 8 bits: codes from 0 up. */
static void restore_onnx(const fq_job *job, int64_t begin, int64_t n, float *y) {
  if (job->bits != 8) {
    restore_integer(job, begin, n, y);
    return;
  }
  int8_t codes[FQ_SPAN + FQ_STEP] = {0};
  raise_codes((uint8_t *)codes, (const int8_t *)job->data + begin, n);
  scale_units(job, begin, n, codes, signed_byte, y);
}

/* Codes from 0 up, code * scale + bias. */
static void restore_mlx(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t buffer[FQ_SPAN + FQ_STEP] = {0};
  const int8_t *codes = signed_codes(job, begin, n, buffer);
  const vf half = vf_set((float)(1 << (job->bits - 1)));
  for (int64_t i = 0; i < n; i += FQ_LANES) {
    const int64_t group = (begin + i) / job->unit;
    const vf code = job->bits == 8 ? unsigned_byte(codes + i) : vf_add(signed_byte(codes + i), half);
    const vf scaled = vf_mul(code, vf_set(float_at(job->scales, group)));
    vf_store(y + i, vf_add(scaled, vf_set(float_at(job->zeros, group))));
  }
}

/* Folded codes: those of the first part of all groups stand highest. */
static void restore_hqq(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t codes[FQ_SPAN + FQ_STEP] = {0};
  const int fold = job->bits == 4 ? 2 : job->bits == 3 ? 10 : job->bits == 2 ? 4 : 1, mask = (1 << job->bits) - 1;
  const int64_t line = (job->n / job->unit + fold - 1) / fold * job->unit;
  for (int64_t i = 0; i < n;) {
    const int64_t part = (begin + i) / line, at = (begin + i) % line;
    const int64_t end = line - at < n - i ? i + line - at : n;
    const int shift = (int)(fold - 1 - part) * job->bits;
    const uint8_t *from = job->data + (job->bits == 3 ? at * 4 : at);
    if (job->bits == 3) {
      for (; i < end; i++, from += 4) {
        uint32_t word;
        memcpy(&word, from, sizeof word);
        codes[i] = (int8_t)(word >> shift & 7);
      }
    } else {
      for (; i < end; i++, from++)
        codes[i] = (int8_t)(*from >> shift & mask);
    }
  }
  scale_units(job, begin, n, codes, unsigned_byte, y);
}

/* Of an 8-bit float without its sign, what a float32 with the same fields stands for, times what the exponents differ
 * by: exact, denormals too. From code `special` on there is an infinity, if the format has one, then no numbers. */
FQ_INLINE vf float8_value(vi code, vf fields, float shift, int special, int has_infinity) {
  const vi sign = vi_and(code, vi_set(INT32_MIN)), magnitude = vi_and(code, vi_set(127));
  const vf beyond = vi_convert(vi_max(vi_sub(magnitude, vi_set(special - 1)), vi_set(0)));
  vf odd = vi_float(vi_set(0x7fc00000));
  if (has_infinity)
    odd = vf_where_zero(vf_sub(beyond, vf_set(1)), vf_set(INFINITY), odd);
  return vi_float(vi_or(vf_bits(vf_where_zero(beyond, vf_mul(fields, vf_set(shift)), odd)), sign));
}
FQ_INLINE vf e4m3(const int8_t *codes) {
  const vi code = vi_load_i8(codes);
  return float8_value(code, vi_float(vi_shift_left_20(vi_and(code, vi_set(127)))), 0x1p120f, 0x7f, 0);
}
FQ_INLINE vf e5m2(const int8_t *codes) {
  const vi code = vi_load_i8(codes);
  return float8_value(code, vi_float(vi_shift_left_21(vi_and(code, vi_set(127)))), 0x1p112f, 0x7c, 1);
}

static void restore_arrowquant(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t buffer[FQ_SPAN + FQ_STEP] = {0};
  scale_units(job, begin, n, load_bytes(job->data + begin, n, buffer), unsigned_byte, y);
}

static void restore_e4m3(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t buffer[FQ_SPAN + FQ_STEP] = {0};
  scale_units(job, begin, n, load_bytes(job->data + begin, n, buffer), e4m3, y);
}
static void restore_e5m2(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t buffer[FQ_SPAN + FQ_STEP] = {0};
  scale_units(job, begin, n, load_bytes(job->data + begin, n, buffer), e5m2, y);
}

static const float nf4_values[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
static const float fp4_values[16] = {
    0, 0x1.555556p-8f,  0x1.555556p-1f,  1,  0x1.555556p-2f,  0.5f,  0x1.555556p-3f,  0.25f,
    0, -0x1.555556p-8f, -0x1.555556p-1f, -1, -0x1.555556p-2f, -0.5f, -0x1.555556p-3f, -0.25f,
};
FQ_INLINE vf nf4(const int8_t *codes) { return vi_lookup_16(vi_load_i8(codes), nf4_values); }
FQ_INLINE vf fp4(const int8_t *codes) { return vi_lookup_16(vi_load_i8(codes), fp4_values); }

FQ_INLINE vf dynamic8(const int8_t *codes) {
  float values[FQ_LANES];
  for (int i = 0; i < FQ_LANES; i++)
    values[i] = fq_dynamic_values[(uint8_t)codes[i]];
  return vf_load(values);
}

static void restore_bnb8(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t buffer[FQ_SPAN + FQ_STEP] = {0};
  scale_units(job, begin, n, load_bytes(job->data + begin, n, buffer), dynamic8, y);
}

/* Two codes a byte, the first in its high half. */
FQ_INLINE void unpack_high_first(const uint8_t *from, int64_t n, int8_t *codes) {
  for (int64_t i = 0; i < (n + 1) / 2; i++) {
    codes[2 * i] = (int8_t)(from[i] >> 4);
    codes[2 * i + 1] = (int8_t)(from[i] & 15);
  }
}

static void restore_nf4(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t codes[FQ_SPAN + FQ_STEP];
  memset(codes + n, 0, FQ_STEP);
  unpack_high_first(job->data + begin / 2, n, codes);
  scale_units(job, begin, n, codes, nf4, y);
}
static void restore_fp4(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t codes[FQ_SPAN + FQ_STEP];
  memset(codes + n, 0, FQ_STEP);
  unpack_high_first(job->data + begin / 2, n, codes);
  scale_units(job, begin, n, codes, fp4, y);
}

static const float e2m1_values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
FQ_INLINE vf e2m1(const int8_t *codes) { return vi_lookup_16(vi_load_i8(codes), e2m1_values); }

static void restore_mxfp4(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t codes[FQ_SPAN];
  unpack_pairs(job->data + begin / 2, n / 2, 4, 0, codes);
  scale_units(job, begin, n, codes, e2m1, y);
}

/* Groups of 16, whose scales stand before that of the tensor, which they are divided by. */
static void restore_nvfp4(const fq_job *job, int64_t begin, int64_t n, float *y) {
  enum { GROUP = 16 };
  int8_t codes[FQ_SPAN];
  unpack_pairs(job->data + begin / 2, n / 2, 4, 0, codes);
  const float whole = float_at(job->scales, job->n / GROUP);
  for (int64_t i = 0; i < n; i += GROUP)
    vf_store(y + i, vf_mul(e2m1(codes + i), vf_set(float_at(job->scales, (begin + i) / GROUP) / whole)));
}

/* Rows with a scale and a bias behind them, float32 for 8 bits, else float16: code * scale + bias. */
static void restore_fbgemm(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t buffer[FQ_SPAN + FQ_STEP];
  const vf half = vf_set(job->bits == 8 ? 0 : (float)(1 << (job->bits - 1)));
  for (int64_t i = 0; i < n;) {
    const int64_t row = (begin + i) / job->cols, col = (begin + i) % job->cols;
    const int64_t rest = job->cols - col < n - i ? job->cols - col : n - i;
    const uint8_t *from = job->data + row * job->row_bytes, *tail = from + job->cols * job->bits / 8;
    const int8_t *codes = buffer;
    float ends[FQ_LANES];
    memset(buffer + rest, 0, FQ_STEP);
    if (job->bits == 8) {
      memcpy(ends, tail, 2 * sizeof(float));
      codes = load_bytes(from + col, rest, buffer);
    } else {
      char halves[FQ_LANES * 2] = {0};
      memcpy(halves, tail, 4);
      vf_store(ends, vf_load_f16(halves));
      unpack_codes(from + col * job->bits / 8, rest, job->bits, buffer);
    }
    const vf scale = vf_set(ends[0]), bias = vf_set(ends[1]);
    for (int64_t k = 0; k < rest; k += FQ_LANES) {
      const vf code = job->bits == 8 ? unsigned_byte(codes + k) : vf_add(signed_byte(codes + k), half);
      vf_store(y + i + k, vf_add(vf_mul(code, scale), bias));
    }
    i += rest;
  }
}

static span_restorer *const restorers[] = {
    [FQ_INTEGER] = restore_integer,
    [FQ_FP8_E4M3] = restore_e4m3,
    [FQ_FP8_E5M2] = restore_e5m2,
    [FQ_NF4] = restore_nf4,
    [FQ_FP4] = restore_fp4,
    [FQ_Q8_0] = FQ_NAME(restore_gguf),
    [FQ_Q4_0] = FQ_NAME(restore_gguf),
    [FQ_Q4_1] = FQ_NAME(restore_gguf),
    [FQ_Q5_0] = FQ_NAME(restore_gguf),
    [FQ_Q5_1] = FQ_NAME(restore_gguf),
    [FQ_Q2_K] = FQ_NAME(restore_gguf),
    [FQ_Q3_K] = FQ_NAME(restore_gguf),
    [FQ_Q4_K] = FQ_NAME(restore_gguf),
    [FQ_Q5_K] = FQ_NAME(restore_gguf),
    [FQ_Q6_K] = FQ_NAME(restore_gguf),
    [FQ_IQ4_NL] = FQ_NAME(restore_gguf),
    [FQ_MXFP4_GGML] = FQ_NAME(restore_gguf),
    [FQ_ARROWQUANT] = restore_arrowquant,
    [FQ_BNB8] = restore_bnb8,
    [FQ_ONNX] = restore_onnx,
    [FQ_FBGEMM] = restore_fbgemm,
    [FQ_MLX] = restore_mlx,
    [FQ_HQQ] = restore_hqq,
    [FQ_MXFP4] = restore_mxfp4,
    [FQ_MXFP8] = restore_e4m3,
    [FQ_NVFP4] = restore_nvfp4,
};

/* Write n weights from an index on. */
FQ_INLINE void write_span(const fq_job *job, int64_t begin, int64_t n, float *y) {
  if (job->restored_dtype == FQ_F32) {
    char *to = (char *)job->restored + begin * 4;
    if ((char *)y != to)
      memcpy(to, y, (size_t)n * 4);
    return;
  }
  char *to = (char *)job->restored + begin * 2;
  int64_t i = 0;
  for (; i + FQ_LANES <= n; i += FQ_LANES)
    vf_store_f16(to + i * 2, vf_load(y + i));
  if (i < n) {
    char rest[FQ_LANES * 2];
    vf_store_f16(rest, vf_load(y + i));
    memcpy(to + i * 2, rest, (size_t)(n - i) * 2);
  }
}

/* Add the quality sums of n restored weights, as quantize makes them; those at `next` are read after them. */
FQ_INLINE void compare_span(const fq_job *job, int64_t begin, int64_t n, int64_t next, float *y, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN];
  const int64_t padded = round_up(n, FQ_LANES);
  const float *x = load_span(job, begin, n, buffer);
  fetcher fetch = fetch_from(job, next);
  fetch_vectors(&fetch, (uintptr_t)(padded / FQ_LANES / 4 * 3));
  pi highs, lows;
  range_lanes(x, padded, 1, &highs, &lows);
  if (pi_highest(highs) >= FQ_INFINITY_BITS)
    note_bad(x, begin, n, result);
  for (int64_t i = n; i < padded; i++)
    y[i] = 0;
  measure(x, y, padded, &fetch, result);
}

FQ_INLINE void restore_span(const fq_job *job, int64_t begin, int64_t n, int64_t next, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN];
  const int in_place = job->restored && !job->weights && job->restored_dtype == FQ_F32 && n % FQ_LANES == 0;
  float *y = in_place ? (float *)job->restored + begin : buffer;
  restorers[job->family](job, begin, n, y);
  if (job->restored)
    write_span(job, begin, n, y);
  if (job->weights)
    compare_span(job, begin, n, next, y, result);
}

/* A strip of rows with a scale for each block of weights, in the order of quantize_strip. */
static void restore_strip(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  const int64_t cols = job->cols, piece = job->weights ? FQ_PIECE : FQ_SPAN; /* of any length if there are no sums */
  for (int64_t col = 0; col < cols; col += piece) {
    const int64_t width = cols - col < piece ? cols - col : piece;
    for (int64_t at = begin + col; at < end; at += cols)
      restore_span(job, at, width, at + cols, result);
  }
  if (result->first_bad >= 0) { /* in the order of the pieces */
    result->first_bad = -1;
    FQ_NAME(note_bad_weights)(job, begin, end, result);
  }
}

void FQ_NAME(restore)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  if (job->in_blocks) {
    restore_strip(job, begin, end, result);
    return;
  }
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end);
    restore_span(job, at, stop - at, stop, result);
    at = stop;
  }
}
