/* Weights again from packed bytes, scales and zero points, in the arithmetic of the reference (flightquant/reference):
 * the numbers that the quality columns are made of. Whatever the bytes are, nothing here is undefined. */
#include "dynamic_map.h"
#include "families.h"

/* n weights from an index on, as float32; up to 63 more are unspecified. */
typedef void span_restorer(const fq_job *job, int64_t begin, int64_t n, float *y);
/* 16 codes as float32, before their scale. */
typedef vf decoder(const int8_t *codes);

FQ_INLINE float float_at(const float *at, int64_t index) {
  float value;
  memcpy(&value, at + index, sizeof value);
  return value;
}

/* Codes, 64 past the span's end included, to values: (code - zero) * scale, unit by unit. */
FQ_INLINE void scale_units(const fq_job *job, int64_t begin, int64_t n, const int8_t *codes, decoder *decode,
                           float *y) {
  int64_t which = job->shared_scale ? 0 : begin / job->unit;
  int64_t stop = job->shared_scale ? n : (which + 1) * job->unit - begin;
  for (int64_t i = 0; i < n; which++, stop += job->unit) {
    const int64_t end = stop < n ? stop : n;
    const vf scale = vf_set(float_at(job->scales, which));
    if (job->zeros) {
      const vf zero = vf_set(float_at(job->zeros, which));
      for (; i < end; i += FQ_LANES)
        vf_store(y + i, vf_mul(vf_sub(decode(codes + i), zero), scale));
    } else {
      for (; i < end; i += FQ_LANES)
        vf_store(y + i, vf_mul(decode(codes + i), scale));
    }
  }
}

/* Whole bytes: where they lie, or in the buffer if a vector would reach past them. */
FQ_INLINE const int8_t *load_bytes(const uint8_t *from, int64_t n, int8_t *buffer) {
  if (n % FQ_LANES == 0)
    return (const int8_t *)from;
  memcpy(buffer, from, (size_t)n);
  return buffer;
}

FQ_INLINE vf signed_byte(const int8_t *codes) { return vi_convert(vi_load_i8(codes)); }
FQ_INLINE vf unsigned_byte(const int8_t *codes) { return vi_convert(vi_and(vi_load_i8(codes), vi_set(255))); }

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

static void restore_integer(const fq_job *job, int64_t begin, int64_t n, float *y) {
  int8_t buffer[FQ_SPAN + FQ_STEP];
  const int8_t *codes = buffer;
  const uint8_t *from = job->data + begin / job->cols * job->row_bytes + begin % job->cols * job->bits / 8;
  memset(buffer + n, 0, FQ_STEP);
  switch (job->bits) {
  case 8:
    codes = load_bytes(from, n, buffer);
    break;
  case 7:
    unpack_stream(from, n, 7, buffer);
    break;
  case 6:
    unpack_stream(from, n, 6, buffer);
    break;
  case 5:
    unpack_stream(from, n, 5, buffer);
    break;
  case 4:
    unpack_stream(from, n, 4, buffer);
    break;
  case 3:
    unpack_stream(from, n, 3, buffer);
    break;
  default:
    unpack_stream(from, n, 2, buffer);
  }
  scale_units(job, begin, n, codes, signed_byte, y);
}

