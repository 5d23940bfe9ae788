/* x86-64-v2 (up to SSE4.2): four registers make a vector; no fused multiply-add, no conversion of float16. */
#include <immintrin.h>

enum { FQ_PART = 4 };

typedef __m128 pf;
typedef __m128i pi;

#define pf_add _mm_add_ps
#define pf_sub _mm_sub_ps
#define pf_mul _mm_mul_ps
#define pf_div _mm_div_ps
#define pf_min _mm_min_ps
#define pf_max _mm_max_ps
#define pf_bits _mm_castps_si128
#define pi_float _mm_castsi128_ps
#define pf_nearest _mm_cvtps_epi32
#define pf_truncate _mm_cvttps_epi32
#define pi_convert _mm_cvtepi32_ps
#define pf_set _mm_set1_ps
#define pi_set _mm_set1_epi32
#define pf_load _mm_loadu_ps
#define pf_store _mm_storeu_ps
#define pi_add _mm_add_epi32
#define pi_sub _mm_sub_epi32
#define pi_and _mm_and_si128
#define pi_or _mm_or_si128
#define pi_max _mm_max_epi32
#define pi_upper_half(a) _mm_srli_epi32(a, 16)

FQ_INLINE int32_t pi_highest(pi a) {
  a = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}
#define pi_xor _mm_xor_si128
/* The larger magnitude of each lane; a NaN may be passed over. */
#define pf_max_magnitude(a, b) _mm_max_ps(_mm_andnot_ps(_mm_set1_ps(-0.0f), a), b)

/* Lane i of the result is the highest lane of a[i]. */
FQ_INLINE pi pi_highest_each(const pi *a) {
  pi r[2];
  for (int i = 0; i < 2; i++)
    r[i] = _mm_max_epi32(_mm_blend_epi16(a[2 * i], a[2 * i + 1], 0xcc),
                         _mm_shuffle_epi32(_mm_blend_epi16(a[2 * i], a[2 * i + 1], 0x33), 0xb1));
  return _mm_max_epi32(_mm_blend_epi16(r[0], r[1], 0xf0), _mm_shuffle_epi32(_mm_blend_epi16(r[0], r[1], 0x0f), 0x4e));
}

/* The exponent is moved by a multiplication with 2^112, which is exact and also makes denormals right. */
FQ_INLINE pf pf_load_f16(const char *a) {
  const __m128i half = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)a));
  const __m128i magnitude = _mm_slli_epi32(_mm_and_si128(half, _mm_set1_epi32(0x7fff)), 13);
  const __m128i sign = _mm_slli_epi32(_mm_and_si128(half, _mm_set1_epi32(0x8000)), 16);
  const __m128i special = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x0f7fffff)); /* infinity and NaN */
  const __m128 scaled = _mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0x1p112f));
  const __m128i extra = _mm_or_si128(sign, _mm_and_si128(special, _mm_set1_epi32(0x7f800000)));
  return _mm_or_ps(scaled, _mm_castsi128_ps(extra));
}
FQ_INLINE pf pf_load_bf16(const char *a) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)a)), 16));
}
FQ_INLINE pf pf_load_f64(const char *a) {
  const __m128 low = _mm_cvtpd_ps(_mm_loadu_pd((const double *)a));
  return _mm_movelh_ps(low, _mm_cvtpd_ps(_mm_loadu_pd((const double *)(a + 16))));
}

/* To 16-bit floats, ties to even. */
FQ_INLINE void pf_store_f16(char *to, pf a) {
  const __m128i bits = _mm_castps_si128(a), magnitude = _mm_and_si128(bits, _mm_set1_epi32(0x7fffffff));
  const __m128i sign = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(0x8000));
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(magnitude, 13), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(_mm_add_epi32(magnitude, _mm_set1_epi32(0xfff - 0x38000000)), odd);
  __m128i half = _mm_srli_epi32(rounded, 13);
  /* Below 2^-14 a half counts units of 2^-24, which is the last place of a float32 between 0.5 and 1. */
  const __m128 shifted = _mm_add_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0.5f));
  const __m128i denormal = _mm_sub_epi32(_mm_castps_si128(shifted), _mm_set1_epi32(0x3f000000));
  half = _mm_blendv_epi8(half, denormal, _mm_cmpgt_epi32(_mm_set1_epi32(0x38800000), magnitude));
  half = _mm_blendv_epi8(half, _mm_set1_epi32(0x7c00), _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x477fefff)));
  half = _mm_blendv_epi8(half, _mm_set1_epi32(0x7e00), _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7f800000)));
  half = _mm_or_si128(half, sign);
  _mm_storel_epi64((__m128i *)to, _mm_packus_epi32(half, half));
}
/* a where test is zero, else b. */
FQ_INLINE pf pf_where_zero(pf test, pf a, pf b) { return _mm_blendv_ps(b, a, _mm_cmpeq_ps(test, _mm_setzero_ps())); }

/* 64 int32 as 64 saturated int8, in order. */
FQ_INLINE void pack_64(int8_t *to, const pi *a) {
  for (int quarter = 0; quarter < 4; quarter++, a += 4, to += 16)
    _mm_storeu_si128((__m128i *)to, _mm_packs_epi16(_mm_packs_epi32(a[0], a[1]), _mm_packs_epi32(a[2], a[3])));
}

/* 64 codes of -8 to 7, plus 8, as 32 bytes: code 2i in the low half of byte i, code 2i + 1 in the high half. */
FQ_INLINE void pack_nibbles_64(uint8_t *to, const int8_t *codes) {
  const __m128i weights = _mm_set1_epi16(0x1001);
  for (int half = 0; half < 2; half++, codes += 32, to += 16) {
    const __m128i first = _mm_add_epi8(_mm_loadu_si128((const __m128i *)codes), _mm_set1_epi8(8));
    const __m128i second = _mm_add_epi8(_mm_loadu_si128((const __m128i *)(codes + 16)), _mm_set1_epi8(8));
    const __m128i low = _mm_maddubs_epi16(first, weights), high = _mm_maddubs_epi16(second, weights);
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi16(low, high));
  }
}

/* 32 codes of 0 to 15 as 16 bytes: code i in the low half of byte i, code i + 16 in the high half. */
FQ_INLINE void pack_halves_32(uint8_t *to, const int8_t *codes) {
  const __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_loadu_si128((const __m128i *)(codes + 16));
  _mm_storeu_si128((__m128i *)to, _mm_or_si128(low, _mm_slli_epi16(high, 4)));
}
