/* Packed integers in other layouts (flightquant/reference/packings.py): what integer.c has packed, row by row, becomes
 * GPTQ's or AWQ's transpose, and the zero points are packed behind it. An eighth of the memory that the weights take,
 * read and written once more. And the way back. */
#include "families.h"

enum { WORDS = 16, ROWS = FQ_REPACK_ROWS };

/* Column c of so many rows of words becomes line c: columns a multiple of 4, rows of 16. */
FQ_INLINE void transpose(const uint32_t *from, int64_t apart, int64_t columns, int64_t rows, uint32_t *to,
                         int64_t lines_apart) {
  for (int64_t c = 0; c < columns; c += 4) {
    for (int64_t r = 0; r < rows; r += FQ_PART) {
      pf four[4];
      pf_load_columns((const float *)(const void *)(from + r * apart + c), apart, four);
      for (int i = 0; i < 4; i++)
        memcpy(to + (c + i) * lines_apart + r, &four[i], sizeof four[i]);
    }
  }
}

/* What codes of 8 bits, which in rows are still signed, are turned with: GPTQ's count from 0 up. */
FQ_INLINE vi signs_of(const fq_job *job) { return vi_set(job->bits == 8 ? (int32_t)0x80808080 : 0); }

/* The 16 words from column `first` on of so many rows, those past the last column 0. The next ones are fetched: rows
 * lie too far apart for the processor to foresee. */
FQ_INLINE void load_words(const fq_job *job, int64_t row, int64_t rows, int64_t first, int64_t words,
                          uint32_t (*to)[WORDS]) {
  const vi signs = signs_of(job);
  for (int64_t r = 0; r < rows; r++) {
    const uint8_t *from = job->data + (row + r) * job->row_bytes + first * 4;
    vi some = vi_set(0);
    if (words == WORDS)
      memcpy(&some, from, sizeof some);
    else
      memcpy(&some, from, (size_t)words * 4);
    some = vi_xor(some, signs);
    memcpy(to[r], &some, sizeof some);
    __builtin_prefetch((const char *)((uintptr_t)from + sizeof some), 0, 2);
  }
}

/* GPTQ: word w of each row becomes line w. */
FQ_INLINE void transpose_words(const fq_job *job, int64_t row, int64_t rows, int64_t all_rows, int64_t first,
                               int64_t words, uint32_t (*from)[WORDS]) {
  uint32_t lines[WORDS][ROWS];
  transpose(from[0], WORDS, WORDS, rows, lines[0], ROWS);
  for (int64_t w = 0; w < words; w++)
    store_bytes(job->streams, job->packed + ((first + w) * all_rows + row) * 4, (const uint8_t *)lines[w], rows * 4);
}

/* One step of a transpose: of each two rows so many nibbles apart, the upper half of one changes with the lower half of
 * the other. */
#define FQ_EXCHANGE(apart, mask)                                                                                       \
  FQ_INLINE void exchange_##apart(vi *a) {                                                                             \
    for (int i = 0; i < 8; i++) {                                                                                      \
      if (i & apart)                                                                                                   \
        continue;                                                                                                      \
      const vi x = a[i], y = a[i + apart];                                                                             \
      FQ_EACH a[i].p[k] = pi_choose(pi_set(mask), x.p[k], pi_shift_left(y.p[k], 4 * apart));                           \
      FQ_EACH a[i + apart].p[k] = pi_choose(pi_set(mask), pi_shift_right(x.p[k], 4 * apart), y.p[k]);                  \
    }                                                                                                                  \
  }
FQ_EXCHANGE(4, 0x0000ffff)
FQ_EXCHANGE(2, 0x00ff00ff)
FQ_EXCHANGE(1, 0x0f0f0f0f)

/* Of eight rows of 16 words. */
FQ_INLINE void transpose_nibbles(uint32_t (*eight)[WORDS]) {
  vi rows[8];
  memcpy(rows, eight, sizeof rows);
  exchange_4(rows);
  exchange_2(rows);
  exchange_1(rows);
  memcpy(eight, rows, sizeof rows);
}

static const int awq_order[8] = {0, 2, 4, 6, 1, 3, 5, 7};

/* AWQ: of each eight rows the eight weights of a column become one word. */
FQ_INLINE void interleave_words(const fq_job *job, int64_t row, int64_t rows, int64_t all_rows, int64_t first,
                                int64_t words, uint32_t (*from)[WORDS]) {
  uint32_t eights[ROWS / 8][8][WORDS] = {0}, lines[8][WORDS][ROWS / 8];
  for (int64_t c = 0; c < rows / 8; c++) {
    for (int i = 0; i < 8; i++)
      memcpy(eights[c][i], from[c * 8 + awq_order[i]], sizeof eights[c][i]);
    transpose_nibbles(eights[c]);
  }
  transpose(eights[0][0], 8 * WORDS, 8 * WORDS, ROWS / 8, lines[0][0], ROWS / 8);
  for (int64_t k = 0; k < words * 8 && first * 8 + k < job->cols; k++)
    store_bytes(job->streams, job->packed + ((first * 8 + k) * all_rows + row) / 2,
                (const uint8_t *)lines[k % 8][k / 8], rows / 2);
}

/* GPTQ's lines, and AWQ's words of eight rows each, to 16 words or less of each row. */
FQ_INLINE void untranspose_words(const fq_job *job, int64_t row, int64_t rows, int64_t all_rows, int64_t first,
                                 int64_t words, uint32_t (*to)[WORDS]) {
  uint32_t lines[WORDS][ROWS] = {0};
  for (int64_t w = 0; w < words; w++)
    memcpy(lines[w], job->data + ((first + w) * all_rows + row) * 4, (size_t)rows * 4);
  transpose(lines[0], ROWS, rows, WORDS, to[0], WORDS);
}
FQ_INLINE void separate_words(const fq_job *job, int64_t row, int64_t rows, int64_t all_rows, int64_t first,
                              int64_t words, uint32_t (*to)[WORDS]) {
  uint32_t eights[ROWS / 8][8][WORDS], lines[8][WORDS][ROWS / 8] = {0};
  for (int64_t k = 0; k < words * 8; k++)
    memcpy(lines[k % 8][k / 8], job->data + ((first * 8 + k) * all_rows + row) / 2, (size_t)rows / 2);
  transpose(lines[0][0], ROWS / 8, ROWS / 8, 8 * WORDS, eights[0][0], 8 * WORDS);
  for (int64_t c = 0; c < rows / 8; c++) {
    transpose_nibbles(eights[c]);
    for (int i = 0; i < 8; i++)
      memcpy(to[c * 8 + awq_order[i]], eights[c][i], sizeof eights[c][i]);
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
    for (int64_t r = 0; r < rows; r++) {
      vi words_of_row;
      memcpy(&words_of_row, to[r], sizeof words_of_row);
      words_of_row = vi_xor(words_of_row, signs_of(job));
      memcpy(job->packed + (row + r) * job->row_bytes + first * 4, &words_of_row, (size_t)some * 4);
    }
  }
}
