# What plans and restorers share: the kernels, tiles of jobs, a clock.

from cpython.pycapsule cimport PyCapsule_GetPointer

from flightquant.cython_core._kernels import KERNELS as _KERNELS

include "kernels.pxi"

cdef extern from "<time.h>" nogil:
    ctypedef long time_t
    struct timespec:
        time_t tv_sec
        long tv_nsec
    enum:
        CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *to)


cdef int64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t>time.tv_sec * 1000000000 + time.tv_nsec


cdef struct Tile:
    int64_t job, begin, end


cdef const fq_kernels *kernels_of(str isa) except NULL:
    found = _KERNELS.get(isa)
    if found is None:
        raise ValueError(f"instruction set {isa!r} is not one of {', '.join(_KERNELS)}")
    return <const fq_kernels *>PyCapsule_GetPointer(found, "fq_kernels")


cdef int64_t cut(const fq_job *job, int64_t number, Tile *to) noexcept nogil:
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


cdef int64_t cut_evenly(int64_t length, int64_t step, int64_t number, Tile *to) noexcept nogil:
    """The same of a job of which rows, or values, are taken so many at a time."""
    cdef int64_t begin = 0, count = 0
    while begin < length:
        if to != NULL:
            to[count].job, to[count].begin, to[count].end = number, begin, min(begin + step, length)
        count += 1
        begin += step
    return count


cdef void add_up(const fq_result *part, double *sums, int64_t *first_bad, int64_t *nanoseconds) noexcept nogil:
    """Add a tile's result to its job's: sum x^2, sum e^2, sum x*e and the largest abs(e); a job's tiles in order."""
    sums[0] += part.sum_x2
    sums[1] += part.sum_e2
    sums[2] += part.sum_xe
    if part.max_error > sums[3] or part.max_error != part.max_error:
        sums[3] = part.max_error
    if first_bad[0] < 0:
        first_bad[0] = part.first_bad
    nanoseconds[0] += part.nanoseconds
