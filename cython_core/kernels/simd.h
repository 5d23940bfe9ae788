/* Vectors of 16 lanes on every instruction set, so that all of them add in the same order.
 *
 * Each simd_*.h defines a part (one register of FQ_PART_LANES lanes) and its operations; here FQ_PARTS of them make a
 * vector: vf of float32, vi of int32. Loads and stores take any address.
 */
#ifndef FQ_SIMD_H
#define FQ_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "fq.h"

/* With the sanitizers' checks in each of its copies a file compiles for minutes. */
#if defined(__SANITIZE_ADDRESS__)
#define FQ_INLINE static inline
#else
#define FQ_INLINE static inline __attribute__((always_inline))
#endif

/* The 15 bounds between 16 values in ascending order, in two forms for vf_count_below, which reads one of them.
 *
 * As a heap: the middle one at 1, what lies below the bound at k from 2k on, what lies above it from 2k + 1 on.
 *
 * By cells, where there are 32 lanes to look up at once: a lane times per_one, rounded as by adding `origin`, is in one
 * of the cells -16 to 15, which stand in 32 places by their lowest five bits: the sum's last ones. A cell holds one
 * bound, or infinity, and so many lie in the cells below it. Moreover `inner` and its negative are bounds, if it is not
 * 0, of the cell of 0; lanes beyond `most`, if it is not 0, count as it does with their sign, also NaN. */
typedef struct {
  _Alignas(64) float heap[16];
  float bound[32];
  int32_t below[32];
  float per_one, origin, inner, most;
} fq_bounds;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#elif defined(__SSE4_2__)
#include "simd_sse.h"
#elif defined(__ARM_NEON)
#include "simd_neon.h"
#else
#error "no vector operations for this target: x86-64-v2, AVX2, AVX-512 or NEON are needed"
#endif

enum { FQ_PART = FQ_PART_LANES, FQ_PARTS = FQ_LANES / FQ_PART };

typedef struct {
  pf p[FQ_PARTS];
} vf;
typedef struct {
  pi p[FQ_PARTS];
} vi;

#define FQ_EACH for (int k = 0; k < FQ_PARTS; k++)
#define FQ_MAP1(name, out, in, expression)                                                                             \
  FQ_INLINE out name(in a) {                                                                                           \
    out r;                                                                                                             \
    FQ_EACH r.p[k] = expression(a.p[k]);                                                                               \
    return r;                                                                                                          \
  }
#define FQ_MAP2(name, type, expression)                                                                                \
  FQ_INLINE type name(type a, type b) {                                                                                \
    type r;                                                                                                            \
    FQ_EACH r.p[k] = expression(a.p[k], b.p[k]);                                                                       \
    return r;                                                                                                          \
  }

FQ_MAP2(vf_add, vf, pf_add)
FQ_MAP2(vf_sub, vf, pf_sub)
FQ_MAP2(vf_mul, vf, pf_mul)
FQ_MAP2(vf_div, vf, pf_div)
FQ_MAP2(vf_min, vf, pf_min) /* a or b if either is NaN; callers do not care which */
FQ_MAP2(vf_max, vf, pf_max)
FQ_MAP2(vi_add, vi, pi_add)
FQ_MAP2(vi_sub, vi, pi_sub)
FQ_MAP2(vi_and, vi, pi_and)
FQ_MAP2(vi_or, vi, pi_or)
FQ_MAP2(vi_xor, vi, pi_xor)
FQ_MAP2(vi_max, vi, pi_max) /* signed */
FQ_MAP2(vi_max_unsigned, vi, pi_max_unsigned)
FQ_MAP2(vi_min, vi, pi_min)               /* signed */
FQ_MAP2(vi_max_halves, vi, pi_max_halves) /* of 32 int16, signed */
FQ_MAP2(vi_max_unsigned_halves, vi, pi_max_unsigned_halves)
FQ_MAP1(vf_sqrt, vf, vf, pf_sqrt)
FQ_MAP1(vf_bits, vi, vf, pf_bits)
FQ_MAP1(vi_float, vf, vi, pi_float)     /* the float32 with these bits */
FQ_MAP1(vf_nearest, vi, vf, pf_nearest) /* to int32, ties to even */
FQ_MAP1(vf_truncate, vi, vf, pf_truncate)
FQ_MAP1(vi_convert, vf, vi, pi_convert) /* int32 to float32 */

FQ_MAP1(vi_upper_half, vi, vi, pi_upper_half) /* the upper 16 bits, in the lower ones */

/* Shifted right by a constant; copies of the sign come in from the left. */
#define FQ_SHIFT(n)                                                                                                    \
  FQ_INLINE vi vi_shift_##n(vi a) {                                                                                    \
    vi r;                                                                                                              \
    FQ_EACH r.p[k] = pi_shift_right(a.p[k], n);                                                                        \
    return r;                                                                                                          \
  }
FQ_SHIFT(20)
FQ_SHIFT(21)
FQ_SHIFT(22)
FQ_SHIFT(24)
FQ_SHIFT(28)
FQ_SHIFT(31)

