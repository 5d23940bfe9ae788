/* AVX2, FMA and F16C: two registers make a vector. */
#include <immintrin.h>

#define FQ_PART_LANES 8
#define FQ_HAS_FMA 1

typedef __m256 pf;
typedef __m256i pi;

#define pf_add _mm256_add_ps
#define pf_sub _mm256_sub_ps
#define pf_mul _mm256_mul_ps
#define pf_div _mm256_div_ps
#define pf_min _mm256_min_ps
#define pf_max _mm256_max_ps
#define pf_sqrt _mm256_sqrt_ps
#define pf_fma _mm256_fmadd_ps
#define pf_fnma _mm256_fnmadd_ps
#define pf_bits _mm256_castps_si256
#define pi_float _mm256_castsi256_ps
#define pf_nearest _mm256_cvtps_epi32
#define pf_truncate _mm256_cvttps_epi32
#define pi_convert _mm256_cvtepi32_ps
#define pf_set _mm256_set1_ps
#define pi_stream(to, a) _mm256_stream_si256((__m256i *)(to), a) /* past the caches, to an aligned address */
#define streams_end _mm_sfence
#define pi_set _mm256_set1_epi32
#define pf_load _mm256_loadu_ps
#define pf_store _mm256_storeu_ps
#define pi_add _mm256_add_epi32
#define pi_sub _mm256_sub_epi32
#define pi_and _mm256_and_si256
#define pi_or _mm256_or_si256
#define pi_max _mm256_max_epi32
#define pi_max_unsigned _mm256_max_epu32
#define pi_max_halves _mm256_max_epi16
#define pi_max_unsigned_halves _mm256_max_epu16
#define pi_min _mm256_min_epi32
#define pi_upper_half(a) _mm256_srli_epi32(a, 16)
#define pi_shift_right(a, n) _mm256_srai_epi32(a, n) /* copies of the sign come in from the left */
#define pi_shift_left _mm256_slli_epi32
#define pi_load_i8(a) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(a)))

FQ_INLINE int32_t pi_highest(pi a) {
  __m128i r = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1)));
}
#define pi_xor _mm256_xor_si256
/* The bits of a where the mask's are set. */
#define pi_choose(mask, a, b) _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b))

/* Of parts a and b, groups of so many lanes: every second one of each, those of b beside those of a, and the others
 * likewise in the same places. */
FQ_INLINE void pi_neighbours_1(pi a, pi b, pi *stay, pi *come) {
  *stay = _mm256_blend_epi32(a, b, 0xaa);
  *come = _mm256_shuffle_epi32(_mm256_blend_epi32(a, b, 0x55), 0xb1);
}
FQ_INLINE void pi_neighbours_2(pi a, pi b, pi *stay, pi *come) {
  *stay = _mm256_blend_epi32(a, b, 0xcc);
  *come = _mm256_shuffle_epi32(_mm256_blend_epi32(a, b, 0x33), 0x4e);
}
FQ_INLINE void pi_neighbours_4(pi a, pi b, pi *stay, pi *come) {
  *stay = _mm256_blend_epi32(a, b, 0xf0);
  *come = _mm256_permute2x128_si256(a, b, 0x21);
}

FQ_INLINE pf pf_load_f16(const char *a) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)a)); }
FQ_INLINE pf pf_load_bf16(const char *a) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)a));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FQ_INLINE pf pf_load_f64(const char *a) {
  const __m128 low = _mm256_cvtpd_ps(_mm256_loadu_pd((const double *)a));
  const __m128 high = _mm256_cvtpd_ps(_mm256_loadu_pd((const double *)(a + 32)));
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}

/* To 16-bit floats, ties to even. */
FQ_INLINE void pf_store_f16(char *to, pf a) {
  _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* a where test is zero, else b. */
FQ_INLINE pf pf_where_zero(pf test, pf a, pf b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(test, _mm256_setzero_ps(), _CMP_EQ_OQ));
}
/* x where a < b, else y, of a NaN too. */
FQ_INLINE pf pf_where_less(pf a, pf b, pf x, pf y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }

/* 64 int32 as 64 saturated int8, in order. */
FQ_INLINE __m256i bytes_32(const pi *a) {
  const __m256i words_low = _mm256_packs_epi32(a[0], a[1]), words_high = _mm256_packs_epi32(a[2], a[3]);
  const __m256i mixed = _mm256_packs_epi16(words_low, words_high);
  return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
FQ_INLINE void pack_64(int8_t *to, const pi *a) {
  for (int half = 0; half < 2; half++)
    _mm256_storeu_si256((__m256i *)(to + half * 32), bytes_32(a + half * 4));
}
/* Held between two bounds, moreover. */
FQ_INLINE void pack_64_within(int8_t *to, const pi *a, int8_t low, int8_t high) {
  for (int half = 0; half < 2; half++) {
    const __m256i held = _mm256_min_epi8(bytes_32(a + half * 4), _mm256_set1_epi8(high));
    _mm256_storeu_si256((__m256i *)(to + half * 32), _mm256_max_epi8(held, _mm256_set1_epi8(low)));
  }
}

/* 64 codes of -8 to 7, plus 8, as 32 bytes: code 2i in the low half of byte i, code 2i + 1 in the high half. */
FQ_INLINE void pack_nibbles_64(uint8_t *to, const int8_t *codes) {
  const __m256i weights = _mm256_set1_epi16(0x1001);
  const __m256i first = _mm256_add_epi8(_mm256_loadu_si256((const __m256i *)codes), _mm256_set1_epi8(8));
  const __m256i second = _mm256_add_epi8(_mm256_loadu_si256((const __m256i *)(codes + 32)), _mm256_set1_epi8(8));
  const __m256i low = _mm256_maddubs_epi16(first, weights), high = _mm256_maddubs_epi16(second, weights);
  _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8));
}

