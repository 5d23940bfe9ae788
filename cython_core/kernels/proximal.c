/* calibration "proximal" of HQQ (flightquant/reference/hqq.py): steps that move the zero points of groups. */
#include "families.h"

enum { SIDES = 8 }; /* sums that torch's order makes side by side */

#define SMALL_BITS 0x3e2e147b /* 0.17f: errors up to it shrink to 0 */
#define EXPONENT ((double)-0.3f)
#define LOG2_E 1.4426950408889634
#define LN_2 0.6931471805599453

/* |x|^-0.3 of what is above 0.17, from its bits. Without a branch or a loop, so that 16 of them become vectors. */
FQ_INLINE float power(int32_t size_bits) {
  const int32_t one_to_two = (size_bits & 0x7fffff) | 0x3f800000;
  const int32_t upper = one_to_two >= 0x3fb504f3; /* above the root of 2, where the half is nearer to 1 */
  const int32_t near_one = one_to_two - (upper << 23);
  float mantissa, scale;
  memcpy(&mantissa, &near_one, sizeof mantissa);
  const double exponent = (double)((size_bits >> 23) - 127 + upper);
  const double m = (double)mantissa, s = (m - 1) / (m + 1), t = s * s;
  double series = 1.0 / 15;
  series = series * t + 1.0 / 13;
  series = series * t + 1.0 / 11;
  series = series * t + 1.0 / 9;
  series = series * t + 1.0 / 7;
  series = series * t + 1.0 / 5;
  series = series * t + 1.0 / 3;
  series = series * t + 1;
  const double wanted = (exponent + 2 * s * series * LOG2_E) * EXPONENT;
  const double whole = (wanted + 0x1.8p52) - 0x1.8p52, rest = (wanted - whole) * LN_2;
  series = 1 + rest * (1.0 / 11);
  series = 1 + rest * (1.0 / 10) * series;
  series = 1 + rest * (1.0 / 9) * series;
  series = 1 + rest * (1.0 / 8) * series;
  series = 1 + rest * (1.0 / 7) * series;
  series = 1 + rest * (1.0 / 6) * series;
  series = 1 + rest * (1.0 / 5) * series;
  series = 1 + rest * (1.0 / 4) * series;
  series = 1 + rest * (1.0 / 3) * series;
  series = 1 + rest * (1.0 / 2) * series;
  series = 1 + rest * series;
  const int32_t power_of_2 = ((int32_t)whole + 127) << 23;
  memcpy(&scale, &power_of_2, sizeof scale);
  return (float)(series * (double)scale);
}

/* sign(x) * max(|x| - 0.1 * |x|^-0.3, 0) of 16 errors, in place. */
static __attribute__((noinline)) void shrink_16(float *x) {
  int32_t bits[FQ_LANES];
  memcpy(bits, x, sizeof bits);
  for (int k = 0; k < FQ_LANES; k++) {
    const int32_t size_bits = bits[k] & INT32_MAX;
    float size;
    memcpy(&size, &size_bits, sizeof size);
    const float left = size - 0.1f * power(size_bits);
    int32_t kept;
    memcpy(&kept, &left, sizeof kept);
    kept &= -(int32_t)(size_bits > SMALL_BITS) & ~(kept >> 31);
    bits[k] = kept | (bits[k] & INT32_MIN);
  }
  memcpy(x, bits, sizeof bits);
}

/* Codes less (weight - shrunk error) * factor, and the errors of 16 weights. */
FQ_INLINE vf remainder_16(const float *x, vf factor, vf zero, vf levels, int shrinks, vf *error) {
  const vf weight = vf_load(x), scaled = vf_mul(weight, factor);
  const vf code = vi_convert(vf_nearest(vf_max(vf_min(vf_add(scaled, zero), levels), vf_set(0))));
  *error = vf_sub(weight, vf_div(vf_sub(code, zero), factor));
  if (!shrinks)
    return vf_sub(code, scaled);
  float left[FQ_LANES];
  vf_store(left, *error);
  shrink_16(left);
  return vf_sub(code, vf_mul(vf_sub(weight, vf_load(left)), factor));
}

/* The sums of a group's remainders, side by side; magnitudes of errors join a vector of sums, their largest returns. */
FQ_INLINE int32_t add_group(const float *x, int64_t unit, float factor, float zero, vf levels, int shrinks, vf *total,
                            float *sides) {
  const vf f = vf_set(factor), z = vf_set(zero);
  const vi mask = vi_set(INT32_MAX);
  vf even = vf_set(0), odd = even, sum = *total;
  vi largest = vi_set(0);
  for (int64_t i = 0; i < unit; i += FQ_BLOCK) {
    vf error, more;
    even = vf_add(even, remainder_16(x + i, f, z, levels, shrinks, &error));
    odd = vf_add(odd, remainder_16(x + i + FQ_LANES, f, z, levels, shrinks, &more));
    const vi size = vi_and(vf_bits(error), mask), next = vi_and(vf_bits(more), mask);
    sum = vf_add(vf_add(sum, vi_float(size)), vi_float(next));
    largest = vi_max(largest, vi_max(size, next));
  }
  *total = sum;
  float lanes[4 * SIDES];
  vf_store(lanes, even);
  vf_store(lanes + FQ_LANES, odd);
  for (int k = 0; k < SIDES; k++)
    sides[k] = ((lanes[k] + lanes[SIDES + k]) + lanes[2 * SIDES + k]) + lanes[3 * SIDES + k];
  return shrinks ? 0 : vi_highest(largest);
}

void FQ_NAME(take_steps)(const fq_job *job, const float *x, int64_t n, const float *factor, float *zero, int steps,
                         double *errors) {
  const int64_t groups = n / job->unit;
  const vf levels = vf_set((float)((1 << job->bits) - 1));
  float sides[FQ_BLOCKS][SIDES];
  for (int step = 0; step < steps; step++) {
    vf total = vf_set(0);
    for (int64_t g = 0; g < groups; g++) {
      const float *group = x + g * job->unit;
      const vf before = total;
      if (add_group(group, job->unit, factor[g], zero[g], levels, 0, &total, sides[g]) > SMALL_BITS) {
        total = before;
        add_group(group, job->unit, factor[g], zero[g], levels, 1, &total, sides[g]);
      }
    }
    for (int64_t g = 0; g < groups; g++) {
      float sum = 0;
      for (int k = 0; k < SIDES; k++)
        sum += sides[g][k];
      const float moved = sum / (float)job->unit;
      zero[g] = fabsf(moved) < INFINITY ? moved : zero[g];
    }
    if (errors)
      errors[step] += add_lanes(total);
  }
}

int FQ_NAME(count_steps)(const double *errors, int64_t n) {
  float best = INFINITY;
  for (int step = 0; step < FQ_STEPS; step++) {
    const float mean = (float)(errors[step] / (double)n);
    if (!(mean < best))
      return step + 1;
    best = mean;
  }
  return FQ_STEPS;
}
