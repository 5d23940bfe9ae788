"""A plan of tiles that runs without the GIL.

It holds one job for each layer and cuts all of them into tiles, so that one large layer and many small ones both
fill the cores. The caller runs it slice by slice (``engine.py``), to look after deadlines and other callers in between.
"""

from cython.parallel cimport prange
from libc.math cimport INFINITY, NAN, isnan, log10, sqrt
from libc.stdint cimport int64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

include "tiles.pxi"
include "layout.pxi"

#: Plans of so many weights or more store packed bytes past the caches, which could not keep them (ADR 6).
STREAM_FROM = 4 << 20

cdef enum:  # steps of a plan
    REDUCE, SEARCH, QUANTIZE, REPACK, NEST, COMPARE


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
            One of ``_kernels.available_isas()``.
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
        self._kernels = kernels_of(isa)
        self._matrix = jobs
        self._n_jobs = jobs.shape[0]
        self._jobs = <fq_job *>calloc(max(self._n_jobs, 1), sizeof(fq_job))
        self._nest_ns = <int64_t *>calloc(max(self._n_jobs, 1), sizeof(int64_t))
        if self._jobs == NULL or self._nest_ns == NULL:
            raise MemoryError()
        self._given_amax = given_amax
        self._owner = owner
        cdef int64_t i, size = 0
        for i in range(self._n_jobs):
            self._fill_job(i, measure, data, scales, zeros, scratch)
            size += self._jobs[i].n
        cdef bint large = size >= <int64_t>STREAM_FROM
        for i in range(self._n_jobs):
            self._jobs[i].streams = large
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
        cdef int64_t i, tiles, count = 0, reduced = 0
        for i in range(self._n_jobs):
            tiles = cut(&self._jobs[i], i, NULL)
            count += tiles
            if self._needs_reduce(i):
                reduced += tiles
        self._tiles = <Tile *>calloc(max(count, 1), sizeof(Tile))
        self._results = <fq_result *>calloc(max(count, 1), sizeof(fq_result))
        self._reduce_tiles = <Tile *>calloc(max(reduced, 1), sizeof(Tile))
        self._reduced = <fq_result *>calloc(max(reduced, 1), sizeof(fq_result))
        if self._tiles == NULL or self._results == NULL or self._reduce_tiles == NULL or self._reduced == NULL:
            raise MemoryError()
        for i in range(self._n_jobs):
            self.tiles += cut(&self._jobs[i], i, self._tiles + self.tiles)
            if self._needs_reduce(i):
                self.reduce_tiles += cut(&self._jobs[i], i, self._reduce_tiles + self.reduce_tiles)
        for i in range(self.reduce_tiles):
            if self._jobs[self._reduce_tiles[i].job].shrinks:
                self.search_tiles = self.reduce_tiles
        self._errors = <double *>calloc(max(self.search_tiles, 1), FQ_SHRINKS * sizeof(double))
        if self._errors == NULL:
            raise MemoryError()
        for i in range(self._n_jobs):
            self.repack_tiles += self._cut_rows(i, NULL)
        self._repack_tiles = <Tile *>calloc(max(self.repack_tiles, 1), sizeof(Tile))
        self._repack_ns = <int64_t *>calloc(max(self.repack_tiles, 1), sizeof(int64_t))
        if self._repack_tiles == NULL or self._repack_ns == NULL:
            raise MemoryError()
        count = 0
        for i in range(self._n_jobs):
            count += self._cut_rows(i, self._repack_tiles + count)
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

    cdef int64_t _cut_rows(self, int64_t i, Tile *to) noexcept:
        """Tiles of a job that is packed a second time: rows, or packed values where they are folded."""
        cdef const fq_job *job = &self._jobs[i]
        if job.packing in (FQ_AS_PACKED, FQ_NESTED) or (job.packing == FQ_ZEROS_BEHIND and job.zeros == NULL):
            return 0
        if job.packing == FQ_FOLDED:
            return cut_evenly(folded(job.n, job.unit, job.bits), FQ_TILE, i, to)
        return cut_evenly(job.n // job.cols, FQ_REPACK_ROWS, i, to)

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
        cdef Tile *tile = &self._tiles[i]
        self._kernels.quantize(&self._jobs[tile.job], tile.begin, tile.end, &self._results[i])
        self._results[i].nanoseconds = now() - start

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
            j = self._tiles[i].job
            add_up(&self._results[i], &sums[j, 0], &first_bad[j], &nanoseconds[j])
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