/* 64 codes of -2 to 1, plus 2, as 16 bytes: code 4i in the lowest two bits of byte i, code 4i + 3 in the highest. */
FQ_INLINE void pack_quarters_64(uint8_t *to, const int8_t *codes) {
  const __m256i weights = _mm256_set1_epi16(0x0401), pairs = _mm256_set1_epi32(0x00100001);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
  const __m256i first = _mm256_add_epi8(_mm256_loadu_si256((const __m256i *)codes), _mm256_set1_epi8(2));
  const __m256i second = _mm256_add_epi8(_mm256_loadu_si256((const __m256i *)(codes + 32)), _mm256_set1_epi8(2));
  const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(first, weights), pairs);
  const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(second, weights), pairs);
  const __m256i words = _mm256_packs_epi32(low, high), mixed = _mm256_packus_epi16(words, words);
  _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(mixed, order)));
}

/* How many of 15 bounds lie below each lane: a search from the heap's root down to what would be its leaves. */
FQ_INLINE pi pf_count_below(pf a, const fq_bounds *bounds) {
  const __m256 upper = _mm256_loadu_ps(bounds->heap), lowest = _mm256_loadu_ps(bounds->heap + 8);
  __m256i at = _mm256_set1_epi32(1);
  for (int level = 0; level < 4; level++) {
    const __m256 bound = _mm256_permutevar8x32_ps(level < 3 ? upper : lowest, at);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(a, bound, _CMP_GT_OQ));
    at = _mm256_sub_epi32(_mm256_add_epi32(at, at), above);
  }
  return _mm256_sub_epi32(at, _mm256_set1_epi32(16));
}
FQ_INLINE pf pi_lookup_16(pi index, const float *values) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

/* 64 codes, looked up at indices of 0 to 15, as 32 bytes: code 2i in the high half of byte i, 2i + 1 in the low. */
FQ_INLINE void pack_high_first_64(uint8_t *to, const int8_t *indices, const uint8_t *codes) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
  const __m256i weights = _mm256_set1_epi16(0x0110);
  const __m256i first = _mm256_shuffle_epi8(table, _mm256_loadu_si256((const __m256i *)indices));
  const __m256i second = _mm256_shuffle_epi8(table, _mm256_loadu_si256((const __m256i *)(indices + 32)));
  const __m256i low = _mm256_maddubs_epi16(first, weights), high = _mm256_maddubs_epi16(second, weights);
  _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8));
}

/* 32 codes of 0 to 15 as 16 bytes: code i in the low half of byte i, code i + 16 in the high half. */
FQ_INLINE void pack_halves_32(uint8_t *to, const int8_t *codes) {
  const __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_loadu_si128((const __m128i *)(codes + 16));
  _mm_storeu_si128((__m128i *)to, _mm_or_si128(low, _mm_slli_epi16(high, 4)));
}

/* Bit 4 of 32 codes of 0 to 31: that of code i in bit i. */
FQ_INLINE uint32_t pack_high_bits_32(const int8_t *codes) {
  return (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(_mm256_loadu_si256((const __m256i *)codes), 3));
}

/* 64 indices of 0 to 15 become what a table has there. */
FQ_INLINE void lookup_64(int8_t *codes, const uint8_t *table) {
  const __m256i sixteen = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
  for (int i = 0; i < 64; i += 32) {
    __m256i *at = (__m256i *)(codes + i);
    _mm256_storeu_si256(at, _mm256_shuffle_epi8(sixteen, _mm256_loadu_si256(at)));
  }
}

/* Elements 0 to 3 of so many rows as a part has lanes, that far apart: element i of every row in to[i]. */
FQ_INLINE void pf_load_columns(const float *x, int64_t apart, pf *to) {
  __m256 rows[4];
  for (int i = 0; i < 4; i++, x += apart)
    rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)), _mm_loadu_ps(x + 4 * apart), 1);
  const __m256 low = _mm256_unpacklo_ps(rows[0], rows[1]), high = _mm256_unpackhi_ps(rows[0], rows[1]);
  const __m256 low_2 = _mm256_unpacklo_ps(rows[2], rows[3]), high_2 = _mm256_unpackhi_ps(rows[2], rows[3]);
  to[0] = _mm256_shuffle_ps(low, low_2, 0x44);
  to[1] = _mm256_shuffle_ps(low, low_2, 0xee);
  to[2] = _mm256_shuffle_ps(high, high_2, 0x44);
  to[3] = _mm256_shuffle_ps(high, high_2, 0xee);
}

/* The lanes where a < b, as bits. */
FQ_INLINE uint32_t pf_bits_less(pf a, pf b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
