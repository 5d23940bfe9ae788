# The jobs of a batch, and where in memory each one's answer lies.

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
