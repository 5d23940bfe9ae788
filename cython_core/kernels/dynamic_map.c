/* The table of bitsandbytes' 8-bit codes (flightquant/reference/dynamic8.py: values, places), made when the module is
 * loaded: 66 KB that need not stand in the binary of each instruction set. */
#include "dynamic_map.h"

float fq_dynamic_values[256];
uint8_t fq_dynamic_places[65536];

static void fill_values(void) {
  static const float powers[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1};
  float *positive = fq_dynamic_values + 128;
  fq_dynamic_values[127] = 0;
  fq_dynamic_values[255] = 1;
  for (int decade = 0; decade < 7; decade++) {
    const int count = 1 << decade, half = (count + 1) / 2;
    const double step = (double)((1.0f - 0.1f) / (float)count);
    float bound = 0.1f;
    for (int i = 1; i <= count; i++) {
      const float next = (float)(i < half ? (double)0.1f + step * i : 1.0 - step * (count - i));
      *positive++ = powers[decade] * ((bound + next) / 2);
      bound = next;
    }
  }
  for (int i = 0; i < 127; i++)
    fq_dynamic_values[126 - i] = -fq_dynamic_values[128 + i];
}

__attribute__((constructor)) static void fill(void) {
  fill_values();
  int code = 0;
  for (int i = 0; i < 65536; i++) {
    const float at = (float)i * 2 / 65535 - 1;
    while (code < 255 && (fq_dynamic_values[code] + fq_dynamic_values[code + 1]) * 0.5f < at)
      code++;
    fq_dynamic_places[i] = (uint8_t)code;
  }
}
