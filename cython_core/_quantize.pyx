"""The kernels' Python face: which instruction set, and a plan of tiles that runs without the GIL.

A plan holds one job for each layer and cuts all of them into tiles, so that one large layer and many small ones both
fill the cores. The caller runs it slice by slice (``engine.py``), to look after deadlines and other callers in between.
"""

from cython.parallel cimport parallel, prange, threadid
from libc.math cimport INFINITY, NAN, isnan, log10, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import os

include "kernels.pxi"

cdef extern from *:
    """
    #ifdef __linux__
    #include <sched.h>
    static void fq_pin(int place, const int *cpus) {
      cpu_set_t mask;
      CPU_ZERO(&mask);
      CPU_SET(cpus[place], &mask);
      (void)sched_setaffinity(0, sizeof mask, &mask);
    }
    #else
    static void fq_pin(int place, const int *cpus) { (void)place, (void)cpus; }
    #endif
    """
    void fq_pin(int place, const int *cpus) noexcept nogil

DTYPES = {"float32": FQ_F32, "float16": FQ_F16, "bfloat16": FQ_BF16, "float64": FQ_F64}
FAMILIES = {  # by Scheme.family
    **{f"int{bits}": FQ_INTEGER for bits in range(2, 9)},
    "fp8_e4m3": FQ_FP8_E4M3, "fp8_e5m2": FQ_FP8_E5M2,
    "q8_0": FQ_Q8_0, "q4_0": FQ_Q4_0, "q4_1": FQ_Q4_1, "q5_0": FQ_Q5_0, "q5_1": FQ_Q5_1,
    "nf4": FQ_NF4, "fp4": FQ_FP4, "bnb8": FQ_BNB8,
    "q2_k": FQ_Q2_K, "q3_k": FQ_Q3_K, "q4_k": FQ_Q4_K, "q5_k": FQ_Q5_K, "q6_k": FQ_Q6_K, "iq4_nl": FQ_IQ4_NL,
    "mxfp4": FQ_MXFP4, "mxfp8": FQ_MXFP8, "nvfp4": FQ_NVFP4,
    "arrowquant": FQ_ARROWQUANT, "mlx": FQ_MLX, "onnx": FQ_ONNX,
    "fbgemm": FQ_FBGEMM, "mxfp4-ggml": FQ_MXFP4_GGML,
    **{f"hqq{bits}": FQ_HQQ for bits in (8, 4, 3, 2)},
}

PACKINGS = {
    "gptq": FQ_GPTQ, "gptq-v2": FQ_GPTQ_V2, "awq": FQ_AWQ, "bnb-nested": FQ_NESTED, "onnx": FQ_ZEROS_BEHIND,
    "hqq": FQ_FOLDED,
}
"""Layouts that are made of packed integers, or of scales, at the end; all others are packed as they are made."""

cdef enum:
    NESTED_BLOCK = 256

SPEC_FIELDS = (
    "family", "dtype", "arithmetic", "scale_dtype", "bits", "symmetric", "shared_scale", "group_size", "block_bytes",
    "flat", "in_blocks", "stored_bits", "packing", "row_tail", "shrinks",
)
"""Columns of the table of specs that ``lay_out`` takes; ``group_size`` 0 stands for a whole row."""

cdef enum:  # columns of a job matrix
    WEIGHTS, DATA, SCALES, ZEROS, N, UNIT, COLS, ROW_BYTES, FAMILY, DTYPE, ARITHMETIC, SCALE_DTYPE, BITS, SYMMETRIC
    SHARED_SCALE, IN_BLOCKS, DATA_BYTES, SCALE_COUNT, PACKING, SCRATCH, IMPORTANCE, SHRINKS, GROUP, JOB_COLUMNS

cdef enum:  # steps of a plan
    REDUCE, SEARCH, QUANTIZE, REPACK, NEST, COMPARE

JOB_WIDTH = JOB_COLUMNS


