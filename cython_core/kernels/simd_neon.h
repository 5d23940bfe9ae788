/* NEON on arm64: four registers make a vector. */
#include <arm_neon.h>

#define FQ_PART_LANES 4
#define FQ_HAS_FMA 1

typedef float32x4_t pf;
typedef int32x4_t pi;

#define pf_add vaddq_f32
#define pf_sub vsubq_f32
#define pf_mul vmulq_f32
#define pf_div vdivq_f32
#define pf_min vminq_f32
#define pf_max vmaxq_f32
#define pf_sqrt vsqrtq_f32
#define pf_fma(a, b, c) vfmaq_f32(c, a, b)
#define pf_fnma(a, b, c) vfmsq_f32(c, a, b)
#define pf_bits vreinterpretq_s32_f32
#define pi_float vreinterpretq_f32_s32
#define pf_nearest vcvtnq_s32_f32
#define pf_truncate vcvtq_s32_f32
#define pi_convert vcvtq_f32_s32
#define pf_set vdupq_n_f32
#define pi_stream(to, a) vst1q_s32((int32_t *)(to), a) /* its compilers have none past the caches */
#define streams_end() ((void)0)
#define pi_set vdupq_n_s32
#define pf_load(a) vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)(a)))
#define pf_store vst1q_f32
#define pi_add vaddq_s32
#define pi_sub vsubq_s32
#define pi_and vandq_s32
#define pi_or vorrq_s32
#define pi_max vmaxq_s32
#define pi_max_unsigned(a, b) vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)))
#define pi_max_halves(a, b) vreinterpretq_s32_s16(vmaxq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)))
#define pi_max_unsigned_halves(a, b)                                                                                   \
  vreinterpretq_s32_u16(vmaxq_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b)))
#define pi_min vminq_s32
#define pi_upper_half(a) vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), 16))
#define pi_shift_right vshrq_n_s32 /* copies of the sign come in from the left */
#define pi_shift_left vshlq_n_s32
#define pi_highest vmaxvq_s32
#define pi_xor veorq_s32
/* The bits of a where the mask's are set. */
#define pi_choose(mask, a, b) vbslq_s32(vreinterpretq_u32_s32(mask), a, b)

/* Of parts a and b, groups of so many lanes: every second one of each, those of b beside those of a, and the others
 * likewise in the same places. */
FQ_INLINE void pi_neighbours_1(pi a, pi b, pi *stay, pi *come) {
  *stay = vtrn1q_s32(a, b);
  *come = vtrn2q_s32(a, b);
}
FQ_INLINE void pi_neighbours_2(pi a, pi b, pi *stay, pi *come) {
  *stay = vreinterpretq_s32_s64(vtrn1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  *come = vreinterpretq_s32_s64(vtrn2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

FQ_INLINE pf pf_load_f16(const char *a) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)a))); }
FQ_INLINE pf pf_load_bf16(const char *a) {
  return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)a)), 16));
}
FQ_INLINE pf pf_load_f64(const char *a) {
  const float64x2_t low = vreinterpretq_f64_u8(vld1q_u8((const uint8_t *)a));
  const float64x2_t high = vreinterpretq_f64_u8(vld1q_u8((const uint8_t *)a + 16));
  return vcombine_f32(vcvt_f32_f64(low), vcvt_f32_f64(high));
}

FQ_INLINE pi pi_load_i8(const int8_t *a) {
  int32_t four;
  memcpy(&four, a, sizeof four);
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}

/* To 16-bit floats, ties to even. */
FQ_INLINE void pf_store_f16(char *to, pf a) { vst1_u8((uint8_t *)to, vreinterpret_u8_f16(vcvt_f16_f32(a))); }
/* a where test is zero, else b. */
FQ_INLINE pf pf_where_zero(pf test, pf a, pf b) { return vbslq_f32(vceqzq_f32(test), a, b); }
/* x where a < b, else y, of a NaN too. */
FQ_INLINE pf pf_where_less(pf a, pf b, pf x, pf y) { return vbslq_f32(vcltq_f32(a, b), x, y); }

/* 64 int32 as 64 saturated int8, in order. */
FQ_INLINE int8x16_t bytes_16(const pi *a) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(a[0]), vqmovn_s32(a[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(a[2]), vqmovn_s32(a[3]));
  return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}
FQ_INLINE void pack_64(int8_t *to, const pi *a) {
  for (int quarter = 0; quarter < 4; quarter++)
    vst1q_s8(to + quarter * 16, bytes_16(a + quarter * 4));
}
/* Held between two bounds, moreover. */
FQ_INLINE void pack_64_within(int8_t *to, const pi *a, int8_t low, int8_t high) {
  for (int quarter = 0; quarter < 4; quarter++) {
    const int8x16_t held = vminq_s8(bytes_16(a + quarter * 4), vdupq_n_s8(high));
    vst1q_s8(to + quarter * 16, vmaxq_s8(held, vdupq_n_s8(low)));
  }
}

/* 64 codes of -8 to 7, plus 8, as 32 bytes: code 2i in the low half of byte i, code 2i + 1 in the high half. */
FQ_INLINE void pack_nibbles_64(uint8_t *to, const int8_t *codes) {
  for (int half = 0; half < 2; half++, codes += 32, to += 16) {
    const int8x16x2_t pair = vld2q_s8(codes);
    const int8x16_t low = vaddq_s8(pair.val[0], vdupq_n_s8(8)), high = vaddq_s8(pair.val[1], vdupq_n_s8(8));
    vst1q_u8(to, vreinterpretq_u8_s8(vorrq_s8(low, vshlq_n_s8(high, 4))));
  }
}