/* Shifted left by a constant: a bfloat16 becomes a float32, a code's lowest bit the lowest of a mantissa. */
#define FQ_SHIFT_LEFT(n)                                                                                               \
  FQ_INLINE vi vi_shift_left_##n(vi a) {                                                                               \
    vi r;                                                                                                              \
    FQ_EACH r.p[k] = pi_shift_left(a.p[k], n);                                                                         \
    return r;                                                                                                          \
  }
FQ_SHIFT_LEFT(16)
FQ_SHIFT_LEFT(20)
FQ_SHIFT_LEFT(21)

/* The bits of a where those of the mask are set, else those of b. */
FQ_INLINE vi vi_choose(vi mask, vi a, vi b) {
  vi r;
  FQ_EACH r.p[k] = pi_choose(mask.p[k], a.p[k], b.p[k]);
  return r;
}
FQ_INLINE vf vf_set(float a) {
  vf r;
  FQ_EACH r.p[k] = pf_set(a);
  return r;
}
FQ_INLINE vi vi_set(int32_t a) {
  vi r;
  FQ_EACH r.p[k] = pi_set(a);
  return r;
}
FQ_INLINE vf vf_load(const float *a) {
  vf r;
  FQ_EACH r.p[k] = pf_load(a + k * FQ_PART);
  return r;
}
FQ_INLINE void vf_store(float *to, vf a) { FQ_EACH pf_store(to + k * FQ_PART, a.p[k]); }
FQ_INLINE vf vf_where_zero(vf test, vf a, vf b) {
  vf r;
  FQ_EACH r.p[k] = pf_where_zero(test.p[k], a.p[k], b.p[k]);
  return r;
}
/* x where a < b, else y, of a NaN too. */
FQ_INLINE vf vf_where_less(vf a, vf b, vf x, vf y) {
  vf r;
  FQ_EACH r.p[k] = pf_where_less(a.p[k], b.p[k], x.p[k], y.p[k]);
  return r;
}
/* How many of 15 bounds lie below each lane; 0 for the NaN that x86 makes of 0 times infinity. */
FQ_INLINE vi vf_count_below(vf a, const fq_bounds *bounds) {
  vi r;
  FQ_EACH r.p[k] = pf_count_below(a.p[k], bounds);
  return r;
}
/* The values at indices of 0 to 15. */
FQ_INLINE vf vi_lookup_16(vi index, const float *values) {
  vf r;
  FQ_EACH r.p[k] = pi_lookup_16(index.p[k], values);
  return r;
}

/* 16 signed bytes. */
FQ_INLINE vi vi_load_i8(const int8_t *a) {
  vi r;
  FQ_EACH r.p[k] = pi_load_i8(a + k * FQ_PART);
  return r;
}

/* 16 weights of another dtype as float32, from any address. */
FQ_INLINE vf vf_load_f16(const char *a) {
  vf r;
  FQ_EACH r.p[k] = pf_load_f16(a + k * FQ_PART * 2);
  return r;
}
FQ_INLINE void vf_store_f16(char *to, vf a) { FQ_EACH pf_store_f16(to + k * FQ_PART * 2, a.p[k]); }
FQ_INLINE vf vf_load_bf16(const char *a) {
  vf r;
  FQ_EACH r.p[k] = pf_load_bf16(a + k * FQ_PART * 2);
  return r;
}
FQ_INLINE vf vf_load_f64(const char *a) {
  vf r;
  FQ_EACH r.p[k] = pf_load_f64(a + k * FQ_PART * 8);
  return r;
}

/* The lanes where a < b, as bits. */
FQ_INLINE uint32_t vf_bits_less(vf a, vf b) {
  uint32_t r = 0;
  FQ_EACH r |= pf_bits_less(a.p[k], b.p[k]) << (k * FQ_PART);
  return r;
}

/* One part with the higher of the lanes that lie over each other, and the highest of all lanes. */
FQ_INLINE pi vi_fold(vi a) {
  pi r = a.p[0];
  for (int k = 1; k < FQ_PARTS; k++)
    r = pi_max(r, a.p[k]);
  return r;
}
FQ_INLINE int32_t vi_highest(vi a) { return pi_highest(vi_fold(a)); }

/* a / b, correctly rounded, from inverse = 1 / b correctly rounded, for 2^-100 <= |b| <= 2^100. With fused
 * multiply-adds: one correction gives the right side of every half-integer up to 127.5 (tests/cython_core proves it for
 * every float32 divisor); a second one makes the whole quotient exact (Markstein). */
FQ_INLINE vf vf_quotient(vf a, vf b, vf inverse, int whole) {
#ifdef FQ_HAS_FMA
  vf q = vf_mul(a, inverse), rest;
  for (int step = 0; step <= whole; step++) {
    FQ_EACH rest.p[k] = pf_fnma(q.p[k], b.p[k], a.p[k]);
    FQ_EACH q.p[k] = pf_fma(rest.p[k], inverse.p[k], q.p[k]);
  }
  return q;
#else
  (void)inverse, (void)whole;
  return vf_div(a, b);
#endif
}

#endif