/* As those, but for 8 bits: codes from 0 up. */
static void restore_onnx(const fq_job *job, int64_t begin, int64_t n, float *y) {
  if (job->bits != 8) {
    restore_integer(job, begin, n, y);
    return;
  }
  int8_t codes[FQ_SPAN + FQ_STEP] = {0};
  memcpy(codes, job->data + begin, (size_t)n);
  for (int64_t i = 0; i < n; i++)
    codes[i] = (int8_t)((uint8_t)codes[i] ^ 0x80);
  scale_units(job, begin, n, codes, signed_byte, y);
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

/* ggml's blocks: a float16 scale, a minimum if there is one, fifth bits if there are, 32 codes. */
typedef struct {
  int bits, minimum;
  float middle;
} block_format;

/* Bit i of a byte in byte i, as 0 or 16. */
FQ_INLINE uint64_t spread_bits(uint8_t byte) {
  const uint64_t bytes = UINT64_C(0x0101010101010101);
  const uint64_t each = byte * bytes & UINT64_C(0x8040201008040201);
  return ((each + bytes * 127) >> 3) & (bytes << 4);
}

FQ_INLINE void unpack_block(const uint8_t *from, int bits, int8_t *codes) {
  const uint8_t *nibbles = bits == 5 ? from + 4 : from;
  for (int i = 0; i < FQ_BLOCK / 2; i++) {
    codes[i] = (int8_t)(nibbles[i] & 15);
    codes[i + FQ_BLOCK / 2] = (int8_t)(nibbles[i] >> 4);
  }
  for (int i = 0; bits == 5 && i < 4; i++) {
    uint64_t v;
    memcpy(&v, codes + 8 * i, sizeof v);
    v |= spread_bits(from[i]);
    memcpy(codes + 8 * i, &v, sizeof v);
  }
}

FQ_INLINE void restore_blocks(const fq_job *job, block_format f, int64_t begin, int64_t n, float *y) {
  const int64_t head = f.minimum ? 4 : 2, size = head + FQ_BLOCK / 8 * f.bits, blocks = n / FQ_BLOCK;
  const uint8_t *from = job->data + begin / FQ_BLOCK * size;
  char halves[2][FQ_BLOCKS * 2] = {{0}};
  float scale[FQ_BLOCKS], least[FQ_BLOCKS];
  for (int64_t b = 0; b < blocks; b++) {
    memcpy(halves[0] + b * 2, from + b * size, 2);
    if (f.minimum)
      memcpy(halves[1] + b * 2, from + b * size + 2, 2);
  }
  for (int64_t b = 0; b < blocks; b += FQ_LANES) {
    vf_store(scale + b, vf_load_f16(halves[0] + b * 2));
    if (f.minimum)
      vf_store(least + b, vf_load_f16(halves[1] + b * 2));
  }
  for (int64_t b = 0; b < blocks; b++, from += size, y += FQ_BLOCK) {
    int8_t unpacked[FQ_BLOCK];
    const int8_t *codes = unpacked;
    if (f.bits == 8)
      codes = (const int8_t *)from + head;
    else
      unpack_block(from + head, f.bits, unpacked);
    for (int i = 0; i < FQ_BLOCK; i += FQ_LANES) {
      vf level = signed_byte(codes + i);
      if (f.middle != 0)
        level = vf_sub(level, vf_set(f.middle));
      const vf scaled = vf_mul(level, vf_set(scale[b]));
      vf_store(y + i, f.minimum ? vf_add(scaled, vf_set(least[b])) : scaled);
    }
  }
}

#define FQ_RESTORE_BLOCKS(name, bits, minimum, middle)                                                                 \
  static void restore_##name(const fq_job *job, int64_t begin, int64_t n, float *y) {                                  \
    restore_blocks(job, (block_format){bits, minimum, middle}, begin, n, y);                                           \
  }
FQ_RESTORE_BLOCKS(q8_0, 8, 0, 0)
FQ_RESTORE_BLOCKS(q4_0, 4, 0, 8)
FQ_RESTORE_BLOCKS(q4_1, 4, 1, 0)
FQ_RESTORE_BLOCKS(q5_0, 5, 0, 16)
FQ_RESTORE_BLOCKS(q5_1, 5, 1, 0)

/* A family that is not here is restored by the reference (cython_core/restore.py). */
static span_restorer *const restorers[] = {
    [FQ_INTEGER] = restore_integer,
    [FQ_FP8_E4M3] = restore_e4m3,
    [FQ_FP8_E5M2] = restore_e5m2,
    [FQ_NF4] = restore_nf4,
    [FQ_FP4] = restore_fp4,
    [FQ_Q8_0] = restore_q8_0,
    [FQ_Q4_0] = restore_q4_0,
    [FQ_Q4_1] = restore_q4_1,
    [FQ_Q5_0] = restore_q5_0,
    [FQ_Q5_1] = restore_q5_1,
    [FQ_ARROWQUANT] = restore_arrowquant,
    [FQ_BNB8] = restore_bnb8,
    [FQ_ONNX] = restore_onnx,
};

int FQ_NAME(restores)(int32_t family) {
  return family >= 0 && (size_t)family < sizeof restorers / sizeof restorers[0] && restorers[family];
}

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

/* Add the quality sums of n restored weights, as quantize makes them. */
FQ_INLINE void compare_span(const fq_job *job, int64_t begin, int64_t n, float *y, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN];
  const int64_t padded = round_up(n, FQ_LANES);
  const float *x = load_span(job, begin, n, buffer);
  fetcher next = fetch_from(job, begin + n);
  pi highs, lows;
  range_lanes(&next, x, padded, 1, &highs, &lows);
  if (pi_highest(highs) >= FQ_INFINITY_BITS)
    note_bad(x, begin, n, result);
  for (int64_t i = n; i < padded; i++)
    y[i] = 0;
  measure(x, y, padded, &next, result);
}

void FQ_NAME(restore)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN];
  span_restorer *const restorer = restorers[job->family];
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at;
    const int in_place = job->restored && !job->weights && job->restored_dtype == FQ_F32 && n % FQ_LANES == 0;
    float *y = in_place ? (float *)job->restored + at : buffer;
    restorer(job, at, n, y);
    if (job->restored)
      write_span(job, at, n, y);
    if (job->weights)
      compare_span(job, at, n, y, result);
    at = stop;
  }
}
