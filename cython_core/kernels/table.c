/* One instruction set's table. */
#include "families.h"

static void reduce(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  if (job->family == FQ_ARROWQUANT)
    FQ_NAME(affine_reduce)(job, begin, end, result);
  else
    FQ_NAME(integer_reduce)(job, begin, end, result);
}

static void parameters(const fq_job *job, const fq_range *ranges, int64_t count, float *scales, float *zeros) {
  if (job->family == FQ_ARROWQUANT)
    FQ_NAME(affine_parameters)(job, ranges, count, scales, zeros);
  else if (job->family == FQ_NVFP4)
    FQ_NAME(nvfp4_parameters)(job, ranges, scales);
  else
    FQ_NAME(integer_parameters)(job, ranges, count, scales, zeros);
}

static void search_errors(const fq_job *job, const fq_range *range, int64_t begin, int64_t end, double *errors) {
  if (job->family == FQ_HQQ)
    FQ_NAME(hqq_errors)(job, begin, end, errors);
  else
    FQ_NAME(shrink_errors)(job, range, begin, end, errors);
}

static void quantize_family(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  switch (job->family) {
  case FQ_INTEGER:
    FQ_NAME(integer_quantize)(job, begin, end, result);
    break;
  case FQ_FP8_E4M3:
  case FQ_FP8_E5M2:
    FQ_NAME(float8_quantize)(job, begin, end, result);
    break;
  case FQ_NF4:
  case FQ_FP4:
    FQ_NAME(codebook_quantize)(job, begin, end, result);
    break;
  case FQ_ONNX:
    FQ_NAME(onnx_quantize)(job, begin, end, result);
    break;
  case FQ_FBGEMM:
    FQ_NAME(fbgemm_quantize)(job, begin, end, result);
    break;
  case FQ_MXFP4_GGML:
    FQ_NAME(mxfp4_ggml_quantize)(job, begin, end, result);
    break;
  case FQ_BNB8:
    FQ_NAME(dynamic8_quantize)(job, begin, end, result);
    break;
  case FQ_Q2_K:
  case FQ_Q3_K:
  case FQ_Q4_K:
  case FQ_Q5_K:
  case FQ_Q6_K:
    FQ_NAME(kquants_quantize)(job, begin, end, result);
    break;
  case FQ_IQ4_NL:
    FQ_NAME(iq4_nl_quantize)(job, begin, end, result);
    break;
  case FQ_HQQ:
    FQ_NAME(hqq_quantize)(job, begin, end, result);
    break;
  case FQ_MLX:
    FQ_NAME(mlx_quantize)(job, begin, end, result);
    break;
  case FQ_MXFP4:
  case FQ_MXFP8:
  case FQ_NVFP4:
    FQ_NAME(micro_quantize)(job, begin, end, result);
    break;
  case FQ_ARROWQUANT:
    FQ_NAME(affine_quantize)(job, begin, end, result);
    break;
  default:
    FQ_NAME(gguf_quantize)(job, begin, end, result);
  }
}

static void quantize(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  quantize_family(job, begin, end, result);
  if (job->streams)
    streams_end(); /* what comes after it comes after these stores, for other threads too */
}

static void repack_family(const fq_job *job, int64_t row, int64_t end) {
  if (job->packing == FQ_ZEROS_BEHIND)
    FQ_NAME(onnx_points)(job, row, end);
  else if (job->packing == FQ_FOLDED)
    FQ_NAME(hqq_fold)(job, row, end);
  else
    FQ_NAME(repack)(job, row, end);
}

static void repack(const fq_job *job, int64_t row, int64_t end) {
  repack_family(job, row, end);
  if (job->streams)
    streams_end();
}

#define FQ_TEXT_(name) #name
#define FQ_TEXT(name) FQ_TEXT_(name)

const fq_kernels FQ_NAME(kernels) = {
    .name = FQ_TEXT(FQ_ISA),
    .reduce = reduce,
    .parameters = parameters,
    .search_errors = search_errors,
    .shrink_range = FQ_NAME(shrink_range),
    .count_steps = FQ_NAME(count_steps),
    .quantize = quantize,
    .repack = repack,
    .nest = FQ_NAME(nest),
    .unpack = FQ_NAME(unpack),
    .restore = FQ_NAME(restore),
};
