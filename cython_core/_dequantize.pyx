"""The kernels' way back: jobs that make weights of packed bytes, cut into tiles that run without the GIL."""

from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc

include "tiles.pxi"

RESTORE_FIELDS = (
    "weights", "data", "scales", "zeros", "restored", "n", "unit", "cols", "row_bytes", "family", "dtype", "bits",
    "shared_scale", "restored_dtype", "packing", "in_blocks", "group",
)
"""Columns of the matrix of jobs that :class:`Restorer` takes. The first five are addresses, 0 for none; the others are
those of ``fq_job`` (kernels/fq.h)."""

cdef enum:
    WEIGHTS, DATA, SCALES, ZEROS, RESTORED, N, UNIT, COLS, ROW_BYTES, FAMILY, DTYPE, BITS, SHARED_SCALE, RESTORED_DTYPE
    PACKING, IN_BLOCKS, GROUP, JOB_COLUMNS


cdef class Restorer:
    """Jobs cut into tiles; every step may run with any number of threads and gives the same bits.

    Call ``unpack`` over all of ``unpack_tiles``, then ``run`` over all of ``tiles`` (each in any slices), then
    ``finish``.

    ``owner`` keeps the memory behind every address for as long as this lives: a caller that is interrupted may be gone
    before the kernels are.
    """

    cdef readonly int64_t tiles
    cdef readonly int64_t unpack_tiles
    cdef const fq_kernels *_kernels
    cdef fq_job *_jobs
    cdef Tile *_tiles
    cdef Tile *_unpack_tiles
    cdef int64_t *_unpack_ns
    cdef uint8_t *_unpacked
    cdef fq_result *_results
    cdef object _owner
    cdef int64_t _n_jobs

    def __cinit__(self, const int64_t[:, ::1] jobs, str isa, owner):
        """Plan jobs of shape (jobs, len(RESTORE_FIELDS)), each of a value of ``FAMILIES``.

        A job with ``restored`` writes its weights there; one with ``weights`` compares them with those.
        """
        if jobs.shape[1] != JOB_COLUMNS:
            raise ValueError(f"expected a matrix of {len(RESTORE_FIELDS)} columns, got {jobs.shape[1]}")
        self._kernels = kernels_of(isa)
        self._n_jobs = jobs.shape[0]
        self._owner = owner
        self._jobs = <fq_job *>calloc(max(self._n_jobs, 1), sizeof(fq_job))
        if self._jobs == NULL:
            raise MemoryError()
        cdef int64_t i, count = 0
        for i in range(self._n_jobs):
            self._fill_job(i, &jobs[i, 0])
            count += cut(&self._jobs[i], i, NULL)
        self._tiles = <Tile *>calloc(max(count, 1), sizeof(Tile))
        self._results = <fq_result *>calloc(max(count, 1), sizeof(fq_result))
        if self._tiles == NULL or self._results == NULL:
            raise MemoryError()
        for i in range(self._n_jobs):
            self.tiles += cut(&self._jobs[i], i, self._tiles + self.tiles)
        for i in range(self.tiles):
            self._results[i].first_bad = -1
        self._lay_out_unpacked()

    cdef void _fill_job(self, int64_t i, const int64_t *row) noexcept:
        cdef fq_job *job = &self._jobs[i]
        job.weights = <const void *><uintptr_t>row[WEIGHTS]
        job.data = <uint8_t *><uintptr_t>row[DATA]
        job.scales = <float *><uintptr_t>row[SCALES]
        job.zeros = <float *><uintptr_t>row[ZEROS]
        job.restored = <void *><uintptr_t>row[RESTORED]
        job.n, job.unit, job.cols, job.row_bytes = row[N], row[UNIT], row[COLS], row[ROW_BYTES]
        job.family, job.dtype, job.bits = row[FAMILY], row[DTYPE], row[BITS]
        job.shared_scale, job.restored_dtype, job.packing = row[SHARED_SCALE], row[RESTORED_DTYPE], row[PACKING]
        job.in_blocks, job.group = row[IN_BLOCKS], row[GROUP]
        if job.packing == FQ_NESTED:
            job.packed, job.outer, job.scales = job.data + (job.n + 1) // 2, job.scales, NULL

    cdef int _lay_out_unpacked(self) except -1:
        """Memory and tiles of the jobs whose codes are turned to rows first: as many bytes as they are given in."""
        cdef int64_t i, rows, count = 0, nbytes = 0
        cdef fq_job *job
        for i in range(self._n_jobs):
            job = &self._jobs[i]
            if job.packing in (FQ_GPTQ, FQ_GPTQ_V2, FQ_AWQ):
                rows = job.n // job.cols
                nbytes += rows * job.row_bytes
                count += cut_evenly(rows, FQ_REPACK_ROWS, i, NULL)
        self._unpacked = <uint8_t *>malloc(max(nbytes, 1))
        self._unpack_tiles = <Tile *>calloc(max(count, 1), sizeof(Tile))
        self._unpack_ns = <int64_t *>calloc(max(count, 1), sizeof(int64_t))
        if self._unpacked == NULL or self._unpack_tiles == NULL or self._unpack_ns == NULL:
            raise MemoryError()
        nbytes = 0
        for i in range(self._n_jobs):
            job = &self._jobs[i]
            if job.packing in (FQ_GPTQ, FQ_GPTQ_V2, FQ_AWQ):
                job.packed = self._unpacked + nbytes
                rows = job.n // job.cols
                nbytes += rows * job.row_bytes
                self.unpack_tiles += cut_evenly(rows, FQ_REPACK_ROWS, i, self._unpack_tiles + self.unpack_tiles)
        return 0

    def __dealloc__(self):
        free(self._jobs)
        free(self._tiles)
        free(self._results)
        free(self._unpacked)
        free(self._unpack_tiles)
        free(self._unpack_ns)

    cdef int _each(self, bint unpacking, int64_t first, int64_t last, int64_t count, int n_threads) except -1:
        """Take one of the two steps of the tiles from ``first`` up to ``last`` of so many."""
        cdef int64_t i
        if not 0 <= first <= last <= count:
            raise IndexError(f"tiles {first} to {last} of {count}")
        with nogil:
            for i in prange(first, last, num_threads=n_threads, schedule="dynamic", chunksize=1):
                if unpacking:
                    self._unpack_one(i)
                else:
                    self._run_one(i)
        return 0

    def unpack(self, int64_t first, int64_t last, int n_threads):
        """Turn the tiles from ``first`` up to ``last`` of those whose codes do not lie in rows."""
        self._each(True, first, last, self.unpack_tiles, n_threads)

    cdef void _unpack_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        cdef Tile *tile = &self._unpack_tiles[i]
        self._kernels.unpack(&self._jobs[tile.job], tile.begin, tile.end)
        self._unpack_ns[i] = now() - start

    def run(self, int64_t first, int64_t last, int n_threads):
        """Restore the tiles from ``first`` up to ``last``."""
        self._each(False, first, last, self.tiles, n_threads)

    cdef void _run_one(self, int64_t i) noexcept nogil:
        cdef int64_t start = now()
        cdef Tile *tile = &self._tiles[i]
        self._kernels.restore(&self._jobs[tile.job], tile.begin, tile.end, &self._results[i])
        self._results[i].nanoseconds = now() - start

    def finish(self, double[:, ::1] sums, int64_t[::1] first_bad, int64_t[::1] nanoseconds):
        """Add the tiles' results up, in their order.

        Parameters
        ----------
        sums : float64 array of shape (jobs, 4), written
            sum x^2, sum e^2, sum x*e, largest abs(e); zeros for a job without weights to compare with.
        first_bad : int64 array of shape (jobs,), written
            Index of the first such weight that is not finite, or -1.
        nanoseconds : int64 array of shape (jobs,), written
            Time that threads spent on the job.
        """
        if sums.shape[0] < self._n_jobs or sums.shape[1] != 4:
            raise ValueError("sums has another shape than (jobs, 4)")
        if first_bad.shape[0] < self._n_jobs or nanoseconds.shape[0] < self._n_jobs:
            raise ValueError("an output is shorter than the jobs")
        cdef int64_t i, j
        for j in range(self._n_jobs):
            sums[j, 0] = sums[j, 1] = sums[j, 2] = sums[j, 3] = 0
            first_bad[j] = -1
            nanoseconds[j] = 0
        for i in range(self.unpack_tiles):
            nanoseconds[self._unpack_tiles[i].job] += self._unpack_ns[i]
        for i in range(self.tiles):
            j = self._tiles[i].job
            add_up(&self._results[i], &sums[j, 0], &first_bad[j], &nanoseconds[j])
