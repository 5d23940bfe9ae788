/* NEON on arm64: four registers make a vector. */
#include <arm_neon.h>

enum { FQ_PART = 4 };
#define FQ_HAS_FMA 1

typedef float32x4_t pf;
typedef int32x4_t pi;

#define pf_add vaddq_f32
#define pf_sub vsubq_f32
#define pf_mul vmulq_f32
#define pf_div vdivq_f32
#define pf_min vminq_f32
#define pf_max vmaxq_f32
#define pf_fma(a, b, c) vfmaq_f32(c, a, b)
#define pf_fnma(a, b, c) vfmsq_f32(c, a, b)
#define pf_bits vreinterpretq_s32_f32
#define pi_float vreinterpretq_f32_s32
#define pf_nearest vcvtnq_s32_f32
#define pf_truncate vcvtq_s32_f32
#define pi_convert vcvtq_f32_s32
#define pf_set vdupq_n_f32
#define pi_set vdupq_n_s32
#define pf_load(a) vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)(a)))
#define pf_store vst1q_f32
#define pi_add vaddq_s32
#define pi_sub vsubq_s32
#define pi_and vandq_s32
#define pi_or vorrq_s32
#define pi_max vmaxq_s32
#define pi_upper_half(a) vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), 16))
#define pi_highest vmaxvq_s32
#define pi_xor veorq_s32
/* The larger magnitude of each lane; a NaN may be passed over. */
#define pf_max_magnitude(a, b) vmaxq_f32(vabsq_f32(a), b)

/* Lane i of the result is the highest lane of a[i]. */
FQ_INLINE pi pi_highest_each(const pi *a) { return vpmaxq_s32(vpmaxq_s32(a[0], a[1]), vpmaxq_s32(a[2], a[3])); }

FQ_INLINE pf pf_load_f16(const char *a) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)a))); }
FQ_INLINE pf pf_load_bf16(const char *a) {
  return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)a)), 16));
}
FQ_INLINE pf pf_load_f64(const char *a) {
  const float64x2_t low = vreinterpretq_f64_u8(vld1q_u8((const uint8_t *)a));
  const float64x2_t high = vreinterpretq_f64_u8(vld1q_u8((const uint8_t *)a + 16));
  return vcombine_f32(vcvt_f32_f64(low), vcvt_f32_f64(high));
}

/* To 16-bit floats, ties to even. */
FQ_INLINE void pf_store_f16(char *to, pf a) { vst1_u8((uint8_t *)to, vreinterpret_u8_f16(vcvt_f16_f32(a))); }
/* a where test is zero, else b. */
FQ_INLINE pf pf_where_zero(pf test, pf a, pf b) { return vbslq_f32(vceqzq_f32(test), a, b); }

/* 64 int32 as 64 saturated int8, in order. */
FQ_INLINE void pack_64(int8_t *to, const pi *a) {
  for (int quarter = 0; quarter < 4; quarter++, a += 4, to += 16) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(a[0]), vqmovn_s32(a[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(a[2]), vqmovn_s32(a[3]));
    vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
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

/* 32 codes of 0 to 15 as 16 bytes: code i in the low half of byte i, code i + 16 in the high half. */
FQ_INLINE void pack_halves_32(uint8_t *to, const int8_t *codes) {
  vst1q_u8(to, vreinterpretq_u8_s8(vorrq_s8(vld1q_s8(codes), vshlq_n_s8(vld1q_s8(codes + 16), 4))));
}
