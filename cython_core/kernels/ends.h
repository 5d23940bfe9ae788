/* The least and the largest of some weights, neither drawn to 0. */
#ifndef FQ_ENDS_H
#define FQ_ENDS_H

#include "tile.h"

/* float32 bits as integers in the order of the values, -0 below 0, and back. */
FQ_INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & INT32_MAX); }

FQ_INLINE float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* Both ends of n weights that are not on both sides of 0. */
static __attribute__((noinline)) void one_sided(const float *x, int64_t n, int32_t *least, int32_t *most) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    const int32_t key = ordered(bits);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  *least = ordered(low);
  *most = ordered(high);
}

/* The bits of both ends of n weights, from the highest x and -x above 0 that range_lanes finds. */
FQ_INLINE void both_ends(const float *x, int64_t n, int32_t high, int32_t low, int32_t *least, int32_t *most) {
  *least = low ^ INT32_MIN;
  *most = high;
  if (high == 0 || low == 0)
    one_sided(x, n, least, most);
}

#endif
