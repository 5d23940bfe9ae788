/* Packed integers in other layouts (flightquant/reference/packings.py): what integer.c has packed, row by row, becomes
 * GPTQ's or AWQ's transpose, and the zero points are packed behind it. An eighth of the memory that the weights take,
 * read and written once more. And the way back. */
#include "families.h"

enum { WORDS = 16, ROWS = FQ_REPACK_ROWS };

/* The 16 words from column `first` on of so many rows, those past the last column 0. */
FQ_INLINE void load_words(const fq_job *job, int64_t row, int64_t rows, int64_t first, int64_t words,
                          uint32_t (*to)[WORDS]) {
  for (int64_t r = 0; r < rows; r++) {
    if (words < WORDS)
      memset(to[r], 0, sizeof to[r]);
    memcpy(to[r], job->data + (row + r) * job->row_bytes + first * 4, (size_t)words * 4);
  }
}

/* GPTQ: word w of each row becomes line w. Codes of 8 bits are still signed. */
FQ_INLINE void transpose_words(const fq_job *job, int64_t row, int64_t rows, int64_t all_rows, int64_t first,
                               int64_t words, uint32_t (*from)[WORDS]) {
  const uint32_t flip = job->bits == 8 ? 0x80808080 : 0;
  for (int64_t w = 0; w < words; w++) {
    uint32_t line[ROWS];
    for (int64_t r = 0; r < rows; r++)
      line[r] = from[r][w] ^ flip;
    memcpy(job->packed + ((first + w) * all_rows + row) * 4, line, (size_t)rows * 4);
  }
}

/* One step of a transpose: of each two rows so many nibbles apart, the upper half of one changes with the lower half of
 * the other. */
FQ_INLINE void exchange(uint32_t (*a)[WORDS], int apart, uint32_t mask) {
  for (int i = 0; i < 8; i++) {
    if (i & apart)
      continue;
    for (int w = 0; w < WORDS; w++) {
      const uint32_t x = a[i][w], y = a[i + apart][w];
      a[i][w] = (x & mask) | ((y & mask) << (4 * apart));
      a[i + apart][w] = ((x >> (4 * apart)) & mask) | (y & ~mask);
    }
  }
}

FQ_INLINE void transpose_nibbles(uint32_t (*eight)[WORDS]) {
  exchange(eight, 4, 0x0000ffff);
  exchange(eight, 2, 0x00ff00ff);
  exchange(eight, 1, 0x0f0f0f0f);
}

static const int awq_order[8] = {0, 2, 4, 6, 1, 3, 5, 7};

/* AWQ: of each eight rows the eight weights of a column become one word. */
FQ_INLINE void interleave_words(const fq_job *job, int64_t row, int64_t rows, int64_t all_rows, int64_t first,
                                int64_t words, uint32_t (*from)[WORDS]) {
  uint32_t lines[WORDS * 8][ROWS / 8], eight[8][WORDS];
  for (int64_t c = 0; c < rows / 8; c++) {
    for (int i = 0; i < 8; i++)
      memcpy(eight[i], from[c * 8 + awq_order[i]], sizeof eight[i]);
    transpose_nibbles(eight);
    for (int64_t w = 0; w < words; w++)
      for (int j = 0; j < 8; j++)
        lines[w * 8 + j][c] = eight[j][w];
  }
  for (int64_t k = 0; k < words * 8 && first * 8 + k < job->cols; k++)
    memcpy(job->packed + ((first * 8 + k) * all_rows + row) / 2, lines[k], (size_t)rows / 2);
}

/* GPTQ's lines, and AWQ's words of eight rows each, to 16 words or less of each row. */
FQ_INLINE void untranspose_words(const fq_job *job, int64_t row, int64_t rows, int64_t all_rows, int64_t first,
                                 int64_t words, uint32_t (*to)[WORDS]) {
  const uint32_t flip = job->bits == 8 ? 0x80808080 : 0;
  for (int64_t w = 0; w < words; w++) {
    uint32_t line[ROWS];
    memcpy(line, job->data + ((first + w) * all_rows + row) * 4, (size_t)rows * 4);
    for (int64_t r = 0; r < rows; r++)
      to[r][w] = line[r] ^ flip;
  }
}
FQ_INLINE void separate_words(const fq_job *job, int64_t row, int64_t rows, int64_t all_rows, int64_t first,
                              int64_t words, uint32_t (*to)[WORDS]) {
  uint32_t lines[WORDS * 8][ROWS / 8], eight[8][WORDS];
  for (int64_t k = 0; k < words * 8; k++)
    memcpy(lines[k], job->data + ((first * 8 + k) * all_rows + row) / 2, (size_t)rows / 2);
  memset(eight, 0, sizeof eight);
  for (int64_t c = 0; c < rows / 8; c++) {
    for (int64_t w = 0; w < words; w++)
      for (int j = 0; j < 8; j++)
        eight[j][w] = lines[w * 8 + j][c];
    transpose_nibbles(eight);
    for (int i = 0; i < 8; i++)
      memcpy(to[c * 8 + awq_order[i]], eight[i], sizeof eight[i]);
  }
}

/* The zero points of the rows, group by group, as a stream of the codes' width. */
FQ_INLINE void pack_points(const fq_job *job, int64_t row, int64_t rows, int64_t all_rows) {
  const int64_t groups = job->cols / job->unit;
  uint8_t *to = job->packed + all_rows * job->cols * job->bits / 8;
  const int32_t middle = 1 << (job->bits - 1), less = job->packing == FQ_GPTQ;
  for (int64_t g = 0; g < groups; g++) {
    uint8_t *line = to + (g * all_rows + row) * job->bits / 8;
    uint64_t stream = 0;
    int held = 0;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t n = row + (job->packing == FQ_AWQ ? r / 8 * 8 + awq_order[r % 8] : r);
      int32_t point = middle - less;
      if (job->zeros)
        point += (int32_t)job->zeros[n * groups + g];
      stream |= (uint64_t)((uint32_t)point & (uint32_t)(2 * middle - 1)) << held;
      held += job->bits;
      if (held >= 32) {
        const uint32_t word = (uint32_t)stream;
        memcpy(line, &word, sizeof word);
        line += sizeof word;
        stream >>= 32;
        held -= 32;
      }
    }
  }
}

void FQ_NAME(repack)(const fq_job *job, int64_t row, int64_t end) {
  const int64_t all_rows = job->n / job->cols, words = job->cols * job->bits / 32, rows = end - row;
  uint32_t from[ROWS][WORDS];
  for (int64_t first = 0; first < words; first += WORDS) {
    const int64_t some = words - first < WORDS ? words - first : WORDS;
    load_words(job, row, rows, first, some, from);
    if (job->packing == FQ_AWQ)
      interleave_words(job, row, rows, all_rows, first, some, from);
    else
      transpose_words(job, row, rows, all_rows, first, some, from);
  }
  pack_points(job, row, rows, all_rows);
}

void FQ_NAME(unpack)(const fq_job *job, int64_t row, int64_t end) {
  const int64_t all_rows = job->n / job->cols, words = job->cols * job->bits / 32, rows = end - row;
  uint32_t to[ROWS][WORDS];
  for (int64_t first = 0; first < words; first += WORDS) {
    const int64_t some = words - first < WORDS ? words - first : WORDS;
    if (job->packing == FQ_AWQ)
      separate_words(job, row, rows, all_rows, first, some, to);
    else
      untranspose_words(job, row, rows, all_rows, first, some, to);
    for (int64_t r = 0; r < rows; r++)
      memcpy(job->packed + (row + r) * job->row_bytes + first * 4, to[r], (size_t)some * 4);
  }
}
