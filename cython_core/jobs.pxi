# The matrix of jobs that ``lay_out`` makes and a plan reads.

from libc.stdint cimport int64_t

cdef enum:  # columns of a job matrix
    WEIGHTS, DATA, SCALES, ZEROS, N, UNIT, COLS, ROW_BYTES, FAMILY, DTYPE, ARITHMETIC, SCALE_DTYPE, BITS, SYMMETRIC
    SHARED_SCALE, IN_BLOCKS, DATA_BYTES, SCALE_COUNT, PACKING, SCRATCH, IMPORTANCE, SHRINKS, GROUP, JOB_COLUMNS


cdef int64_t folded(int64_t n, int64_t unit, int64_t bits) noexcept:
    """Packed bytes of n codes in groups of ``unit``, several in each; of 3 bits, words."""
    cdef int64_t fold = 2 if bits == 4 else 4 if bits == 2 else 10
    return (n // unit + fold - 1) // fold * unit
