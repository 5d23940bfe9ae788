/* Floats of a few bits: rounding to the nearest, ties to even. */
#ifndef FQ_MINIFLOAT_H
#define FQ_MINIFLOAT_H

#include "tile.h"

/* Bits of the mantissa, exponent of the least normal value, bits of a code without its sign. */
typedef struct {
  int mantissa, least, bits;
} minifloat;

static const minifloat e4m3 = {3, -6, 7}, e5m2 = {2, -14, 7}, e2m1 = {1, 0, 3};

/* The codes of 16 magnitudes within the format's range, given by their bits, in the lowest bits, and their values. A
 * number is added whose last place is the code's: the sum counts steps of it, also of the denormals. */
FQ_INLINE vi minifloat_steps(vi magnitude, minifloat format, vf *value) {
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
