# The kernels' interface: kernels/fq.h.

from libc.stdint cimport int32_t, int64_t, uint8_t

cdef extern from "fq.h" nogil:
    enum:
        FQ_TILE
        FQ_EDGE
        FQ_SHRINKS
        FQ_REPACK_ROWS
    enum fq_packing:
        FQ_AS_PACKED
        FQ_GPTQ
        FQ_GPTQ_V2
        FQ_AWQ
        FQ_NESTED
        FQ_ZEROS_BEHIND
        FQ_FOLDED
    enum fq_dtype:
        FQ_F32
        FQ_F16
        FQ_BF16
        FQ_F64
    enum fq_family:
        FQ_INTEGER
        FQ_Q8_0
        FQ_Q4_0
        FQ_Q4_1
        FQ_Q5_0
        FQ_Q5_1
        FQ_NF4
        FQ_FP4
        FQ_Q2_K
        FQ_Q3_K
        FQ_Q4_K
        FQ_Q5_K
        FQ_Q6_K
        FQ_IQ4_NL
        FQ_FP8_E4M3
        FQ_FP8_E5M2
        FQ_MXFP4
        FQ_MXFP8
        FQ_NVFP4
        FQ_ARROWQUANT
        FQ_MLX
        FQ_BNB8
        FQ_ONNX
        FQ_FBGEMM
        FQ_MXFP4_GGML
        FQ_HQQ
    ctypedef struct fq_job:
        const void *weights
        uint8_t *data
        float *scales
        float *zeros
        const float *importance
        int64_t n, unit, group, cols, row_bytes
        uint8_t *packed
        float *outer
        int32_t packing
        int32_t family, dtype, arithmetic, scale_dtype, bits, symmetric, shared_scale, in_blocks, given_scales
        int32_t shrinks, steps, measure, streams, restored_dtype
        void *restored
    ctypedef struct fq_range:
        int32_t high, low
    ctypedef struct fq_result:
        double sum_x2, sum_e2, sum_xe
        float max_error
        fq_range range
        int64_t first_bad, nanoseconds
    ctypedef struct fq_kernels:
        const char *name
        void (*reduce)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) noexcept nogil
        void (*parameters)(
            const fq_job *job, const fq_range *ranges, int64_t count, float *scales, float *zeros) noexcept nogil
        void (*search_errors)(
            const fq_job *job, const fq_range *range, int64_t begin, int64_t end, double *errors) noexcept nogil
        void (*shrink_range)(const double *errors, fq_range *range) noexcept nogil
        int (*count_steps)(const double *errors, int64_t n) noexcept nogil
        void (*quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) noexcept nogil
        void (*unpack)(const fq_job *job, int64_t row, int64_t end) noexcept nogil
        void (*repack)(const fq_job *job, int64_t row, int64_t end) noexcept nogil
        void (*nest)(const fq_job *job) noexcept nogil
        void (*restore)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) noexcept nogil
