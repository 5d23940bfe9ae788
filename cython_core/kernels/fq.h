/* The kernels' interface: plain C, no Python, no Arrow. One table of functions per instruction set (dispatch.c).
 *
 * A job is one layer. Its weights are a row-major matrix, read once and never aligned. Work is cut into tiles of about
 * 65536 weights, tiles into spans of at most 2048 that stay in the first-level cache while they are loaded, reduced,
 * quantized, packed and measured. The cut depends on the layer's shape alone (flightquant/reference/quality.py), so
 * that every result is the same bits for every instruction set and number of threads. With a scale for each block of
 * 128x128 weights, a tile is a strip of 128 rows, and spans are pieces of rows (blocks.h).
 *
 * Weights may hold anything, NaN included: a span with a non-finite weight is reported in first_bad and its output is
 * unspecified (the caller clears it), but no operation on it is undefined.
 */
#ifndef FQ_H
#define FQ_H

#include <stdint.h>

enum { FQ_SPAN = 2048, FQ_TILE = 65536, FQ_LANES = 16, FQ_SHRINKS = 25, FQ_REPACK_ROWS = 128, FQ_EDGE = 128 };

enum fq_dtype { FQ_F32, FQ_F16, FQ_BF16, FQ_F64 };

enum fq_family {
  FQ_INTEGER,
  FQ_Q8_0,
  FQ_Q4_0,
  FQ_Q4_1,
  FQ_Q5_0,
  FQ_Q5_1,
  FQ_FP8_E4M3,
  FQ_FP8_E5M2,
  FQ_NF4,
  FQ_FP4,
  FQ_Q2_K,
  FQ_Q3_K,
  FQ_Q4_K,
  FQ_Q5_K,
  FQ_Q6_K,
  FQ_IQ4_NL,
  FQ_MXFP4,
  FQ_MXFP8,
  FQ_NVFP4,
  FQ_ARROWQUANT,
  FQ_MLX,
  FQ_BNB8,
  FQ_ONNX,
  FQ_FBGEMM,
  FQ_MXFP4_GGML,
  FQ_HQQ
};

/* Layouts into which packed integers are turned after all tiles (repack.c); with FQ_NESTED, scales are (nest),
 * with FQ_ZEROS_BEHIND only zero points are packed then, with FQ_FOLDED bytes of one code each (hqq.c). */
enum fq_packing { FQ_AS_PACKED, FQ_GPTQ, FQ_GPTQ_V2, FQ_AWQ, FQ_NESTED, FQ_ZEROS_BEHIND, FQ_FOLDED };

typedef struct fq_job {
  const void *weights; /* n weights of dtype, at any address */
  uint8_t *data;       /* packed bytes */
  float *scales;       /* one per group, or one in all if shared_scale; null where they live inside data. Of FQ_NVFP4
                          one of the whole tensor follows, which parameters writes before quantize reads it. */
  float *zeros;        /* zero points, likewise; null if symmetric */
  const float *importance; /* what an error in each column counts, in searches; null if all count alike */
  int64_t n;               /* weights in all: rows * cols, > 0 */
  int64_t unit;            /* weights of a group or block, of two groups of 16; of a row if there are no groups */
  int64_t group;           /* weights under one scale: a unit, or one of two groups of 16 */
  int64_t cols;            /* weights of a row */
  int64_t row_bytes;       /* packed bytes of a row */
  uint8_t *packed;         /* where repack writes, or nest codes, or unpack rows; null if data is all there is */
  float *outer;            /* where nest writes the scales of scales, and their mean */
  int32_t packing;         /* enum fq_packing */
  int32_t family;          /* enum fq_family */
  int32_t dtype;           /* enum fq_dtype of the weights */
  int32_t arithmetic;      /* enum fq_dtype to which quotients are rounded: FQ_F32, or the weights' own 16-bit dtype */
  int32_t scale_dtype;     /* enum fq_dtype to which scales are rounded */
  int32_t bits;            /* of one code */
  int32_t symmetric;
  int32_t shared_scale; /* one scale for the whole layer */
  int32_t in_blocks;    /* one scale for each block of FQ_EDGE x FQ_EDGE weights, row by row of blocks */
  int32_t given_scales; /* scales and zeros are filled in already: 1 by fq_kernels.parameters from these weights' range,
                           2 from a range that may be another's */
  int32_t shrinks;      /* of integers: search the shrunk range whose squared error is the least; of FQ_HQQ: move zero
                           points by proximal steps */
  int32_t steps;        /* how many of these, as count_steps says */
  int32_t measure;      /* fill the quality sums */
  int32_t streams;      /* packed bytes are so many that they go to memory past the caches: the last ones, if data is
                           packed a second time */
  void *restored;       /* of a job to restore: n weights of restored_dtype, at any address; null to measure alone */
  int32_t restored_dtype; /* FQ_F32 or FQ_F16 */
} fq_job;

/* What is known of some weights before their scale, as bits of float32, which order like the magnitudes they stand
 * for; 0x7f800000 or more says that a weight is not finite. */
typedef struct fq_range {
  int32_t high; /* max(0, largest x); of symmetric jobs the largest |x|; see affine.c for its families */
  int32_t low;  /* max(0, largest -x); of symmetric jobs 0 */
} fq_range;

typedef struct fq_result {
  double sum_x2, sum_e2, sum_xe; /* of weights x and errors e = dequantized - x */
  float max_error;               /* largest |e| */
  fq_range range;                /* filled by reduce */
  int64_t first_bad;             /* index of the first non-finite weight, or -1 */
  int64_t nanoseconds;           /* filled by the caller */
} fq_result;

typedef struct fq_kernels {
  const char *name;
  /* The range of the weights from begin up to end. */
  void (*reduce)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
  /* Scales and zero points of count ranges, as the job's family makes them. */
  void (*parameters)(const fq_job *job, const fq_range *ranges, int64_t count, float *scales, float *zeros);
  /* The squared errors of the weights from begin up to end, a piece of one unit with this range, for each of the
   * FQ_SHRINKS factors by which a range may be shrunk; and a range shrunk by the best of them. Of FQ_HQQ, the errors
   * before each of FQ_STEPS proximal steps of whole units; and how many steps n weights with these errors take. */
  void (*search_errors)(const fq_job *job, const fq_range *range, int64_t begin, int64_t end, double *errors);
  void (*shrink_range)(const double *errors, fq_range *range);
  int (*count_steps)(const double *errors, int64_t n);
  /* Quantize the weights from begin up to end: whole units, or a piece of one if given_scales. */
  void (*quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
  /* Write the rows from one up to another, FQ_REPACK_ROWS of them or the last ones, in the job's packing; of
   * FQ_FOLDED, packed bytes or words. */
  void (*repack)(const fq_job *job, int64_t row, int64_t end);
  /* What repack has written in data, back to rows of packed codes in packed, for the same rows. */
  void (*unpack)(const fq_job *job, int64_t row, int64_t end);
  /* Quantize all scales: codes to packed, what they stand for to scales again. */
  void (*nest)(const fq_job *job);
  /* Make the weights from begin up to end, whole units or a piece of one, of data, scales and zeros (of FQ_NESTED,
   * packed and outer in place of scales; of what was unpacked, packed in place of data), which are only read and lie at
   * any address: write them if restored is given, compare them with weights if those are. */
  void (*restore)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
} fq_kernels;

/* The table of the named instruction set; null if this build or this machine lacks it. */
const fq_kernels *fq_find(const char *name);
/* Name of the i-th instruction set that this build and this machine have, best first; null past the last. */
const char *fq_available(int i);

#endif
