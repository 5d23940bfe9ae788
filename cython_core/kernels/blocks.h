/* One scale for each block of FQ_EDGE x FQ_EDGE weights, cut short at the matrix's edges.
 *
 * A tile is a strip of FQ_EDGE rows. It is taken in pieces of FQ_PIECE columns, small enough for the second-level
 * cache: a piece is read from memory once, for its blocks' ranges, and again from the cache to be quantized, while the
 * next piece is fetched. Rows lie too far apart for the processor to foresee: what is read of the next ones, for their
 * ranges, and where their codes go is fetched some rows before. Spans are the pieces' rows, in this order
 * (flightquant/reference/quality.py: strips). */
#ifndef FQ_BLOCKS_H
#define FQ_BLOCKS_H

#include "scaled.h"

enum { FQ_PIECE = 512, FQ_ACROSS = FQ_PIECE / FQ_EDGE, FQ_ROWS_AHEAD = 4 };

/* The ranges of a piece's blocks: `width` columns from `begin` on, of so many rows. */
FQ_INLINE void range_blocks(const fq_job *job, int64_t begin, int64_t rows, int64_t width, int32_t *high) {
  _Alignas(64) float buffer[FQ_PIECE];
  const int dtype = span_dtype(job);
  pi highest[FQ_ACROSS];
  for (int b = 0; b < FQ_ACROSS; b++)
    highest[b] = pi_set(0);
  for (int64_t row = 0; row < rows; row++) {
    fetcher next = fetch_from(job, begin + (row + FQ_ROWS_AHEAD) * job->cols);
    fetch_vectors(&next, FQ_PIECE / FQ_LANES + 1); /* the row need not begin a line */
    const char *x = weights_span(job, begin + row * job->cols, width, buffer);
    for (int64_t b = 0; b * FQ_EDGE < width; b++, x += FQ_EDGE * fq_dtype_bytes[dtype]) {
      const int64_t rest = round_up(width - b * FQ_EDGE, FQ_STEP), n = rest < FQ_EDGE ? rest : FQ_EDGE;
      const range_part found = dtype == FQ_F32 ? range_of(x, n, 1, FQ_F32) : range_of(x, n, 1, FQ_F16);
      highest[b] = pi_max(highest[b], found.high);
    }
  }
  for (int b = 0; b < FQ_ACROSS; b++)
    high[b] = pi_highest(highest[b]);
  widen_ends(high, dtype);
}

/* Fetch the lines to which the codes from an index on will be written. */
FQ_INLINE void fetch_codes(const fq_job *job, int64_t at) {
  const uintptr_t to = (uintptr_t)job->data + (uintptr_t)at;
  for (uintptr_t line = 0; line < FQ_PIECE; line += 64)
    __builtin_prefetch((const char *)(to + line), 1, 3);
}

/* Quantize a strip, piece by piece: ranges, parameters, then row by row codes, packed bytes, quality sums. */
FQ_INLINE void quantize_strip(const fq_job *job, int64_t begin, int64_t end, fq_result *result,
                              span_quantizer *quantizer, span_packer *packer) {
  _Alignas(64) float buffer[FQ_PIECE], wide[FQ_PIECE], again[FQ_PIECE];
  _Alignas(64) int8_t bytes[FQ_PIECE];
  const int64_t cols = job->cols, rows = (end - begin) / cols, across = (cols + FQ_EDGE - 1) / FQ_EDGE;
  float *scales = job->scales + begin / cols / FQ_EDGE * across;
  span_units u;
  memset(&u, 0, sizeof u);
  for (int64_t col = 0; col < cols; col += FQ_PIECE) {
    const int64_t width = cols - col < FQ_PIECE ? cols - col : FQ_PIECE, padded = round_up(width, FQ_STEP);
    const int64_t blocks = (width + FQ_EDGE - 1) / FQ_EDGE;
    u.careful = 0;
    range_blocks(job, begin + col, rows, width, u.high);
    for (int64_t b = 0; b < blocks; b++)
      if (u.high[b] >= FQ_INFINITY_BITS)
        FQ_NAME(note_bad_weights)(job, begin, end, result); /* pieces lie across the order of the weights */
    parameters_16(job, &u, 0);
    memcpy(scales + col / FQ_EDGE, u.scale, (size_t)blocks * sizeof(float));
    spread(&u, blocks, FQ_EDGE / FQ_BLOCK);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t at = begin + row * cols + col;
      const char *x = weights_span(job, at, width, buffer);
      fetcher next = fetch_from(job, col + width < cols ? at + width : at - col + FQ_EDGE * cols);
      int8_t *codes = stay_in_place(job, job->data + at, width) ? (int8_t *)job->data + at : bytes;
      u.streams = data_stream(job) && codes != bytes;
      if (!u.streams)
        fetch_codes(job, at + FQ_ROWS_AHEAD * cols);
      quantizer(job, &next, x, padded, &u, codes, wide, again);
      packer(job, at, width, codes);
      if (job->measure)
        measure(wide_span(job, x, wide), again, round_up(width, FQ_LANES), &next, result);
    }
  }
}

#endif
