/* The functions of each family, for the table of this instruction set (table.c). */
#ifndef FQ_FAMILIES_H
#define FQ_FAMILIES_H

#include "tile.h"

void FQ_NAME(integer_reduce)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(integer_parameters)(const fq_job *job, const fq_range *ranges, int64_t count, float *scales, float *zeros);
void FQ_NAME(integer_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(gguf_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);

#endif
