/* Weights again from ggml's blocks, in the arithmetic of the reference (flightquant/reference/gguf.py, kquants.py). */
#include "dequantize.h"

enum { SUPER = 256, SUB = 16, SUBS = SUPER / SUB, SUPERS = FQ_SPAN / SUPER };

/* The float16 at one place of each of so many blocks (rounded up to whole vectors), as float32. */
FQ_INLINE void load_halves(const uint8_t *from, int64_t size, int64_t blocks, float *to) {
  char halves[FQ_BLOCKS * 2] = {0};
  for (int64_t b = 0; b < blocks; b++)
    memcpy(halves + b * 2, from + b * size, 2);
  for (int64_t b = 0; b < blocks; b += FQ_LANES)
    vf_store(to + b, vf_load_f16(halves + b * 2));
}

/* ggml's blocks: a float16 scale or, in one byte, a power of two, a minimum if there is one, fifth bits if there are,
 * 32 codes. */
typedef struct {
  int bits, head;
  float middle;
  decoder *decode;
} block_format;

/* Bit i of a byte in byte i, as 0 or 16. */
FQ_INLINE uint64_t spread_bits(uint8_t byte) {
  const uint64_t bytes = UINT64_C(0x0101010101010101);
  const uint64_t each = byte * bytes & UINT64_C(0x8040201008040201);
  return ((each + bytes * 127) >> 3) & (bytes << 4);
}

FQ_INLINE void unpack_block(const uint8_t *from, int bits, int8_t *codes) {
  unstack(bits == 5 ? from + 4 : from, FQ_BLOCK / 2, 4, codes);
  for (int i = 0; bits == 5 && i < 4; i++) {
    uint64_t v;
    memcpy(&v, codes + 8 * i, sizeof v);
    v |= spread_bits(from[i]);
    memcpy(codes + 8 * i, &v, sizeof v);
  }
}

