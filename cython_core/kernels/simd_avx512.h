/* AVX-512 F, BW, VL and DQ, with F16C: one register is a whole vector. */
#include <immintrin.h>

#define FQ_PART_LANES 16
#define FQ_HAS_FMA 1

typedef __m512 pf;
typedef __m512i pi;

#define pf_add _mm512_add_ps
#define pf_sub _mm512_sub_ps
#define pf_mul _mm512_mul_ps
#define pf_div _mm512_div_ps
#define pf_min _mm512_min_ps
#define pf_max _mm512_max_ps
#define pf_sqrt _mm512_sqrt_ps
#define pf_fma _mm512_fmadd_ps
#define pf_fnma _mm512_fnmadd_ps
#define pf_bits _mm512_castps_si512
#define pi_float _mm512_castsi512_ps
#define pf_nearest _mm512_cvtps_epi32
#define pf_truncate _mm512_cvttps_epi32
#define pi_convert _mm512_cvtepi32_ps
#define pf_set _mm512_set1_ps
#define pi_stream(to, a) _mm512_stream_si512((__m512i *)(to), a) /* past the caches, to an aligned address */
#define streams_end _mm_sfence
#define pi_set _mm512_set1_epi32
#define pf_load _mm512_loadu_ps
#define pf_store _mm512_storeu_ps
#define pi_add _mm512_add_epi32
#define pi_sub _mm512_sub_epi32
#define pi_and _mm512_and_si512
#define pi_or _mm512_or_si512
#define pi_max _mm512_max_epi32
#define pi_max_unsigned _mm512_max_epu32
#define pi_max_halves _mm512_max_epi16
#define pi_max_unsigned_halves _mm512_max_epu16
#define pi_min _mm512_min_epi32
#define pi_upper_half(a) _mm512_srli_epi32(a, 16)
#define pi_shift_right(a, n) _mm512_srai_epi32(a, n) /* copies of the sign come in from the left */
#define pi_shift_left _mm512_slli_epi32
#define pi_load_i8(a) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(a)))
#define pi_highest _mm512_reduce_max_epi32
#define pi_xor _mm512_xor_si512
#define pi_choose(mask, a, b) _mm512_ternarylogic_epi32(mask, a, b, 0xca) /* the bits of a where the mask's are set */

/* Of parts a and b, groups of so many lanes: every second one of each, those of b beside those of a, and the others
 * likewise in the same places. */
#define FQ_NEIGHBOURS(apart, mask, ...)                                                                                \
  FQ_INLINE void pi_neighbours_##apart(pi a, pi b, pi *stay, pi *come) {                                               \
    *stay = _mm512_mask_blend_epi32(mask, a, b);                                                                       \
    *come = _mm512_permutex2var_epi32(a, _mm512_setr_epi32(__VA_ARGS__), b);                                           \
  }
FQ_NEIGHBOURS(1, 0xaaaa, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30)
FQ_NEIGHBOURS(2, 0xcccc, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29)
FQ_NEIGHBOURS(4, 0xf0f0, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27)
FQ_NEIGHBOURS(8, 0xff00, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
#undef FQ_NEIGHBOURS

FQ_INLINE pf pf_load_f16(const char *a) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)a)); }
FQ_INLINE pf pf_load_bf16(const char *a) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)a));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
FQ_INLINE pf pf_load_f64(const char *a) {
  const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(a)), high = _mm512_cvtpd_ps(_mm512_loadu_pd(a + 64));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

/* To 16-bit floats, ties to even. */
FQ_INLINE void pf_store_f16(char *to, pf a) {
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* a where test is zero, else b. */
FQ_INLINE pf pf_where_zero(pf test, pf a, pf b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_EQ_OQ), b, a);
}
/* x where a < b, else y, of a NaN too. */
FQ_INLINE pf pf_where_less(pf a, pf b, pf x, pf y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}

/* 64 int32 as 64 saturated int8, in order. */
FQ_INLINE __m512i bytes_64(const pi *a) {
  const __m512i words_low = _mm512_packs_epi32(a[0], a[1]), words_high = _mm512_packs_epi32(a[2], a[3]);
  const __m512i mixed = _mm512_packs_epi16(words_low, words_high); /* in each 128 bits: 4 bytes of each source */
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, mixed);
}
FQ_INLINE void pack_64(int8_t *to, const pi *a) { _mm512_storeu_si512(to, bytes_64(a)); }
/* Held between two bounds, moreover. */
FQ_INLINE void pack_64_within(int8_t *to, const pi *a, int8_t low, int8_t high) {
  const __m512i held = _mm512_min_epi8(bytes_64(a), _mm512_set1_epi8(high));
  _mm512_storeu_si512(to, _mm512_max_epi8(held, _mm512_set1_epi8(low)));
}

/* 64 codes of -8 to 7, plus 8, as 32 bytes: code 2i in the low half of byte i, code 2i + 1 in the high half. */
FQ_INLINE void pack_nibbles_64(uint8_t *to, const int8_t *codes) {
  const __m512i raised = _mm512_add_epi8(_mm512_loadu_si512(codes), _mm512_set1_epi8(8));
  const __m512i pairs = _mm512_maddubs_epi16(raised, _mm512_set1_epi16(0x1001));
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi16_epi8(pairs));
}

