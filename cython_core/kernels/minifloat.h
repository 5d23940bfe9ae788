/* Floats of a few bits: rounding to the nearest, ties to even. */
#ifndef FQ_MINIFLOAT_H
#define FQ_MINIFLOAT_H

#include "tile.h"

/* Bits of the mantissa, exponent of the least normal value, bits of a code without its sign. */
typedef struct {
  int mantissa, least, bits;
} minifloat;

static const minifloat e4m3 = {3, -6, 7}, e5m2 = {2, -14, 7}, e2m1 = {1, 0, 3};

#ifdef FQ_HAS_CELLS
/* The number minifloat_steps adds, by the last four bits of e4m3's exponents: for that of 2^e it ends in the codes of
 * the exponents below. */
static const float e4m3_added[16] = {0x1p21f + 0x7p1f,  0x1p22f + 0x8p2f,  0x1p23f + 0x9p3f,
                                     0x1p24f + 0xap4f,  0x1p25f + 0xbp5f,  0x1p26f + 0xcp6f,
                                     0x1p27f + 0xdp7f,  0x1p28f + 0xep8f,  0,
                                     0x1p14f,           0x1p15f + 0x1p-5f, 0x1p16f + 0x2p-4f,
                                     0x1p17f + 0x3p-3f, 0x1p18f + 0x4p-2f, 0x1p19f + 0x5p-1f,
                                     0x1p20f + 0x6p0f};
#endif

/* The codes of 16 magnitudes within the format's range, given by their bits, in the lowest bits, and their values. A
 * number is added whose last place is the code's: the sum counts steps of it, also of the denormals. */
FQ_INLINE vi minifloat_steps(vi magnitude, minifloat format, vf *value) {
#ifdef FQ_HAS_CELLS
  if (format.least == e4m3.least) {
    const vi high = vi_max(magnitude, vi_set((e4m3.least + 127) << 23));
    vi exponent;
    FQ_EACH exponent.p[k] = pi_shift_right(high.p[k], 23);
    const vf added = vi_lookup_16(exponent, e4m3_added), sum = vf_add(vi_float(magnitude), added);
    *value = vf_sub(sum, added);
    return vf_bits(sum);
  }
#endif
  const int32_t least = (format.least + 127) << 23, steps = 1 << format.mantissa, mask = (1 << format.bits) - 1;
  /* A code is the steps and, for each exponent above the least, the steps of one exponent more. What the least one's
   * share is too much is taken off, modulo the number of codes, in the added number: it is even, so that ties to even
   * stay such. */
  const int32_t offset = (-(format.least + 127) * steps) & mask;
  const vi exponent = vi_and(vi_max(magnitude, vi_set(least)), vi_set(0x7f800000));
  const vi base = vi_add(exponent, vi_set(((23 - format.mantissa) << 23) + offset));
  const vf counted = vf_add(vi_float(magnitude), vi_float(base));
  const vi share = format.mantissa == 3   ? vi_shift_20(exponent)
                   : format.mantissa == 2 ? vi_shift_21(exponent)
                                          : vi_shift_22(exponent);
  *value = vf_sub(counted, vi_float(base));
  return vi_add(vf_bits(counted), share);
}

/* The same without what stands above a code's bits. */
FQ_INLINE vi nearest_minifloat(vi magnitude, minifloat format, vf *value) {
  return vi_and(minifloat_steps(magnitude, format, value), vi_set((1 << format.bits) - 1));
}

/* The nearest 8-bit floats of 16 quotients within the format's range, as signed bytes in int32, and their values. The
 * sign is the weight's: that of a quotient that rounds to zero may be lost. */
FQ_INLINE vi nearest_float8(vf q, vf weight, minifloat format, vf *value) {
  const vi magnitude = vi_set(INT32_MAX);
  const vi code = minifloat_steps(vi_and(vf_bits(q), magnitude), format, value);
  *value = vi_float(vi_choose(magnitude, vf_bits(*value), vf_bits(weight)));
  return vi_choose(vi_set(0x7f), code, vi_shift_24(vf_bits(weight)));
}

#endif
