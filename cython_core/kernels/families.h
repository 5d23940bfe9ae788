/* The functions of each family, for the table of this instruction set (table.c). */
#ifndef FQ_FAMILIES_H
#define FQ_FAMILIES_H

#include "tile.h"

enum { FQ_STEPS = 20 }; /* the most proximal steps of FQ_HQQ */

void FQ_NAME(integer_reduce)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(integer_parameters)(const fq_job *job, const fq_range *ranges, int64_t count, float *scales, float *zeros);
void FQ_NAME(integer_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
/* note_bad of weights that were not converted, in the order of the layer. */
void FQ_NAME(note_bad_weights)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(float8_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(affine_reduce)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(affine_parameters)(const fq_job *job, const fq_range *ranges, int64_t count, float *scales, float *zeros);
void FQ_NAME(affine_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
/* Codes in two's complement as the dense stream of the job's width, for other families too. */
void FQ_NAME(pack_codes)(const fq_job *job, int64_t begin, int64_t n, int8_t *codes);
void FQ_NAME(onnx_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(fbgemm_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(mxfp4_ggml_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(onnx_points)(const fq_job *job, int64_t row, int64_t end);
void FQ_NAME(hqq_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
/* The mean errors' sums of all proximal steps, whose zero points are left in the job's. */
void FQ_NAME(hqq_errors)(const fq_job *job, int64_t begin, int64_t end, double *errors);
/* Move the zero points of the groups of a span by so many steps; add what the errors before each of them sum up to. */
void FQ_NAME(take_steps)(const fq_job *job, const float *x, int64_t n, const float *factor, float *zero, int steps,
                         double *errors);
int FQ_NAME(count_steps)(const double *errors, int64_t n);
void FQ_NAME(hqq_fold)(const fq_job *job, int64_t begin, int64_t end);
void FQ_NAME(mlx_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(shrink_errors)(const fq_job *job, const fq_range *range, int64_t begin, int64_t end, double *errors);
void FQ_NAME(shrink_range)(const double *errors, fq_range *range);
/* Shrink the ranges of units that lie one after the other from weight begin of the layer on. */
void FQ_NAME(shrink_units)(const fq_job *job, const float *x, int64_t begin, int64_t units, int32_t *high,
                           int32_t *low);
void FQ_NAME(repack)(const fq_job *job, int64_t row, int64_t end);
void FQ_NAME(unpack)(const fq_job *job, int64_t row, int64_t end);
void FQ_NAME(codebook_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(dynamic8_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(nest)(const fq_job *job);
void FQ_NAME(kquants_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(iq4_nl_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(micro_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(nvfp4_parameters)(const fq_job *job, const fq_range *range, float *global);
void FQ_NAME(gguf_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);
void FQ_NAME(restore_gguf)(const fq_job *job, int64_t begin, int64_t n, float *y);
void FQ_NAME(restore)(const fq_job *job, int64_t begin, int64_t end, fq_result *result);

#endif
