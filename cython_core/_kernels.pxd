"""What the modules that call the kernels share: their interface (kernels/fq.h), the tiles of jobs, a clock."""

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
        int32_t shrinks, steps, measure, restored_dtype
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

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    struct timespec:
        time_t tv_sec
        long tv_nsec
    enum:
        CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *to)


cdef inline int64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t>time.tv_sec * 1000000000 + time.tv_nsec


cdef struct Tile:
    int64_t job, begin, end


cdef const fq_kernels *kernels_of(str isa) except NULL


cdef inline int64_t cut(const fq_job *job, int64_t number, Tile *to) noexcept nogil:
    """Count a job's tiles, and write them if ``to`` is given.

    They are whole units, or parts of one; of a job with blocks, strips of whole rows.
    """
    cdef int64_t begin = 0, end, count = 0
    cdef int64_t step = FQ_TILE // job.unit * job.unit if job.unit <= FQ_TILE else FQ_TILE
    if job.in_blocks:
        step = FQ_EDGE * job.cols
    while begin < job.n:
        end = begin + step
        if job.unit > FQ_TILE and not job.in_blocks:
            end = min(end, begin - begin % job.unit + job.unit)
        end = min(end, job.n)
        if to != NULL:
            to[count].job, to[count].begin, to[count].end = number, begin, end
        count += 1
        begin = end
    return count


cdef inline int64_t cut_evenly(int64_t length, int64_t step, int64_t number, Tile *to) noexcept nogil:
    """The same of a job of which rows, or values, are taken so many at a time."""
    cdef int64_t begin = 0, count = 0
    while begin < length:
        if to != NULL:
            to[count].job, to[count].begin, to[count].end = number, begin, min(begin + step, length)
        count += 1
        begin += step
    return count


cdef inline void add_up(const fq_result *part, double *sums, int64_t *first_bad, int64_t *nanoseconds) noexcept nogil:
    """Add a tile's result to its job's: sum x^2, sum e^2, sum x*e and the largest abs(e); a job's tiles in order."""
    sums[0] += part.sum_x2
    sums[1] += part.sum_e2
    sums[2] += part.sum_xe
    if part.max_error > sums[3] or part.max_error != part.max_error:
        sums[3] = part.max_error
    if first_bad[0] < 0:
        first_bad[0] = part.first_bad
    nanoseconds[0] += part.nanoseconds
