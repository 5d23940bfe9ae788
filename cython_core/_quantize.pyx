"""The kernels' Python face: which instruction set, and a plan of tiles that runs without the GIL.

A plan holds one job for each layer and cuts all of them into tiles, so that one large layer and many small ones both
fill the cores. The caller runs it slice by slice (``engine.py``), to look after deadlines and other callers in between.
"""

from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import os

cdef extern from "fq.h" nogil:
    enum:
        FQ_TILE
    enum fq_dtype:
        FQ_F32
        FQ_F16
        FQ_BF16
        FQ_F64
    enum fq_family:
        FQ_INTEGER
        FQ_Q8_0
        FQ_Q4_0
    ctypedef struct fq_job:
        const void *weights
        uint8_t *data
        float *scales
        float *zeros
        int64_t n, unit, cols, row_bytes
        int32_t family, dtype, arithmetic, scale_dtype, bits, symmetric, shared_scale, given_scales, measure
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
        void (*quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) noexcept nogil
    const fq_kernels *fq_find(const char *name)
    const char *fq_available(int i)

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    struct timespec:
        time_t tv_sec
        long tv_nsec
    enum:
        CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *to)

DTYPES = {"float32": FQ_F32, "float16": FQ_F16, "bfloat16": FQ_BF16, "float64": FQ_F64}
FAMILIES = {"int8": FQ_INTEGER, "int4": FQ_INTEGER, "q8_0": FQ_Q8_0, "q4_0": FQ_Q4_0}
TILE = FQ_TILE

JOB_FIELDS = (
    "weights", "data", "scales", "zeros", "n", "unit", "cols", "row_bytes", "family", "dtype", "arithmetic",
    "scale_dtype", "bits", "symmetric", "shared_scale", "measure", "data_bytes", "scale_count",
)
"""Columns of a plan's job matrix: addresses first, then what kernels/fq.h says, then the sizes of the outputs."""


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


cdef int64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t>time.tv_sec * 1000000000 + time.tv_nsec


cdef struct Tile:
    int64_t job, begin, end


