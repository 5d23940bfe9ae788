/* x86-64-v2 (up to SSE4.2): four registers make a vector; no fused multiply-add, no conversion of float16. */
#include <immintrin.h>

#define FQ_PART_LANES 4

typedef __m128 pf;
typedef __m128i pi;

#define pf_add _mm_add_ps
#define pf_sub _mm_sub_ps
#define pf_mul _mm_mul_ps
#define pf_div _mm_div_ps
#define pf_min _mm_min_ps
#define pf_max _mm_max_ps
#define pf_sqrt _mm_sqrt_ps
#define pf_bits _mm_castps_si128
#define pi_float _mm_castsi128_ps
#define pf_nearest _mm_cvtps_epi32
#define pf_truncate _mm_cvttps_epi32
#define pi_convert _mm_cvtepi32_ps
#define pf_set _mm_set1_ps
#define pi_stream(to, a) _mm_stream_si128((__m128i *)(to), a) /* past the caches, to an aligned address */
#define streams_end _mm_sfence
#define pi_set _mm_set1_epi32
#define pf_load _mm_loadu_ps
#define pf_store _mm_storeu_ps
#define pi_add _mm_add_epi32
#define pi_sub _mm_sub_epi32
#define pi_and _mm_and_si128
#define pi_or _mm_or_si128
#define pi_max _mm_max_epi32
#define pi_max_unsigned _mm_max_epu32
#define pi_max_halves _mm_max_epi16
#define pi_max_unsigned_halves _mm_max_epu16
#define pi_min _mm_min_epi32
#define pi_upper_half(a) _mm_srli_epi32(a, 16)
#define pi_shift_right(a, n) _mm_srai_epi32(a, n) /* copies of the sign come in from the left */
#define pi_shift_left _mm_slli_epi32

FQ_INLINE int32_t pi_highest(pi a) {
  a = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}
#define pi_xor _mm_xor_si128
/* The bits of a where the mask's are set. */
#define pi_choose(mask, a, b) _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b))

FQ_INLINE pi pi_load_i8(const int8_t *a) {
  int32_t four;
  memcpy(&four, a, sizeof four);
  return _mm_cvtepi8_epi32(_mm_cvtsi32_si128(four));
}

/* Of parts a and b, groups of so many lanes: every second one of each, those of b beside those of a, and the others
 * likewise in the same places. */
