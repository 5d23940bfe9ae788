/* What the ways back of all families share (dequantize.c, dequantize_gguf.c): codes as bytes, bytes as values. */
#ifndef FQ_DEQUANTIZE_H
#define FQ_DEQUANTIZE_H

#include "families.h"

/* 16 codes as float32, before their scale. */
typedef vf decoder(const int8_t *codes);

FQ_INLINE vf signed_byte(const int8_t *codes) { return vi_convert(vi_load_i8(codes)); }
FQ_INLINE vf unsigned_byte(const int8_t *codes) { return vi_convert(vi_and(vi_load_i8(codes), vi_set(255))); }

/* `width` bytes (a multiple of 4) to the codes of `bits` bits that lie over each other in them: the lowest of all bytes
 * come first, then the next ones. */
FQ_INLINE void unstack(const uint8_t *from, int width, int bits, int8_t *codes) {
  const uint32_t mask = UINT32_C(0x01010101) * ((UINT32_C(1) << bits) - 1);
  for (int part = 0; part < 8 / bits; part++) {
    for (int i = 0; i < width; i += 4) {
      uint32_t four;
      memcpy(&four, from + i, sizeof four);
      four = four >> (part * bits) & mask;
      memcpy(codes + part * width + i, &four, sizeof four);
    }
  }
}

#endif