cdef class Plan:
    """Jobs cut into tiles; every step may run with any number of threads and gives the same bits.

    Call ``reduce`` over all of ``reduce_tiles``, then ``parameters``, then ``quantize`` over all of ``tiles`` (both in
    any slices), then ``finish``. The memory behind every address must outlive the plan.
    """

    cdef readonly int64_t tiles
    cdef readonly int64_t reduce_tiles
    cdef const fq_kernels *_kernels
    cdef fq_job *_jobs
    cdef Tile *_tiles
    cdef Tile *_reduce_tiles
    cdef fq_result *_results
    cdef fq_result *_reduced
    cdef const int64_t[:, ::1] _matrix
    cdef const float[::1] _given_amax
    cdef int64_t _n_jobs

    def __cinit__(self, const int64_t[:, ::1] jobs, const float[::1] given_amax, str isa):
        """Plan the jobs of a matrix of shape (jobs, len(JOB_FIELDS)).

        Parameters
        ----------
        given_amax : float32 array of shape (jobs,)
            Magnitude to use in place of the largest one found, for symmetric jobs with one scale; NaN for none.
        isa : str
            One of ``available_isas()``.
        """
        if jobs.shape[1] != 18 or given_amax.shape[0] != jobs.shape[0]:
            raise ValueError(f"expected a matrix of 18 columns, got {jobs.shape[1]}")
        self._kernels = fq_find(isa.encode())
        if self._kernels == NULL:
            raise ValueError(f"instruction set {isa!r} is not one of {', '.join(available_isas())}")
        self._matrix = jobs
        self._n_jobs = jobs.shape[0]
        self._jobs = <fq_job *>calloc(max(self._n_jobs, 1), sizeof(fq_job))
        if self._jobs == NULL:
            raise MemoryError()
        cdef int64_t i
        self._given_amax = given_amax
        for i in range(self._n_jobs):
            self._fill_job(i)
        self._cut_tiles()

    cdef void _fill_job(self, int64_t i) noexcept:
        cdef fq_job *job = &self._jobs[i]
        cdef const int64_t[:] row = self._matrix[i]
        job.weights = <const void *><uintptr_t>row[0]
        job.data = <uint8_t *><uintptr_t>row[1]
        job.scales = <float *><uintptr_t>row[2]
        job.zeros = <float *><uintptr_t>row[3]
        job.n, job.unit, job.cols, job.row_bytes = row[4], row[5], row[6], row[7]
        job.family, job.dtype, job.arithmetic, job.scale_dtype = row[8], row[9], row[10], row[11]
        job.bits, job.symmetric, job.shared_scale, job.measure = row[12], row[13], row[14], row[15]

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
        for i in range(self.tiles):
            self._results[i].first_bad = -1
        for i in range(self.reduce_tiles):
            self._reduced[i].first_bad = -1
        return 0

    cdef bint _needs_reduce(self, int64_t i) noexcept:
        cdef const fq_job *job = &self._jobs[i]
        return job.family == FQ_INTEGER and (job.shared_scale or job.unit > FQ_TILE)

    cdef int64_t _cut(self, int64_t i, Tile *to, int64_t at) noexcept:
        """Count a job's tiles, and write them from index ``at`` on if ``to`` is given: whole units, or parts of one."""
        cdef const fq_job *job = &self._jobs[i]
        cdef int64_t begin = 0, end, count = 0
        cdef int64_t step = FQ_TILE // job.unit * job.unit if job.unit <= FQ_TILE else FQ_TILE
        while begin < job.n:
            end = begin + step
            if job.unit > FQ_TILE:
                end = min(end, begin - begin % job.unit + job.unit)
            end = min(end, job.n)
            if to != NULL:
                to[at + count].job, to[at + count].begin, to[at + count].end = i, begin, end
            count += 1
            begin = end
        return count

    def __dealloc__(self):
        free(self._jobs)
        free(self._tiles)
        free(self._results)
        free(self._reduce_tiles)
        free(self._reduced)

    def reduce(self, int64_t first, int64_t last, int n_threads):
        """Ranges of the tiles from ``first`` up to ``last`` of those whose scale covers more than one tile."""
        cdef int64_t i
        if not 0 <= first <= last <= self.reduce_tiles:
            raise IndexError(f"tiles {first} to {last} of {self.reduce_tiles}")
        with nogil:
            for i in prange(first, last, num_threads=n_threads, schedule="dynamic", chunksize=1):
                self._reduce_one(i)

    cdef void _reduce_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        cdef Tile *tile = &self._reduce_tiles[i]
        self._kernels.reduce(&self._jobs[tile.job], tile.begin, tile.end, &self._reduced[i])
        self._reduced[i].nanoseconds = now() - start

    def parameters(self):
        """Scales and zero points of the reduced jobs, from the ranges of their tiles."""
        cdef int64_t i = 0, j, unit
        cdef float given
        cdef fq_job *job
        cdef fq_range range_
        cdef fq_result *found
        while i < self.reduce_tiles:
            j = self._reduce_tiles[i].job
            job = &self._jobs[j]
            unit = 0 if job.shared_scale else self._reduce_tiles[i].begin // job.unit
            memset(&range_, 0, sizeof(range_))
            while (
                i < self.reduce_tiles
                and j == self._reduce_tiles[i].job
                and unit == (0 if job.shared_scale else self._reduce_tiles[i].begin // job.unit)
            ):
                found = &self._reduced[i]
                range_.high = max(range_.high, found.range.high)
                range_.low = max(range_.low, found.range.low)
                i += 1
            given = self._given_amax[j]
            if job.shared_scale and job.symmetric and given == given:
                memcpy(&range_.high, &given, sizeof(given))
            self._kernels.parameters(
                job, &range_, 1, job.scales + unit, NULL if job.zeros == NULL else job.zeros + unit)
            job.given_scales = 1

    def quantize(self, int64_t first, int64_t last, int n_threads):
        """Quantize the tiles from ``first`` up to ``last``."""
        cdef int64_t i
        if not 0 <= first <= last <= self.tiles:
            raise IndexError(f"tiles {first} to {last} of {self.tiles}")
        with nogil:
            for i in prange(first, last, num_threads=n_threads, schedule="dynamic", chunksize=1):
                self._quantize_one(i)

    cdef void _quantize_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        cdef Tile *tile = &self._tiles[i]
        self._kernels.quantize(&self._jobs[tile.job], tile.begin, tile.end, &self._results[i])
        self._results[i].nanoseconds = now() - start

    def finish(self, double[:, ::1] sums, int64_t[::1] first_bad, int64_t[::1] nanoseconds):
        """Add the tiles' results up, in their order, and clear the output of jobs with a non-finite weight.

        Parameters
        ----------
        sums : float64 array of shape (jobs, 4), written
            sum x^2, sum e^2, sum x*e, largest abs(e).
        first_bad : int64 array of shape (jobs,), written
            Index of the first non-finite weight, or -1.
        nanoseconds : int64 array of shape (jobs,), written
            Time that threads spent on the job.
        """
        if sums.shape[0] < self._n_jobs or sums.shape[1] != 4:
            raise ValueError("sums has another shape than (jobs, 4)")
        if first_bad.shape[0] < self._n_jobs or nanoseconds.shape[0] < self._n_jobs:
            raise ValueError("an output is shorter than the jobs")
        cdef int64_t i, j
        cdef fq_result *part
        for j in range(self._n_jobs):
            sums[j, 0] = sums[j, 1] = sums[j, 2] = sums[j, 3] = 0
            first_bad[j] = -1
            nanoseconds[j] = 0
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
        for i in range(self.reduce_tiles):
            part, j = &self._reduced[i], self._reduce_tiles[i].job
            if part.first_bad >= 0 and (first_bad[j] < 0 or part.first_bad < first_bad[j]):
                first_bad[j] = part.first_bad
        for j in range(self._n_jobs):
            if first_bad[j] >= 0:
                self._clear(j)

    cdef void _clear(self, int64_t j) noexcept:
        """What a refused layer leaves must hold nothing of it, nor of the memory's last user."""
        cdef int64_t count = self._matrix[j, 17]
        memset(self._jobs[j].data, 0, self._matrix[j, 16])
        if self._jobs[j].scales != NULL:
            memset(self._jobs[j].scales, 0, count * sizeof(float))
        if self._jobs[j].zeros != NULL:
            memset(self._jobs[j].zeros, 0, count * sizeof(float))