cdef int64_t folded(int64_t n, int64_t unit, int64_t bits) noexcept:
    """Packed bytes of n codes in groups of ``unit``, several in each; of 3 bits, words."""
    cdef int64_t fold = 2 if bits == 4 else 4 if bits == 2 else 10
    return (n // unit + fold - 1) // fold * unit


def lay_out(
    const int64_t[:, ::1] specs,
    const int64_t[::1] spec_of_row,
    const int64_t[::1] starts,
    const int64_t[::1] lengths,
    const int64_t[::1] importance,
    const int64_t[:, ::1] matrix,
    const uint8_t[::1] failed,
    int64_t[:, ::1] jobs,
    int64_t[::1] rows,
    int64_t[:, ::1] offsets,
    int64_t[::1] bytes_out,
):
    """Make one job of every row that has not failed and is not empty, and lay out the memory of the answers.

    Parameters
    ----------
    specs : int64 array of shape (specs, len(SPEC_FIELDS))
    spec_of_row : int64 array of shape (rows,)
        Index into ``specs``.
    starts, lengths : int64 array of shape (rows,)
        Address and number of the weights.
    importance : int64 array of shape (rows,)
        Address of a float32 for each column, what its errors count in searches; 0 for none.
    matrix : int64 array of shape (rows, 2)
        Rows and columns of each tensor; the columns are a multiple of the group size, except with a flat scheme.
    failed : uint8 array of shape (rows,)
    jobs : int64 array of shape (rows, JOB_WIDTH), written
        Of the jobs made; addresses of outputs are offsets in bytes, -1 for none.
    rows : int64 array of shape (rows,), written
        The row of each job.
    offsets : int64 array of shape (3, rows + 1), written
        Where each row's packed bytes, scales and zero points begin, counted in values.
    bytes_out : int64 array of shape (rows,), written
        Bytes of each row's outputs.

    Returns
    -------
    tuple of int
        Number of jobs, bytes of memory for what is packed a second time, and the sum of ``bytes_out``.
    """
    cdef int64_t scratch = 0, total = 0
    cdef Py_ssize_t count = lay_out_rows(
        specs, spec_of_row, starts, lengths, importance, matrix, failed, jobs, rows, offsets, bytes_out, &scratch,
        &total,
    )
    return count, scratch, total


cdef Py_ssize_t lay_out_rows(
    const int64_t[:, ::1] specs, const int64_t[::1] spec_of_row, const int64_t[::1] starts, const int64_t[::1] lengths,
    const int64_t[::1] importance, const int64_t[:, ::1] matrix, const uint8_t[::1] failed, int64_t[:, ::1] jobs,
    int64_t[::1] rows, int64_t[:, ::1] offsets, int64_t[::1] bytes_out, int64_t *scratch, int64_t *total,
) except -1:
    """``lay_out``; the number of jobs."""
    cdef Py_ssize_t count = 0, i
    cdef int64_t group_size, block_bytes, data, scales, zeros
    cdef const int64_t[:] spec
    cdef int64_t[:] job
    offsets[0, 0] = offsets[1, 0] = offsets[2, 0] = 0
    for i in range(lengths.shape[0]):
        data = scales = zeros = 0
        if not failed[i] and lengths[i] > 0:
            spec, job = specs[spec_of_row[i]], jobs[count]
            group_size, block_bytes = spec[7], spec[8]
            job[WEIGHTS], job[N], job[COLS] = starts[i], lengths[i], matrix[i, 1]
            job[IMPORTANCE], job[IN_BLOCKS], job[SHRINKS] = importance[i], spec[10], spec[14]
            # Units are whole vectors, two groups of 16 at a time: those of a row of an odd number join the next row's.
            job[GROUP] = group_size if group_size else matrix[i, 1]
            job[UNIT] = max(group_size, 32) if group_size else matrix[i, 1]
            job[FAMILY], job[DTYPE], job[ARITHMETIC], job[SCALE_DTYPE] = spec[0], spec[1], spec[2], spec[3]
            job[BITS], job[SYMMETRIC], job[SHARED_SCALE] = spec[4], spec[5], spec[6]
            if spec[9]:
                job[ROW_BYTES] = 0
            elif block_bytes:
                job[ROW_BYTES] = matrix[i, 1] // group_size * block_bytes
            elif spec[13]:
                job[ROW_BYTES] = matrix[i, 1] * spec[11] // 8 + spec[13]
            elif spec[11] == 8:
                job[ROW_BYTES] = matrix[i, 1]
            else:
                job[ROW_BYTES] = (matrix[i, 1] * spec[11] + 31) // 32 * 4
            data = (lengths[i] * job[BITS] + 7) // 8 if spec[9] else matrix[i, 0] * job[ROW_BYTES]
            if job[IN_BLOCKS]:
                scales = (matrix[i, 0] + FQ_EDGE - 1) // FQ_EDGE * ((matrix[i, 1] + FQ_EDGE - 1) // FQ_EDGE)
            elif not (block_bytes or spec[13]):
                scales = 1 if job[SHARED_SCALE] else (lengths[i] + job[GROUP] - 1) // job[GROUP]
                scales += job[FAMILY] == FQ_NVFP4
            if not job[SYMMETRIC]:
                zeros = scales
            job[PACKING], job[SCRATCH] = spec[12], scratch[0]
            if job[PACKING] == FQ_NESTED:
                scratch[0] += scales * 4
                data += scales
                scales = (scales + NESTED_BLOCK - 1) // NESTED_BLOCK + 1
            elif job[PACKING] == FQ_ZEROS_BEHIND and zeros:
                data += matrix[i, 0] * ((matrix[i, 1] // job[GROUP] * job[BITS] + 7) // 8)
            elif job[PACKING] == FQ_FOLDED:
                scratch[0] += data
                data = folded(lengths[i], job[UNIT], job[BITS]) * (4 if job[BITS] == 3 else 1)
            elif job[PACKING] not in (FQ_AS_PACKED, FQ_ZEROS_BEHIND):
                scratch[0] += data
                data += scales * job[BITS] // 8
            job[DATA] = offsets[0, i]
            job[SCALES] = offsets[1, i] * 4 if scales else -1
            job[ZEROS] = offsets[2, i] * 4 if zeros else -1
            job[DATA_BYTES], job[SCALE_COUNT] = data, scales
            rows[count] = i
            count += 1
        offsets[0, i + 1] = offsets[0, i] + data
        offsets[1, i + 1] = offsets[1, i] + scales
        offsets[2, i + 1] = offsets[2, i] + zeros
        bytes_out[i] = data + 4 * (scales + zeros)
        total[0] += bytes_out[i]
    return count


cdef class Layout:
    """What ``lay_out`` is given and Plan made of, for batch after batch of as many rows that have one job each.

    To ask NumPy for a dozen arrays' memory takes longer than all that is done with it.

    Parameters
    ----------
    specs, ... bytes_out
        As of :func:`lay_out`.
    given_amax : float32 array of shape (rows,)
        As of :class:`Plan`.
    """

    cdef const int64_t[:, ::1] _specs, _matrix
    cdef const int64_t[::1] _spec_of_row, _starts, _lengths, _importance
    cdef const uint8_t[::1] _failed
    cdef int64_t[:, ::1] _jobs, _offsets
    cdef int64_t[::1] _rows, _bytes_out
    cdef const float[::1] _given_amax

    def __cinit__(
        self, specs, spec_of_row, starts, lengths, importance, matrix, failed, jobs, rows, offsets, bytes_out,
        given_amax,
    ):
        self._specs, self._spec_of_row, self._starts, self._lengths = specs, spec_of_row, starts, lengths
        self._importance, self._matrix, self._failed, self._jobs = importance, matrix, failed, jobs
        self._rows, self._offsets, self._bytes_out, self._given_amax = rows, offsets, bytes_out, given_amax

    def lay_out(self):
        """``lay_out``: bytes of memory for what is packed a second time, and of all outputs."""
        cdef int64_t scratch = 0, total = 0
        lay_out_rows(
            self._specs, self._spec_of_row, self._starts, self._lengths, self._importance, self._matrix, self._failed,
            self._jobs, self._rows, self._offsets, self._bytes_out, &scratch, &total,
        )
        return scratch, total

    def plan(
        self, str isa, bint measure, uintptr_t data, uintptr_t scales, uintptr_t zeros, uintptr_t scratch, owner
    ):
        """A :class:`Plan` of what was laid out last."""
        cdef Plan plan = Plan.__new__(Plan)
        plan._make(self._jobs, self._given_amax, isa, measure, data, scales, zeros, scratch, owner)
        return plan


def pin_team(cpus):
    """Bind each thread of the calling thread's team to one of these CPUs.

    A team that wakes for a few milliseconds at a time may be left on one CPU for as long: the scheduler looks for an
    idle one only among those that share a cache.
    """
    cdef int[1024] places
    cdef int count = min(len(cpus), 1024), i
    for i in range(count):
        places[i] = cpus[i]
    with nogil, parallel(num_threads=count):
        fq_pin(threadid(), places)


def available_isas():
    """Names of the instruction sets that this build and this machine have, best first."""
    names = []
    cdef const char *name = fq_available(0)
    while name != NULL:
        names.append(name.decode())
        name = fq_available(len(names))
    return names


def _choose_isa():
    names = available_isas()
    wanted = os.environ.get("FLIGHTQUANT_ISA")
    if wanted is None:
        return names[0]
    if wanted not in names:
        raise ImportError(f"FLIGHTQUANT_ISA is {wanted!r}; expected one of {', '.join(names)} on this machine")
    return wanted


_ACTIVE = _choose_isa()


def active_isa():
    """Name of the instruction set in use: the best one, or what the environment's FLIGHTQUANT_ISA names."""
    return _ACTIVE


def quality_columns(
    const double[:, ::1] sums, float[::1] sqnr_db, float[::1] cosine, float[::1] max_abs_error
):
    """``reference.quality.columns`` of rows of sums, written into three float32 arrays of shape (rows,)."""
    cdef double x2, e2, xe, y2, angle
    cdef Py_ssize_t i
    for i in range(sums.shape[0]):
        x2, e2, xe = sums[i, 0], sums[i, 1], sums[i, 2]
        y2 = x2 + 2 * xe + e2
        max_abs_error[i] = <float>sums[i, 3]
        if x2 + e2 != x2 + e2:
            sqnr_db[i] = cosine[i] = <float>NAN
        elif e2 == 0:
            sqnr_db[i], cosine[i] = <float>INFINITY, 1
        else:
            sqnr_db[i] = <float>(10 * log10(x2 / e2))
            angle = (x2 + xe) / sqrt(x2 * y2) if x2 > 0 and y2 > 0 else 0
            cosine[i] = 1 if angle > 1 else -1 if angle < -1 else <float>angle


cdef class Plan:
    """Jobs cut into tiles; every step may run with any number of threads and gives the same bits.

    Call ``reduce`` over all of ``reduce_tiles``, then ``parameters``, then ``quantize`` over all of ``tiles``, ``nest``
    over all of ``nested`` and ``compare`` over all of ``compared`` (each in any slices), then ``finish``. ``owner``
    keeps the memory behind every address for as long as the plan lives: a caller that is interrupted may be gone before
    the kernels are.
    """

    cdef readonly int64_t tiles
    cdef readonly int64_t reduce_tiles
    cdef readonly int64_t search_tiles
    cdef readonly int64_t repack_tiles
    cdef readonly int64_t nested
    cdef readonly int64_t compared
    cdef const fq_kernels *_kernels
    cdef fq_job *_jobs
    cdef Tile *_tiles
    cdef Tile *_reduce_tiles
    cdef Tile *_repack_tiles
    cdef int64_t *_repack_ns
    cdef int64_t *_nest_ns
    cdef fq_result *_results
    cdef fq_result *_reduced
    cdef double *_errors
    cdef const int64_t[:, ::1] _matrix
    cdef const float[::1] _given_amax
    cdef object _owner
    cdef int64_t _n_jobs

    def __init__(
        self,
        const int64_t[:, ::1] jobs,
        const float[::1] given_amax,
        str isa,
        bint measure,
        uintptr_t data,
        uintptr_t scales,
        uintptr_t zeros,
        uintptr_t scratch,
        owner,
    ):
        """Plan the jobs of a matrix of shape (jobs, JOB_WIDTH), as ``lay_out`` makes it.

        Parameters
        ----------
        given_amax : float32 array of shape (jobs,)
            Magnitude to use in place of the largest one found, for symmetric jobs with one scale and for nvfp4; NaN for
            none.
        isa : str
            One of ``available_isas()``.
        measure : bool
            Fill the quality sums.
        data, scales, zeros, scratch : int
            Addresses of the memory for packed bytes, scales, zero points and what is packed a second time.
        owner : object
            What holds all memory that the jobs name.
        """
        if self._jobs != NULL:
            raise RuntimeError("a plan is made once")
        self._make(jobs, given_amax, isa, measure, data, scales, zeros, scratch, owner)

    cdef int _make(
        self, const int64_t[:, ::1] jobs, const float[::1] given_amax, str isa, bint measure, uintptr_t data,
        uintptr_t scales, uintptr_t zeros, uintptr_t scratch, owner,
    ) except -1:
        if jobs.shape[1] != JOB_COLUMNS or given_amax.shape[0] != jobs.shape[0]:
            raise ValueError(f"expected a matrix of {JOB_WIDTH} columns, got {jobs.shape[1]}")
        self._kernels = fq_find(isa.encode())
        if self._kernels == NULL:
            raise ValueError(f"instruction set {isa!r} is not one of {', '.join(available_isas())}")
        self._matrix = jobs
        self._n_jobs = jobs.shape[0]
        self._jobs = <fq_job *>calloc(max(self._n_jobs, 1), sizeof(fq_job))
        self._nest_ns = <int64_t *>calloc(max(self._n_jobs, 1), sizeof(int64_t))
        if self._jobs == NULL or self._nest_ns == NULL:
            raise MemoryError()
        self._given_amax = given_amax
        self._owner = owner
        cdef int64_t i
        for i in range(self._n_jobs):
            self._fill_job(i, measure, data, scales, zeros, scratch)
        self._cut_tiles()
        self.compared = self.tiles if self.nested and measure else 0
        return 0

    cdef void _fill_job(
        self, int64_t i, bint measure, uintptr_t data, uintptr_t scales, uintptr_t zeros, uintptr_t scratch
    ) noexcept:
        cdef fq_job *job = &self._jobs[i]
        cdef const int64_t *row = &self._matrix[i, 0]
        job.weights = <const void *><uintptr_t>row[WEIGHTS]
        job.importance = <const float *><uintptr_t>row[IMPORTANCE]
        # A magnitude that is given is used as it is: there is nothing to search.
        job.shrinks = row[SHRINKS] and not (row[SHARED_SCALE] and row[SYMMETRIC] and not isnan(self._given_amax[i]))
        job.data = <uint8_t *>(data + <uintptr_t>row[DATA])
        job.packing = row[PACKING]
        if job.packing == FQ_ZEROS_BEHIND:
            job.packed = job.data + row[N] // row[COLS] * row[ROW_BYTES]
        elif job.packing not in (FQ_AS_PACKED, FQ_NESTED):
            job.packed, job.data = job.data, <uint8_t *>(scratch + <uintptr_t>row[SCRATCH])
        job.scales = <float *>(scales + <uintptr_t>row[SCALES]) if row[SCALES] >= 0 else NULL
        job.zeros = <float *>(zeros + <uintptr_t>row[ZEROS]) if row[ZEROS] >= 0 else NULL
        job.n, job.unit, job.group, job.cols, job.row_bytes = row[N], row[UNIT], row[GROUP], row[COLS], row[ROW_BYTES]
        job.family, job.dtype, job.arithmetic = row[FAMILY], row[DTYPE], row[ARITHMETIC]
        job.scale_dtype, job.bits, job.symmetric = row[SCALE_DTYPE], row[BITS], row[SYMMETRIC]
        job.shared_scale, job.in_blocks, job.measure = row[SHARED_SCALE], row[IN_BLOCKS], measure
        if job.packing == FQ_NESTED:
            # Its weights are measured at the end, with the scales that remain.
            job.packed, job.outer, job.measure = job.data + (job.n + 1) // 2, job.scales, 0
            job.scales = <float *>(scratch + <uintptr_t>row[SCRATCH])
            self.nested = self._n_jobs

    cdef int _cut_tiles(self) except -1:
        cdef int64_t i, count = 0, reduced = 0
        for i in range(self._n_jobs):
            count += self._cut(i, NULL, 0)
            if self._needs_reduce(i):
                reduced += self._cut(i, NULL, 0)
        self._tiles = <Tile *>calloc(max(count, 1), sizeof(Tile))
        self._results = <fq_result *>calloc(max(count, 1), sizeof(fq_result))
        self._reduce_tiles = <Tile *>calloc(max(reduced, 1), sizeof(Tile))
        self._reduced = <fq_result *>calloc(max(reduced, 1), sizeof(fq_result))
        if self._tiles == NULL or self._results == NULL or self._reduce_tiles == NULL or self._reduced == NULL:
            raise MemoryError()
        for i in range(self._n_jobs):
            self.tiles += self._cut(i, self._tiles, self.tiles)
            if self._needs_reduce(i):
                self.reduce_tiles += self._cut(i, self._reduce_tiles, self.reduce_tiles)
        for i in range(self.reduce_tiles):
            if self._jobs[self._reduce_tiles[i].job].shrinks:
                self.search_tiles = self.reduce_tiles
        self._errors = <double *>calloc(max(self.search_tiles, 1), FQ_SHRINKS * sizeof(double))
        if self._errors == NULL:
            raise MemoryError()
        for i in range(self._n_jobs):
            self.repack_tiles += self._cut_rows(i, NULL, 0)
        self._repack_tiles = <Tile *>calloc(max(self.repack_tiles, 1), sizeof(Tile))
        self._repack_ns = <int64_t *>calloc(max(self.repack_tiles, 1), sizeof(int64_t))
        if self._repack_tiles == NULL or self._repack_ns == NULL:
            raise MemoryError()
        count = 0
        for i in range(self._n_jobs):
            count += self._cut_rows(i, self._repack_tiles, count)
        for i in range(self.tiles):
            self._results[i].first_bad = -1
        for i in range(self.reduce_tiles):
            self._reduced[i].first_bad = -1
        return 0

    cdef bint _needs_reduce(self, int64_t i) noexcept:
        cdef const fq_job *job = &self._jobs[i]
        if job.family == FQ_NVFP4:
            return isnan(self._given_amax[i])
        if job.family == FQ_HQQ:
            return job.shrinks
        if job.in_blocks or job.family not in (FQ_INTEGER, FQ_FP8_E4M3, FQ_FP8_E5M2, FQ_ARROWQUANT):
            return False
        return job.shared_scale or job.unit > FQ_TILE

    cdef int64_t _cut(self, int64_t i, Tile *to, int64_t at) noexcept:
        """Count a job's tiles, and write them from index ``at`` on if ``to`` is given.

        They are whole units, or parts of one; of a job with blocks, strips of whole rows.
        """
        cdef const fq_job *job = &self._jobs[i]
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
                to[at + count].job, to[at + count].begin, to[at + count].end = i, begin, end
            count += 1
            begin = end
        return count

    cdef int64_t _cut_rows(self, int64_t i, Tile *to, int64_t at) noexcept:
        """The same of a job that is packed a second time, in rows, or packed values where they are folded."""
        cdef const fq_job *job = &self._jobs[i]
        cdef int64_t begin = 0, count = 0, rows = job.n // job.cols, step = FQ_REPACK_ROWS
        if job.packing in (FQ_AS_PACKED, FQ_NESTED) or (job.packing == FQ_ZEROS_BEHIND and job.zeros == NULL):
            return 0
        if job.packing == FQ_FOLDED:
            rows, step = folded(job.n, job.unit, job.bits), FQ_TILE
        while begin < rows:
            if to != NULL:
                to[at + count].job, to[at + count].begin = i, begin
                to[at + count].end = min(begin + step, rows)
            count += 1
            begin += step
        return count

    def __dealloc__(self):
        free(self._jobs)
        free(self._tiles)
        free(self._results)
        free(self._reduce_tiles)
        free(self._reduced)
        free(self._errors)
        free(self._repack_tiles)
        free(self._repack_ns)
        free(self._nest_ns)

    cdef int _each(self, int step, int64_t first, int64_t last, int64_t count, int n_threads) except -1:
        """Take one step of the tiles, or jobs, from ``first`` up to ``last`` of so many."""
        cdef int64_t i
        if not 0 <= first <= last <= count:
            raise IndexError(f"{first} to {last} of {count}")
        with nogil:
            for i in prange(first, last, num_threads=n_threads, schedule="dynamic", chunksize=1):
                self._one(step, i)
        return 0

    cdef void _one(self, int step, int64_t i) noexcept nogil:
        if step == REDUCE:
            self._reduce_one(i)
        elif step == SEARCH:
            self._search_one(i)
        elif step == QUANTIZE:
            self._quantize_one(i)
        elif step == REPACK:
            self._repack_one(i)
        elif step == NEST:
            self._nest_one(i)
        else:
            self._compare_one(i)

    def reduce(self, int64_t first, int64_t last, int n_threads):
        """Ranges of the tiles from ``first`` up to ``last`` of those whose scale covers more than one tile."""
        self._each(REDUCE, first, last, self.reduce_tiles, n_threads)

    cdef void _reduce_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        cdef Tile *tile = &self._reduce_tiles[i]
        if self._jobs[tile.job].family == FQ_HQQ:  # it is only searched: each of its spans finds its own ranges
            return
        self._kernels.reduce(&self._jobs[tile.job], tile.begin, tile.end, &self._reduced[i])
        self._reduced[i].nanoseconds = now() - start

    def search(self, int64_t first, int64_t last, int n_threads):
        """Errors of shrunk ranges, or of steps, for the tiles from ``first`` up to ``last``, those of ``reduce``."""
        if first == 0:
            self._share_ranges()
        self._each(SEARCH, first, last, self.search_tiles, n_threads)

    cdef int64_t _unit(self, int64_t i) noexcept nogil:
        """The unit of its job that a tile of ``reduce`` belongs to."""
        cdef const Tile *tile = &self._reduce_tiles[i]
        cdef const fq_job *job = &self._jobs[tile.job]
        return 0 if job.shared_scale or job.family in (FQ_NVFP4, FQ_HQQ) else tile.begin // job.unit

    cdef void _share_ranges(self) noexcept:
        """Give every tile the range of its whole unit."""
        cdef int64_t i = 0, first, end
        cdef fq_range range_
        while i < self.reduce_tiles:
            first, end, range_ = i, i, self._reduced[i].range
            while (
                end < self.reduce_tiles
                and self._reduce_tiles[end].job == self._reduce_tiles[first].job
                and self._unit(end) == self._unit(first)
            ):
                range_.high = max(range_.high, self._reduced[end].range.high)
                range_.low = max(range_.low, self._reduced[end].range.low)
                end += 1
            for i in range(first, end):
                self._reduced[i].range = range_
            i = end

    cdef void _search_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        cdef Tile *tile = &self._reduce_tiles[i]
        cdef fq_job *job = &self._jobs[tile.job]
        if job.shrinks:
            self._kernels.search_errors(
                job, &self._reduced[i].range, tile.begin, tile.end, self._errors + i * FQ_SHRINKS)
            self._reduced[i].nanoseconds += now() - start

    def magnitudes(self, float[::1] amax, int64_t[::1] first_bad, int64_t[::1] nanoseconds):
        """The largest magnitude of each job, all of which are symmetric with one scale, after ``reduce``.

        Parameters
        ----------
        amax : float32 array of shape (jobs,), written
        first_bad, nanoseconds : int64 array of shape (jobs,), written
            As of ``finish``.
        """
        cdef int64_t i, j
        cdef fq_range range_
        cdef fq_result *part
        if amax.shape[0] != self._n_jobs or first_bad.shape[0] != self._n_jobs or nanoseconds.shape[0] != self._n_jobs:
            raise ValueError(f"expected outputs of {self._n_jobs} values")
        for j in range(self._n_jobs):
            amax[j], first_bad[j], nanoseconds[j] = 0, -1, 0
        for i in range(self.reduce_tiles):
            part, j = &self._reduced[i], self._reduce_tiles[i].job
            memcpy(&range_.high, &amax[j], sizeof(float))
            range_.high = max(range_.high, part.range.high)
            memcpy(&amax[j], &range_.high, sizeof(float))
            if first_bad[j] < 0:
                first_bad[j] = part.first_bad
            nanoseconds[j] += part.nanoseconds

    def parameters(self):
        """Scales and zero points of the reduced jobs, from the ranges of their tiles; the whole tensor's of nvfp4.

        Of HQQ's, how many steps their zero points are moved.
        """
        cdef int64_t i = 0, j, k, unit
        cdef float given
        cdef bint elsewhere
        cdef fq_job *job
        cdef fq_range range_
        cdef fq_result *found
        cdef double[FQ_SHRINKS] errors
        while i < self.reduce_tiles:
            j = self._reduce_tiles[i].job
            job = &self._jobs[j]
            unit = self._unit(i)
            range_ = self._reduced[i].range
            memset(errors, 0, sizeof(errors))
            while (
                i < self.reduce_tiles
                and j == self._reduce_tiles[i].job
                and unit == self._unit(i)
            ):
                found = &self._reduced[i]
                range_.high = max(range_.high, found.range.high)
                range_.low = max(range_.low, found.range.low)
                if job.shrinks:
                    for k in range(FQ_SHRINKS):
                        errors[k] += self._errors[i * FQ_SHRINKS + k]
                i += 1
            if job.family == FQ_NVFP4:
                self._whole_scale(j, &range_)
                continue
            if job.family == FQ_HQQ:
                job.steps = self._kernels.count_steps(errors, job.n)
                continue
            given = self._given_amax[j]
            elsewhere = job.shared_scale and job.symmetric and given == given
            if elsewhere:
                memcpy(&range_.high, &given, sizeof(given))
            if job.shrinks:
                self._kernels.shrink_range(errors, &range_)
            self._kernels.parameters(
                job, &range_, 1, job.scales + unit, NULL if job.zeros == NULL else job.zeros + unit)
            job.given_scales = 2 if elsewhere or job.shrinks else 1
        for j in range(self._n_jobs):
            given = self._given_amax[j]
            if self._jobs[j].family == FQ_NVFP4 and given == given:
                memcpy(&range_.high, &given, sizeof(given))
                self._whole_scale(j, &range_)

    cdef void _whole_scale(self, int64_t j, const fq_range *magnitude) noexcept:
        """The scale of the whole tensor stands behind the groups'."""
        cdef fq_job *job = &self._jobs[j]
        self._kernels.parameters(job, magnitude, 1, job.scales + self._matrix[j, SCALE_COUNT] - 1, NULL)

    def quantize(self, int64_t first, int64_t last, int n_threads):
        """Quantize the tiles from ``first`` up to ``last``."""
        self._each(QUANTIZE, first, last, self.tiles, n_threads)

    cdef void _quantize_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        # Backwards after ranges were found: what was read last is still in the caches.
        cdef int64_t place = self.tiles - 1 - i if self.reduce_tiles else i
        cdef Tile *tile = &self._tiles[place]
        self._kernels.quantize(&self._jobs[tile.job], tile.begin, tile.end, &self._results[place])
        self._results[place].nanoseconds = now() - start

    def repack(self, int64_t first, int64_t last, int n_threads):
        """Write what was packed in the layouts that need all of it, for the tiles from ``first`` up to ``last``."""
        self._each(REPACK, first, last, self.repack_tiles, n_threads)

    cdef void _repack_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        cdef Tile *tile = &self._repack_tiles[i]
        self._kernels.repack(&self._jobs[tile.job], tile.begin, tile.end)
        self._repack_ns[i] = now() - start

    def nest(self, int64_t first, int64_t last, int n_threads):
        """Quantize the scales of those jobs from ``first`` up to ``last`` whose scales are quantized too."""
        self._each(NEST, first, last, self.nested, n_threads)

    cdef void _nest_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        if self._jobs[i].packing == FQ_NESTED:
            self._kernels.nest(&self._jobs[i])
            self._nest_ns[i] = now() - start

    def compare(self, int64_t first, int64_t last, int n_threads):
        """Measure the weights of these jobs, for the tiles from ``first`` up to ``last``."""
        self._each(COMPARE, first, last, self.compared, n_threads)

    cdef void _compare_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        cdef Tile *tile = &self._tiles[i]
        if self._jobs[tile.job].packing == FQ_NESTED:
            self._kernels.restore(&self._jobs[tile.job], tile.begin, tile.end, &self._results[i])
            self._results[i].nanoseconds += now() - start

    def finish(
        self, double[:, ::1] sums, int64_t[::1] first_bad, int64_t[::1] unheld, int64_t[::1] nanoseconds
    ):
        """Add the tiles' results up, in their order, and clear the output of jobs that failed.

        Parameters
        ----------
        sums : float64 array of shape (jobs, 4), written
            sum x^2, sum e^2, sum x*e, largest abs(e).
        first_bad : int64 array of shape (jobs,), written
            Index of the first non-finite weight, or -1.
        unheld : int64 array of shape (jobs,), written
            Index of the first zero point that the packing cannot hold, or -1.
        nanoseconds : int64 array of shape (jobs,), written
            Time that threads spent on the job.

        Returns
        -------
        tuple of int
            Number of jobs that failed, and the sum of ``nanoseconds``.
        """
        if sums.shape[0] < self._n_jobs or sums.shape[1] != 4:
            raise ValueError("sums has another shape than (jobs, 4)")
        if first_bad.shape[0] < self._n_jobs or unheld.shape[0] < self._n_jobs or nanoseconds.shape[0] < self._n_jobs:
            raise ValueError("an output is shorter than the jobs")
        cdef int64_t i, j, failed = 0, spent = 0
        cdef fq_result *part
        for j in range(self._n_jobs):
            sums[j, 0] = sums[j, 1] = sums[j, 2] = sums[j, 3] = 0
            first_bad[j] = -1
            nanoseconds[j] = self._nest_ns[j]
        for i in range(self.reduce_tiles):
            nanoseconds[self._reduce_tiles[i].job] += self._reduced[i].nanoseconds
        for i in range(self.tiles):
            part, j = &self._results[i], self._tiles[i].job
            sums[j, 0] += part.sum_x2
            sums[j, 1] += part.sum_e2
            sums[j, 2] += part.sum_xe
            if part.max_error > sums[j, 3] or part.max_error != part.max_error:
                sums[j, 3] = part.max_error
            if first_bad[j] < 0:
                first_bad[j] = part.first_bad
            nanoseconds[j] += part.nanoseconds
        for i in range(self.repack_tiles):
            nanoseconds[self._repack_tiles[i].job] += self._repack_ns[i]
        for i in range(self.reduce_tiles):
            part, j = &self._reduced[i], self._reduce_tiles[i].job
            if part.first_bad >= 0 and (first_bad[j] < 0 or part.first_bad < first_bad[j]):
                first_bad[j] = part.first_bad
        for j in range(self._n_jobs):
            unheld[j] = self._first_unheld(j)
            spent += nanoseconds[j]
            if first_bad[j] >= 0 or unheld[j] >= 0:
                failed += 1
                self._clear(j)
        return failed, spent

    cdef int64_t _first_unheld(self, int64_t j) noexcept:
        """GPTQ's first version stores zero points, counted from the lowest code up, less 1: the lowest has no place."""
        cdef const fq_job *job = &self._jobs[j]
        cdef int64_t i
        if job.packing == FQ_GPTQ and job.zeros != NULL:
            for i in range(self._matrix[j, SCALE_COUNT]):
                if job.zeros[i] == -(1 << (job.bits - 1)):
                    return i
        return -1

    cdef void _clear(self, int64_t j) noexcept:
        """What a refused layer leaves must hold nothing of it, nor of the memory's last user."""
        cdef int64_t count = self._matrix[j, SCALE_COUNT]
        cdef fq_job *job = &self._jobs[j]
        cdef bint twice = job.packing in (FQ_GPTQ, FQ_GPTQ_V2, FQ_AWQ, FQ_FOLDED)
        cdef uint8_t *data = job.packed if twice else job.data
        cdef float *scales = job.outer if job.outer != NULL else job.scales
        memset(data, 0, self._matrix[j, DATA_BYTES])
        if scales != NULL:
            memset(scales, 0, count * sizeof(float))
        if self._jobs[j].zeros != NULL:
            memset(self._jobs[j].zeros, 0, count * sizeof(float))