/* 64 codes of -2 to 1, plus 2, as 16 bytes: code 4i in the lowest two bits of byte i, code 4i + 3 in the highest. */
FQ_INLINE void pack_quarters_64(uint8_t *to, const int8_t *codes) {
  const int8x16x4_t four = vld4q_s8(codes);
  int8x16_t r = vaddq_s8(four.val[0], vdupq_n_s8(2));
  for (int i = 1; i < 4; i++)
    r = vorrq_s8(r, vshlq_s8(vaddq_s8(four.val[i], vdupq_n_s8(2)), vdupq_n_s8((int8_t)(2 * i))));
  vst1q_u8(to, vreinterpretq_u8_s8(r));
}

/* How many of 15 bounds (from the second on, in any order) lie below each lane. */
FQ_INLINE pi pf_count_below(pf a, const fq_bounds *bounds) {
  int32x4_t count = vdupq_n_s32(0);
  for (int k = 1; k < 16; k++)
    count = vsubq_s32(count, vreinterpretq_s32_u32(vcgtq_f32(a, vdupq_n_f32(bounds->heap[k]))));
  return count;
}
FQ_INLINE pf pi_lookup_16(pi index, const float *values) {
  const uint8x16x4_t table = {{vreinterpretq_u8_f32(vld1q_f32(values)), vreinterpretq_u8_f32(vld1q_f32(values + 4)),
                               vreinterpretq_u8_f32(vld1q_f32(values + 8)),
                               vreinterpretq_u8_f32(vld1q_f32(values + 12))}};
  const int32x4_t bytes = vmlaq_s32(vdupq_n_s32(0x03020100), index, vdupq_n_s32(0x04040404));
  return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_s32(bytes)));
}

/* 64 codes, looked up at indices of 0 to 15, as 32 bytes: code 2i in the high half of byte i, 2i + 1 in the low. */
FQ_INLINE void pack_high_first_64(uint8_t *to, const int8_t *indices, const uint8_t *codes) {
  const uint8x16_t table = vld1q_u8(codes);
  for (int half = 0; half < 2; half++, indices += 32, to += 16) {
    const int8x16x2_t pair = vld2q_s8(indices);
    const uint8x16_t high = vqtbl1q_u8(table, vreinterpretq_u8_s8(pair.val[0]));
    const uint8x16_t low = vqtbl1q_u8(table, vreinterpretq_u8_s8(pair.val[1]));
    vst1q_u8(to, vorrq_u8(vshlq_n_u8(high, 4), low));
  }
}

/* 32 codes of 0 to 15 as 16 bytes: code i in the low half of byte i, code i + 16 in the high half. */
FQ_INLINE void pack_halves_32(uint8_t *to, const int8_t *codes) {
  vst1q_u8(to, vreinterpretq_u8_s8(vorrq_s8(vld1q_s8(codes), vshlq_n_s8(vld1q_s8(codes + 16), 4))));
}

/* Bit 4 of 32 codes of 0 to 31: that of code i in bit i. */
FQ_INLINE uint32_t pack_high_bits_32(const int8_t *codes) {
  const uint8x16_t place = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)), bit = vdupq_n_u8(16);
  const uint8x16_t low = vandq_u8(vtstq_u8(vreinterpretq_u8_s8(vld1q_s8(codes)), bit), place);
  const uint8x16_t high = vandq_u8(vtstq_u8(vreinterpretq_u8_s8(vld1q_s8(codes + 16)), bit), place);
  uint8x16_t sums = vpaddq_u8(low, high); /* three rounds add up the eight bits of each byte */
  sums = vpaddq_u8(sums, sums);
  return vgetq_lane_u32(vreinterpretq_u32_u8(vpaddq_u8(sums, sums)), 0);
}

/* 64 indices of 0 to 15 become what a table has there. */
FQ_INLINE void lookup_64(int8_t *codes, const uint8_t *table) {
  for (int i = 0; i < 64; i += 16)
    vst1q_s8(codes + i, vreinterpretq_s8_u8(vqtbl1q_u8(vld1q_u8(table), vreinterpretq_u8_s8(vld1q_s8(codes + i)))));
}

/* Elements 0 to 3 of so many rows as a part has lanes, that far apart: element i of every row in to[i]. */
FQ_INLINE void pf_load_columns(const float *x, int64_t apart, pf *to) {
  float64x2_t even[2], odd[2]; /* elements 0 and 2, 1 and 3, of rows 0 and 1, and 2 and 3 */
  for (int i = 0; i < 2; i++, x += 2 * apart) {
    const float32x4_t a = pf_load(x), b = pf_load(x + apart);
    even[i] = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
    odd[i] = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  }
  to[0] = vreinterpretq_f32_f64(vtrn1q_f64(even[0], even[1]));
  to[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd[0], odd[1]));
  to[2] = vreinterpretq_f32_f64(vtrn2q_f64(even[0], even[1]));
  to[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd[0], odd[1]));
}

/* The lanes where a < b, as bits. */
FQ_INLINE uint32_t pf_bits_less(pf a, pf b) {
  const uint32x4_t place = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcltq_f32(a, b), place));
}