/* 2^(e - 128). */
FQ_INLINE float half_power(int e) {
  const int32_t bits = e < 2 ? 0x00200000 << e : (e - 1) << 23;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FQ_INLINE void restore_blocks(const fq_job *job, block_format f, int64_t begin, int64_t n, float *y) {
  const int64_t size = f.head + FQ_BLOCK / 8 * f.bits, blocks = n / FQ_BLOCK;
  const uint8_t *from = job->data + begin / FQ_BLOCK * size;
  const int minimum = f.head == 4;
  _Alignas(64) float scale[FQ_BLOCKS], least[FQ_BLOCKS];
  if (f.head == 1) {
    for (int64_t b = 0; b < blocks; b++)
      scale[b] = half_power(from[b * size]);
  } else {
    load_halves(from, size, blocks, scale);
  }
  if (minimum)
    load_halves(from + 2, size, blocks, least);
  for (int64_t b = 0; b < blocks; b++, from += size, y += FQ_BLOCK) {
    int8_t unpacked[FQ_BLOCK];
    const int8_t *codes = unpacked;
    if (f.bits == 8)
      codes = (const int8_t *)from + f.head;
    else
      unpack_block(from + f.head, f.bits, unpacked);
    for (int i = 0; i < FQ_BLOCK; i += FQ_LANES) {
      vf level = f.decode(codes + i);
      if (f.middle != 0)
        level = vf_sub(level, vf_set(f.middle));
      const vf scaled = vf_mul(level, vf_set(scale[b]));
      vf_store(y + i, minimum ? vf_add(scaled, vf_set(least[b])) : scaled);
    }
  }
}

static const float iq4_nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const float mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
FQ_INLINE vf iq4_nl(const int8_t *codes) { return vi_lookup_16(vi_load_i8(codes), iq4_nl_values); }
FQ_INLINE vf mxfp4(const int8_t *codes) { return vi_lookup_16(vi_load_i8(codes), mxfp4_values); }

/* A block of 256 weights: codes, and factors of the scale and of the minimum of each 16 or 32 of them. */
typedef struct {
  int8_t codes[SUPER], steps[SUBS], least[SUBS];
} super_parts;

typedef struct {
  int size, at; /* of its bytes; where the float16 scale stands, behind which that of minima may follow */
  int sub, minimum;
  float middle;
  void (*split)(const uint8_t *from, super_parts *p);
} super_format;

/* More bits of the codes, above those that they have. */
FQ_INLINE void add_upper(const int8_t *upper, int shift, int8_t *codes) {
  for (int i = 0; i < SUPER; i += 8) {
    uint64_t low, high;
    memcpy(&low, codes + i, sizeof low);
    memcpy(&high, upper + i, sizeof high);
    low |= high << shift;
    memcpy(codes + i, &low, sizeof low);
  }
}

FQ_INLINE void unstack_2(const uint8_t *from, int8_t *codes) {
  for (int half = 0; half < 2; half++)
    unstack(from + 32 * half, 32, 2, codes + 128 * half);
}

FQ_INLINE void split_q2_k(const uint8_t *from, super_parts *p) {
  int8_t nibbles[2 * SUBS];
  unstack(from, SUBS, 4, nibbles);
  memcpy(p->steps, nibbles, SUBS);
  memcpy(p->least, nibbles + SUBS, SUBS);
  unstack_2(from + 16, p->codes);
}

FQ_INLINE void split_q3_k(const uint8_t *from, super_parts *p) {
  int8_t upper[SUPER], high[SUBS];
  unstack_2(from + 32, p->codes);
  unstack(from, 32, 1, upper);
  add_upper(upper, 2, p->codes);
  unstack(from + 96, SUBS / 2, 4, p->steps);
  unstack(from + 104, SUBS / 4, 2, high);
  for (int i = 0; i < SUBS; i++)
    p->steps[i] = (int8_t)((p->steps[i] | high[i] << 4) - 32);
}

/* 8 factors of 6 bits of each kind in 12 bytes. */
FQ_INLINE void split_6(const uint8_t *from, super_parts *p) {
  uint32_t a[3];
  memcpy(a, from, sizeof a);
  const uint32_t lowest = UINT32_C(0x0f0f0f0f), six = UINT32_C(0x3f3f3f3f), two = UINT32_C(0x30303030);
  const uint32_t steps[2] = {a[0] & six, (a[2] & lowest) | (a[0] >> 2 & two)};
  const uint32_t least[2] = {a[1] & six, (a[2] >> 4 & lowest) | (a[1] >> 2 & two)};
  memset(p->steps + 8, 0, 8);
  memset(p->least + 8, 0, 8);
  memcpy(p->steps, steps, sizeof steps);
  memcpy(p->least, least, sizeof least);
}

FQ_INLINE void split_q4_k(const uint8_t *from, super_parts *p) {
  split_6(from + 4, p);
  for (int part = 0; part < 4; part++)
    unstack(from + 16 + 32 * part, 32, 4, p->codes + 64 * part);
}

FQ_INLINE void split_q5_k(const uint8_t *from, super_parts *p) {
  int8_t upper[SUPER];
  split_6(from + 4, p);
  for (int part = 0; part < 4; part++)
    unstack(from + 48 + 32 * part, 32, 4, p->codes + 64 * part);
  unstack(from + 16, 32, 1, upper);
  add_upper(upper, 4, p->codes);
}

FQ_INLINE void split_q6_k(const uint8_t *from, super_parts *p) {
  int8_t upper[SUPER];
  for (int half = 0; half < 2; half++)
    unstack(from + 64 * half, 64, 4, p->codes + 128 * half);
  unstack_2(from + 128, upper);
  add_upper(upper, 4, p->codes);
  memcpy(p->steps, from + 192, SUBS);
}

FQ_INLINE void restore_supers(const fq_job *job, super_format f, int64_t begin, int64_t n, float *y) {
  const int64_t blocks = n / SUPER;
  const uint8_t *from = job->data + begin / SUPER * f.size;
  _Alignas(64) float unit[FQ_LANES], least_unit[FQ_LANES], scale[SUBS], least[SUBS];
  super_parts p;
  load_halves(from + f.at, f.size, blocks, unit);
  if (f.minimum)
    load_halves(from + f.at + 2, f.size, blocks, least_unit);
  for (int64_t b = 0; b < blocks; b++, from += f.size, y += SUPER) {
    f.split(from, &p);
    vf_store(scale, vf_mul(vf_set(unit[b]), signed_byte(p.steps)));
    if (f.minimum)
      vf_store(least, vf_mul(vf_set(least_unit[b]), signed_byte(p.least)));
    for (int i = 0; i < SUPER; i += FQ_LANES) {
      const vf code = signed_byte(p.codes + i), factor = vf_set(scale[i / f.sub]);
      if (f.minimum)
        vf_store(y + i, vf_sub(vf_mul(factor, code), vf_set(least[i / f.sub])));
      else
        vf_store(y + i, vf_mul(factor, vf_sub(code, vf_set(f.middle))));
    }
  }
}

void FQ_NAME(restore_gguf)(const fq_job *job, int64_t begin, int64_t n, float *y) {
  switch (job->family) {
  case FQ_Q8_0:
    restore_blocks(job, (block_format){8, 2, 0, signed_byte}, begin, n, y);
    break;
  case FQ_Q4_0:
    restore_blocks(job, (block_format){4, 2, 8, signed_byte}, begin, n, y);
    break;
  case FQ_Q4_1:
    restore_blocks(job, (block_format){4, 4, 0, signed_byte}, begin, n, y);
    break;
  case FQ_Q5_0:
    restore_blocks(job, (block_format){5, 2, 16, signed_byte}, begin, n, y);
    break;
  case FQ_Q5_1:
    restore_blocks(job, (block_format){5, 4, 0, signed_byte}, begin, n, y);
    break;
  case FQ_IQ4_NL:
    restore_blocks(job, (block_format){4, 2, 0, iq4_nl}, begin, n, y);
    break;
  case FQ_MXFP4_GGML:
    restore_blocks(job, (block_format){4, 1, 0, mxfp4}, begin, n, y);
    break;
  case FQ_Q2_K:
    restore_supers(job, (super_format){84, 80, 16, 1, 0, split_q2_k}, begin, n, y);
    break;
  case FQ_Q3_K:
    restore_supers(job, (super_format){110, 108, 16, 0, 4, split_q3_k}, begin, n, y);
    break;
  case FQ_Q4_K:
    restore_supers(job, (super_format){144, 0, 32, 1, 0, split_q4_k}, begin, n, y);
    break;
  case FQ_Q5_K:
    restore_supers(job, (super_format){176, 0, 32, 1, 0, split_q5_k}, begin, n, y);
    break;
  default:
    restore_supers(job, (super_format){210, 208, 16, 0, 32, split_q6_k}, begin, n, y);
  }
}
