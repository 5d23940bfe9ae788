/* How packed bytes get to their place: as any store, or past the caches. */
#ifndef FQ_STORES_H
#define FQ_STORES_H

#include "simd.h"

enum { FQ_LINE = 64 };

/* A line of packed bytes to an address that begins one, past the caches: it need not be read before it is written, as
 * one that is stored in parts, and leaves no other line's place. */
FQ_INLINE void stream_line(void *to, const void *from) {
  for (int k = 0; k < FQ_LINE; k += (int)sizeof(pi)) {
    pi part;
    memcpy(&part, (const char *)from + k, sizeof part);
    pi_stream((char *)to + k, part);
  }
}

/* Store n bytes; those that stream by whole lines. */
FQ_INLINE void store_bytes(int stream, uint8_t *to, const uint8_t *from, int64_t n) {
  const int64_t before = (int64_t)(-(uintptr_t)to % FQ_LINE);
  int64_t i = !stream || n < before ? n : before;
  if (i > 0)
    memcpy(to, from, (size_t)i);
  for (; i + FQ_LINE <= n; i += FQ_LINE)
    stream_line(to + i, from + i);
  if (i < n)
    memcpy(to + i, from + i, (size_t)(n - i));
}

/* Whether a job's data stream: not if they are read again. */
FQ_INLINE int data_stream(const fq_job *job) {
  return job->streams && (job->packing == FQ_AS_PACKED || job->packing == FQ_ZEROS_BEHIND);
}

/* Where a span's packed bytes are made: in place, or apart if they stream; and how they get from there to their
 * place. */
FQ_INLINE uint8_t *packed_place(const fq_job *job, uint8_t *to, uint8_t *apart) {
  return data_stream(job) ? apart : to;
}
FQ_INLINE void store_packed(const fq_job *job, uint8_t *to, const uint8_t *from, int64_t n) {
  if (from != to)
    store_bytes(data_stream(job), to, from, n);
}

/* Whether n 8-bit codes can be stored where they stay, 64 at a time, and if they stream as whole lines. */
FQ_INLINE int stay_in_place(const fq_job *job, const uint8_t *to, int64_t n) {
  return n % FQ_LINE == 0 && (!data_stream(job) || (uintptr_t)to % FQ_LINE == 0);
}

/* 64 codes from the 32-bit ones in parts, to where they are packed from, or stay, and then may stream. */
FQ_INLINE void store_64(int8_t *to, const pi *parts, int stream) {
  if (stream) {
    _Alignas(64) int8_t line[FQ_LINE];
    pack_64(line, parts);
    stream_line(to, line);
  } else {
    pack_64(to, parts);
  }
}

/* n codes of 8 bits that were made less 128, for signed bytes, as they are stored, which may be where they are. */
FQ_INLINE void raise_codes(uint8_t *to, const int8_t *codes, int64_t n) {
  int64_t i = 0;
  for (; i + (int64_t)sizeof(pi) <= n; i += (int64_t)sizeof(pi)) {
    pi some;
    memcpy(&some, codes + i, sizeof some);
    some = pi_xor(some, pi_set((int32_t)0x80808080));
    memcpy(to + i, &some, sizeof some);
  }
  for (; i < n; i++)
    to[i] = (uint8_t)codes[i] ^ 0x80;
}
FQ_INLINE void store_raised(const fq_job *job, uint8_t *to, int8_t *codes, int64_t n) {
  uint8_t *place = packed_place(job, to, (uint8_t *)codes);
  raise_codes(place, codes, n);
  store_packed(job, to, place, n);
}

#endif