FQ_INLINE void pi_neighbours_1(pi a, pi b, pi *stay, pi *come) {
  *stay = _mm_blend_epi16(a, b, 0xcc);
  *come = _mm_shuffle_epi32(_mm_blend_epi16(a, b, 0x33), 0xb1);
}
FQ_INLINE void pi_neighbours_2(pi a, pi b, pi *stay, pi *come) {
  *stay = _mm_unpacklo_epi64(a, b);
  *come = _mm_unpackhi_epi64(a, b);
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
/* x where a < b, else y, of a NaN too. */
FQ_INLINE pf pf_where_less(pf a, pf b, pf x, pf y) { return _mm_blendv_ps(y, x, _mm_cmplt_ps(a, b)); }

/* 64 int32 as 64 saturated int8, in order. */
FQ_INLINE __m128i bytes_16(const pi *a) {
  return _mm_packs_epi16(_mm_packs_epi32(a[0], a[1]), _mm_packs_epi32(a[2], a[3]));
}
FQ_INLINE void pack_64(int8_t *to, const pi *a) {
  for (int quarter = 0; quarter < 4; quarter++)
    _mm_storeu_si128((__m128i *)(to + quarter * 16), bytes_16(a + quarter * 4));
}
/* Held between two bounds, moreover. */
FQ_INLINE void pack_64_within(int8_t *to, const pi *a, int8_t low, int8_t high) {
  for (int quarter = 0; quarter < 4; quarter++) {
    const __m128i held = _mm_min_epi8(bytes_16(a + quarter * 4), _mm_set1_epi8(high));
    _mm_storeu_si128((__m128i *)(to + quarter * 16), _mm_max_epi8(held, _mm_set1_epi8(low)));
  }
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

/* 64 codes of -2 to 1, plus 2, as 16 bytes: code 4i in the lowest two bits of byte i, code 4i + 3 in the highest. */
FQ_INLINE void pack_quarters_64(uint8_t *to, const int8_t *codes) {
  const __m128i weights = _mm_set1_epi16(0x0401), pairs = _mm_set1_epi32(0x00100001);
  __m128i r[4];
  for (int i = 0; i < 4; i++) {
    const __m128i raised = _mm_add_epi8(_mm_loadu_si128((const __m128i *)(codes + 16 * i)), _mm_set1_epi8(2));
    r[i] = _mm_madd_epi16(_mm_maddubs_epi16(raised, weights), pairs);
  }
  _mm_storeu_si128((__m128i *)to, _mm_packus_epi16(_mm_packs_epi32(r[0], r[1]), _mm_packs_epi32(r[2], r[3])));
}

/* How many of 15 bounds (from the second on, in any order) lie below each lane. */
FQ_INLINE pi pf_count_below(pf a, const fq_bounds *bounds) {
  __m128i count = _mm_setzero_si128();
  for (int k = 1; k < 16; k++)
    count = _mm_sub_epi32(count, _mm_castps_si128(_mm_cmpgt_ps(a, _mm_set1_ps(bounds->heap[k]))));
  return count;
}
FQ_INLINE pf pi_lookup_16(pi index, const float *values) {
  return _mm_setr_ps(values[_mm_extract_epi32(index, 0)], values[_mm_extract_epi32(index, 1)],
                     values[_mm_extract_epi32(index, 2)], values[_mm_extract_epi32(index, 3)]);
}

/* 64 codes, looked up at indices of 0 to 15, as 32 bytes: code 2i in the high half of byte i, 2i + 1 in the low. */
FQ_INLINE void pack_high_first_64(uint8_t *to, const int8_t *indices, const uint8_t *codes) {
  const __m128i table = _mm_loadu_si128((const __m128i *)codes), weights = _mm_set1_epi16(0x0110);
  for (int half = 0; half < 2; half++, indices += 32, to += 16) {
    const __m128i first = _mm_shuffle_epi8(table, _mm_loadu_si128((const __m128i *)indices));
    const __m128i second = _mm_shuffle_epi8(table, _mm_loadu_si128((const __m128i *)(indices + 16)));
    const __m128i low = _mm_maddubs_epi16(first, weights), high = _mm_maddubs_epi16(second, weights);
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi16(low, high));
  }
}

/* 32 codes of 0 to 15 as 16 bytes: code i in the low half of byte i, code i + 16 in the high half. */
FQ_INLINE void pack_halves_32(uint8_t *to, const int8_t *codes) {
  const __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_loadu_si128((const __m128i *)(codes + 16));
  _mm_storeu_si128((__m128i *)to, _mm_or_si128(low, _mm_slli_epi16(high, 4)));
}

/* Bit 4 of 32 codes of 0 to 31: that of code i in bit i. */
FQ_INLINE uint32_t pack_high_bits_32(const int8_t *codes) {
  const __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_loadu_si128((const __m128i *)(codes + 16));
  const int below = _mm_movemask_epi8(_mm_slli_epi16(low, 3)), above = _mm_movemask_epi8(_mm_slli_epi16(high, 3));
  return (uint32_t)below | (uint32_t)above << 16;
}

/* 64 indices of 0 to 15 become what a table has there. */
FQ_INLINE void lookup_64(int8_t *codes, const uint8_t *table) {
  const __m128i sixteen = _mm_loadu_si128((const __m128i *)table);
  for (int i = 0; i < 64; i += 16) {
    __m128i *at = (__m128i *)(codes + i);
    _mm_storeu_si128(at, _mm_shuffle_epi8(sixteen, _mm_loadu_si128(at)));
  }
}

/* Elements 0 to 3 of so many rows as a part has lanes, that far apart: element i of every row in to[i]. */
FQ_INLINE void pf_load_columns(const float *x, int64_t apart, pf *to) {
  for (int i = 0; i < 4; i++)
    to[i] = _mm_loadu_ps(x + i * apart);
  _MM_TRANSPOSE4_PS(to[0], to[1], to[2], to[3]);
}

/* The lanes where a < b, as bits. */
FQ_INLINE uint32_t pf_bits_less(pf a, pf b) { return (uint32_t)_mm_movemask_ps(_mm_cmplt_ps(a, b)); }

/* a * b + c of two lanes, exact but for its last bit, which is set if anything was cut off: then the next rounding, to
 * float32, is that of the exact value. The product of two float32 is exact; the sum's error is Knuth's. */
FQ_INLINE __m128d odd_sum_2(__m128d a, __m128d b, __m128d c) {
  const __m128d product = _mm_mul_pd(a, b), sum = _mm_add_pd(product, c), rest = _mm_sub_pd(sum, product);
  const __m128d error = _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, rest)), _mm_sub_pd(c, rest));
  const __m128i inexact = _mm_castpd_si128(_mm_cmpneq_pd(error, _mm_setzero_pd()));
  const __m128i signs = _mm_srai_epi32(_mm_castpd_si128(_mm_xor_pd(error, sum)), 31);
  const __m128i beyond = _mm_and_si128(_mm_shuffle_epi32(signs, 0xf5), inexact); /* -1 where the sum is too large */
  const __m128i cut = _mm_add_epi64(_mm_castpd_si128(sum), beyond);
  return _mm_castsi128_pd(_mm_or_si128(cut, _mm_srli_epi64(inexact, 63)));
}
FQ_INLINE pf pf_fma(pf a, pf b, pf c) {
  const __m128d low = odd_sum_2(_mm_cvtps_pd(a), _mm_cvtps_pd(b), _mm_cvtps_pd(c));
  const __m128d high = odd_sum_2(_mm_cvtps_pd(_mm_movehl_ps(a, a)), _mm_cvtps_pd(_mm_movehl_ps(b, b)),
                                 _mm_cvtps_pd(_mm_movehl_ps(c, c)));
  return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}
