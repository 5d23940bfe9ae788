/* The kernels' interface: plain C, no Python, no Arrow. One table of functions per instruction set (dispatch.c).
 *
 * A job is one layer. Its weights are a row-major matrix, read once and never aligned. Work is cut into tiles of about
 * 65536 weights, tiles into spans of at most 2048 that stay in the first-level cache while they are loaded, reduced,
 * quantized, packed and measured. The cut depends on the layer's shape alone (flightquant/reference/quality.py), so
 * that every result is the same bits for every instruction set and number of threads.
 *
 * Weights may hold anything, NaN included: a span with a non-finite weight is reported in first_bad and its output is
 * unspecified (the caller clears it), but no operation on it is undefined.
 */
#ifndef FQ_H
#define FQ_H

#include <stdint.h>

enum { FQ_SPAN = 2048, FQ_TILE = 65536, FQ_LANES = 16 };

enum fq_dtype { FQ_F32, FQ_F16, FQ_BF16, FQ_F64 };

enum fq_family { FQ_INTEGER, FQ_Q8_0, FQ_Q4_0 };

typedef struct fq_job {
  const void *weights; /* n weights of dtype, at any address */
  uint8_t *data;       /* packed bytes */
  float *scales;       /* one per group, or one in all if shared_scale; null where they live inside data */
  float *zeros;        /* zero points, likewise; null if symmetric */
  int64_t n;           /* weights in all: rows * cols, > 0 */
  int64_t unit;        /* weights of a group or block; of a row if there are no groups */
  int64_t cols;        /* weights of a row */
  int64_t row_bytes;   /* packed bytes of a row */
  int32_t family;      /* enum fq_family */
  int32_t dtype;       /* enum fq_dtype of the weights */
  int32_t arithmetic;  /* enum fq_dtype to which quotients are rounded: FQ_F32, or the weights' own 16-bit dtype */
  int32_t scale_dtype; /* enum fq_dtype to which scales are rounded */
  int32_t bits;        /* of one code */
  int32_t symmetric;
  int32_t shared_scale; /* one scale for the whole layer */
  int32_t given_scales; /* scales and zeros are filled in already: 1 by fq_kernels.parameters from these weights' range,
                           2 from a range that may be another's */
  int32_t measure;      /* fill the quality sums */
} fq_job;

/* What is known of some weights before their scale, as bits of float32, which order like the magnitudes they stand
 * for; 0x7f800000 or more says that a weight is not finite. */
typedef struct fq_range {
  int32_t high; /* max(0, largest x); of symmetric jobs the largest |x| */
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
  /* Quantize the weights from begin up to end: whole units, or a piece of one if given_scales. */
  void (*quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
} fq_kernels;

/* The table of the named instruction set; null if this build or this machine lacks it. */
const fq_kernels *fq_find(const char *name);
/* Name of the i-th instruction set that this build and this machine have, best first; null past the last. */
const char *fq_available(int i);

#endif