/* 64 codes of -2 to 1, plus 2, as 16 bytes: code 4i in the lowest two bits of byte i, code 4i + 3 in the highest. */
FQ_INLINE void pack_quarters_64(uint8_t *to, const int8_t *codes) {
  const __m512i raised = _mm512_add_epi8(_mm512_loadu_si512(codes), _mm512_set1_epi8(2));
  const __m512i pairs = _mm512_maddubs_epi16(raised, _mm512_set1_epi16(0x0401));
  _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001))));
}

#define FQ_HAS_CELLS 1
/* How many last places of `origin`, which is 1.5 times a power of two, are nearest to a * per_one, in the lowest bits.
 */
FQ_INLINE pi pf_cell(pf a, float per_one, float origin) {
  if (per_one == 1)
    return _mm512_castps_si512(_mm512_add_ps(a, _mm512_set1_ps(origin)));
  return _mm512_castps_si512(_mm512_fmadd_ps(a, _mm512_set1_ps(per_one), _mm512_set1_ps(origin)));
}
/* What stands at an index's lowest five bits. */
FQ_INLINE pf pf_lookup_32(pi index, const float *values) {
  return _mm512_permutex2var_ps(_mm512_loadu_ps(values), index, _mm512_loadu_ps(values + 16));
}
FQ_INLINE pi pi_lookup_32(pi index, const int32_t *values) {
  return _mm512_permutex2var_epi32(_mm512_loadu_si512(values), index, _mm512_loadu_si512(values + 16));
}
/* The count and one where a > b, or less one where a < b. */
FQ_INLINE pi pi_count_above(pi count, pf a, pf b) {
  return _mm512_mask_add_epi32(count, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), count, _mm512_set1_epi32(1));
}
FQ_INLINE pi pi_discount_below(pi count, pf a, pf b) {
  return _mm512_mask_sub_epi32(count, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), count, _mm512_set1_epi32(1));
}

/* How many of 15 bounds lie below each lane: one comparison, with the bound of its cell. */
FQ_INLINE pi pf_count_below(pf a, const fq_bounds *bounds) {
  if (bounds->most != 0)
    a = _mm512_range_ps(a, _mm512_set1_ps(bounds->most), 2); /* the lesser magnitude, a's sign */
  const pi cell = pf_cell(a, bounds->per_one, bounds->origin);
  pi count = pi_count_above(pi_lookup_32(cell, bounds->below), a, pf_lookup_32(cell, bounds->bound));
  if (bounds->inner != 0) {
    count = pi_count_above(count, a, _mm512_set1_ps(bounds->inner));
    count = pi_count_above(count, a, _mm512_set1_ps(-bounds->inner));
  }
  return count;
}
FQ_INLINE pf pi_lookup_16(pi index, const float *values) {
  return _mm512_permutexvar_ps(index, _mm512_loadu_ps(values));
}

/* 64 codes, looked up at indices of 0 to 15, as 32 bytes: code 2i in the high half of byte i, 2i + 1 in the low. */
FQ_INLINE void pack_high_first_64(uint8_t *to, const int8_t *indices, const uint8_t *codes) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)codes));
  const __m512i found = _mm512_shuffle_epi8(table, _mm512_loadu_si512(indices));
  const __m512i pairs = _mm512_maddubs_epi16(found, _mm512_set1_epi16(0x0110));
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi16_epi8(pairs));
}

/* 32 codes of 0 to 15 as 16 bytes: code i in the low half of byte i, code i + 16 in the high half. */
FQ_INLINE void pack_halves_32(uint8_t *to, const int8_t *codes) {
  const __m128i low = _mm_loadu_si128((const __m128i *)codes), high = _mm_loadu_si128((const __m128i *)(codes + 16));
  _mm_storeu_si128((__m128i *)to, _mm_or_si128(low, _mm_slli_epi16(high, 4)));
}

/* Bit 4 of 32 codes of 0 to 31: that of code i in bit i. */
FQ_INLINE uint32_t pack_high_bits_32(const int8_t *codes) {
  return _mm256_test_epi8_mask(_mm256_loadu_si256((const __m256i *)codes), _mm256_set1_epi8(16));
}

/* 64 indices of 0 to 15 become what a table has there. */
FQ_INLINE void lookup_64(int8_t *codes, const uint8_t *table) {
  const __m512i sixteen = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
  _mm512_storeu_si512(codes, _mm512_shuffle_epi8(sixteen, _mm512_loadu_si512(codes)));
}

/* Elements 0 to 3 of so many rows as a part has lanes, that far apart: element i of every row in to[i]. */
FQ_INLINE void pf_load_columns(const float *x, int64_t apart, pf *to) {
  __m512 rows[4];
  for (int i = 0; i < 4; i++, x += apart) {
    const __m512 four = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(x)), _mm_loadu_ps(x + 4 * apart), 1);
    rows[i] = _mm512_insertf32x4(four, _mm_loadu_ps(x + 8 * apart), 2);
    rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(x + 12 * apart), 3);
  }
  const __m512 low = _mm512_unpacklo_ps(rows[0], rows[1]), high = _mm512_unpackhi_ps(rows[0], rows[1]);
  const __m512 low_2 = _mm512_unpacklo_ps(rows[2], rows[3]), high_2 = _mm512_unpackhi_ps(rows[2], rows[3]);
  to[0] = _mm512_shuffle_ps(low, low_2, 0x44);
  to[1] = _mm512_shuffle_ps(low, low_2, 0xee);
  to[2] = _mm512_shuffle_ps(high, high_2, 0x44);
  to[3] = _mm512_shuffle_ps(high, high_2, 0xee);
}

/* The lanes where a < b, as bits. */
FQ_INLINE uint32_t pf_bits_less(pf a, pf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
