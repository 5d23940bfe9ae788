/* One instruction set's table. */
#include "families.h"

static void quantize(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  if (job->family == FQ_INTEGER)
    FQ_NAME(integer_quantize)(job, begin, end, result);
  else
    FQ_NAME(gguf_quantize)(job, begin, end, result);
}

#define FQ_TEXT_(name) #name
#define FQ_TEXT(name) FQ_TEXT_(name)

const fq_kernels FQ_NAME(kernels) = {
    .name = FQ_TEXT(FQ_ISA),
    .reduce = FQ_NAME(integer_reduce),
    .parameters = FQ_NAME(integer_parameters),
    .quantize = quantize,
};
