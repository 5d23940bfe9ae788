/* The kernels' quotient with one correction (kernels/simd.h, vf_quotient) rounds to the same code as true division, for
 * every float32 divisor: all significands (a power of two changes nothing between 2^-100 and 2^100), and for each every
 * half-integer up to 127.5 with the dividends around it, which are the only ones where a code can change.
 * Prints the number of cases and of wrong ones. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

int main(void) {
  uint64_t cases = 0, wrong = 0, uncorrected = 0;
  for (uint32_t significand = 0; significand < 1u << 23; significand++) {
    const float divisor = from_bits(0x3f800000u | significand), inverse = 1.0f / divisor;
    int missed = 0, plain = 0;
    for (int half = 0; half < 128; half++) {
      const uint32_t near = to_bits(((float)half + 0.5f) * divisor);
      for (int step = -2; step <= 2; step++) {
        const float dividend = from_bits(near + (uint32_t)step);
        const float first = dividend * inverse;
        const float rest = fmaf(-first, divisor, dividend);
        const float corrected = fmaf(rest, inverse, first);
        missed += rintf(corrected) != rintf(dividend / divisor);
        plain += rintf(first) != rintf(dividend / divisor);
      }
    }
    cases += 128 * 5;
    wrong += (uint64_t)missed;
    uncorrected += (uint64_t)plain;
  }
  printf("%llu %llu %llu\n", (unsigned long long)cases, (unsigned long long)wrong, (unsigned long long)uncorrected);
  return 0;
}
