"""The usual batch, from Arrow's C structs to Arrow's C structs: some layers, nothing null, one spec, nothing to refuse.

A batch of megabytes flushes the caches, and every function of pyarrow or NumPy that is called after it waits for its
own code to come back from memory: the general path (``validate.py``, ``answer.py``) with its hundred calls took a tenth
of an exchange of 4 MiB batches. This one makes a handful. It judges nothing: a batch that is in any way unusual is left
to the general path, which knows what is wrong with it, and what is answered here has the same bytes.
"""

from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memset

import numpy as np
from pyarrow import RecordBatch

from flightquant.cython_core._memory import MIN_BYTES, OutputMemory
from flightquant.cython_core._quantize import JOB_WIDTH, Layout, quality_columns
from flightquant.cython_core.output import MAX_ANSWER_BYTES

include "arrow_abi.pxi"

cdef extern from *:
    """
    /* What the columns of one answer share, freed when Arrow has released the last of them, on whichever thread. */
    typedef struct fq_block {
      int64_t references;
      PyObject *owner;
    } fq_block;

    static void fq_drop(fq_block *block) {
      if (__atomic_sub_fetch(&block->references, 1, __ATOMIC_ACQ_REL) > 0)
        return;
      if (block->owner != NULL && Py_IsInitialized()) {
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(block->owner);
        PyGILState_Release(state);
      }
      free(block);
    }

    /* A column that stands on memory of somebody else, children included. */
    static void fq_release_borrowed(struct ArrowArray *array) {
      array->release = NULL;
      fq_drop((fq_block *)array->private_data);
    }

    static void fq_release_own(struct ArrowArray *array) {
      for (int64_t i = 0; i < array->n_children; i++)
        if (array->children[i]->release != NULL)
          array->children[i]->release(array->children[i]);
      fq_release_borrowed(array);
    }
    """
    ctypedef struct fq_block:
        int64_t references
        PyObject *owner
    void fq_drop(fq_block *block) noexcept
    void fq_release_borrowed(ArrowArray *array) noexcept
    void fq_release_own(ArrowArray *array) noexcept

cdef enum:
    ALIGNMENT = 64
    OUTPUTS = 9

OUTPUT_COLUMNS = (
    "quantized_data", "scales", "zero_points", "sqnr_db", "cosine", "max_abs_error",
    "kernel_ns", "bytes_in", "bytes_out",
)
"""The columns that the kernels fill, by their number."""
MAX_ROWS = 64
"""Longer batches spread the general path's cost over their rows."""

cdef enum Kind:
    CONSTANT
    REQUEST
    OUTPUT


cdef class Constants:
    """Columns that are the same in every answer of so many rows: a RecordBatch, exported once."""

    cdef ArrowArray _array

    def __cinit__(self, batch):
        batch._export_to_c(<uintptr_t>&self._array)

    def __dealloc__(self):
        if self._array.release != NULL:
            self._array.release(&self._array)


cdef object integers(shape):
    return np.zeros(shape, np.int64)


cdef class Room:
    """What the batches of so many rows of one call need for a while, one after the other."""

    cdef Constants constants
    cdef object layout, first_bad, unheld, nanoseconds, quality
    cdef int64_t[::1] starts, lengths, bytes_out, spent
    cdef int64_t[:, ::1] matrix, offsets
    cdef float[:, ::1] found

    def __cinit__(self, spec, Py_ssize_t count, Constants constants):
        starts, lengths, bytes_out = integers(count), integers(count), integers(count)
        matrix, offsets, zeros = integers((count, 2)), integers((3, count + 1)), integers(count)
        self.layout = Layout(
            spec, zeros, starts, lengths, zeros, matrix, np.zeros(count, np.uint8), integers((count, JOB_WIDTH)),
            integers(count), offsets, bytes_out, np.full(count, np.nan, np.float32),
        )
        self.first_bad, self.unheld, self.nanoseconds = integers(count), integers(count), integers(count)
        self.quality = np.empty((3, count), np.float32)
        self.constants = constants
        self.starts, self.lengths, self.bytes_out, self.spent = starts, lengths, bytes_out, self.nanoseconds
        self.matrix, self.offsets, self.found = matrix, offsets, self.quality


cdef int64_t read_offset(const ArrowArray *array, int width, int64_t i) noexcept:
    """Offset ``i`` of a column whose offsets have 4 or 8 bytes and any alignment."""
    cdef int32_t narrow = 0
    cdef int64_t wide = 0
    cdef const char *at = <const char *>array.buffers[1] + (array.offset + i) * width
    if width == 8:
        memcpy(&wide, at, 8)
        return wide
    memcpy(&narrow, at, 4)
    return narrow


cdef bint has_nulls(const ArrowArray *array) noexcept:
    """Whether a column has, or may have, nulls."""
    return array.null_count != 0 and array.buffers[0] != NULL


cdef int64_t padded(int64_t nbytes) noexcept:
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


cdef class PlainCall:
    """The usual batches of one call, whose command has one spec that asks for nothing that rows could lack.

    Parameters
    ----------
    answer : Schema
        Of the answers.
    scheme : str
        Its name.
    sources : list of (int, int)
        For each column of an answer: a kind (0 constant, 1 of the request, 2 an output) and the number of that column
        among the constants, in the request, or in OUTPUT_COLUMNS.
    places : tuple of int
        The request's columns layer_name, weights, shape and row_offset, the last -1 where there is none.
    spec : int64 array of shape (1, SPEC_FIELDS)
    value_bytes, offset_bytes, list_size : int
        Bytes of a weight; of an offset of the weights' list, or 0 and the list's fixed size.
    divisor : int
        What the last axis must be a multiple of.
    max_layer_bytes, max_name_bytes, max_dims : int
        See ``Limits``; ``max_layer_bytes`` holds for the whole batch here.
    constants : callable
        From a number of rows to Constants.
    """

    cdef object _answer, _spec, _constants
    cdef dict _rooms
    cdef str _scheme, _isa
    cdef bint _measure
    cdef int _columns
    cdef int[64] _kinds
    cdef int[64] _numbers
    cdef int _name_at, _weights_at, _shape_at, _row_offset_at
    cdef int64_t _value_bytes, _offset_bytes, _list_size, _divisor, _max_bytes, _max_name_bytes, _max_dims

    def __init__(
        self, answer, str scheme, list sources, tuple places, spec, str isa, bint measure, int64_t value_bytes,
        int64_t offset_bytes, int64_t list_size, int64_t divisor, int64_t max_layer_bytes, int64_t max_name_bytes,
        int64_t max_dims, constants,
    ):
        if len(sources) > 64:
            raise ValueError(f"{len(sources)} columns; expected at most 64")
        self._answer, self._spec, self._constants, self._rooms = answer, spec, constants, {}
        self._scheme, self._isa, self._measure, self._columns = scheme, isa, measure, len(sources)
        for i, (kind, number) in enumerate(sources):
            self._kinds[i], self._numbers[i] = kind, number
        self._name_at, self._weights_at, self._shape_at, self._row_offset_at = places
        self._value_bytes, self._offset_bytes, self._list_size = value_bytes, offset_bytes, list_size
        self._divisor, self._max_bytes = divisor, max_layer_bytes
        self._max_name_bytes, self._max_dims = max_name_bytes, max_dims

    def read(self, batch):
        """The work that a batch asks for, or None if the batch is not a usual one.

        The batch has passed Arrow's full validation, and has the call's schema and at least one row.
        """
        cdef Held held = Held.__new__(Held)
        cdef ArrowArray *request = &held.request
        batch._export_to_c(<uintptr_t>request)
        if request.length > MAX_ROWS:
            return None
        cdef Room room = self._rooms.get(request.length)
        if room is None:
            room = self._rooms[request.length] = Room(self._spec, request.length, self._constants(request.length))
        held.room = room
        if not (
            self._read_names(request.children[self._name_at])
            and self._read_weights(request.children[self._weights_at], room)
            and self._read_shapes(request.children[self._shape_at], room)
            and (self._row_offset_at < 0 or self._check_row_offset(request.children[self._row_offset_at]))
        ):
            return None
        cdef PlainWork work = PlainWork.__new__(PlainWork)
        work._call, work._held = self, held
        return work if work._prepare() else None

    cdef bint _read_names(self, const ArrowArray *names) noexcept:
        cdef int64_t i, begin, end
        if has_nulls(names):
            return False
        begin = read_offset(names, 4, 0)
        for i in range(names.length):
            end = read_offset(names, 4, i + 1)
            if not 0 < end - begin <= self._max_name_bytes:
                return False
            begin = end
        return True

    cdef bint _read_weights(self, const ArrowArray *weights, Room room) noexcept:
        cdef const ArrowArray *values = weights.children[0]
        cdef int64_t i, begin, end, total = 0
        if has_nulls(weights) or has_nulls(values) or values.buffers[1] == NULL:
            return False
        cdef uintptr_t address = <uintptr_t>values.buffers[1]
        for i in range(weights.length):
            if self._offset_bytes:
                begin = read_offset(weights, self._offset_bytes, i)
                end = read_offset(weights, self._offset_bytes, i + 1)
            else:
                begin = (weights.offset + i) * self._list_size
                end = begin + self._list_size
            if not 0 <= begin < end <= values.length:
                return False
            room.starts[i] = address + (values.offset + begin) * self._value_bytes
            room.lengths[i] = end - begin
            total += end - begin
        return total <= self._max_bytes // self._value_bytes

    cdef bint _read_shapes(self, const ArrowArray *shapes, Room room) noexcept:
        cdef const ArrowArray *values = shapes.children[0]
        cdef int64_t i, k, begin, end, extent, product, last
        if has_nulls(shapes) or has_nulls(values) or values.buffers[1] == NULL:
            return False
        for i in range(shapes.length):
            begin, end = read_offset(shapes, 4, i), read_offset(shapes, 4, i + 1)
            if not (0 <= begin <= end <= values.length and end - begin <= self._max_dims):
                return False
            product, last = 1, 1
            for k in range(begin, end):
                extent = read_offset(values, 8, k)
                if extent < 1 or product > room.lengths[i] // extent:
                    return False
                product, last = product * extent, extent
            if product != room.lengths[i] or last % self._divisor:
                return False
            room.matrix[i, 0], room.matrix[i, 1] = product // last, last
        return True

    cdef bint _check_row_offset(self, const ArrowArray *offsets) noexcept:
        cdef int64_t i
        if has_nulls(offsets):
            return False
        for i in range(offsets.length):
            if read_offset(offsets, 8, i) < 0:
                return False
        return True


cdef class Held:
    """The memory behind a plan: the request, the answer's block, and large outputs."""

    cdef ArrowArray request
    cdef fq_block *block
    cdef object outputs
    cdef Room room

    def __dealloc__(self):
        if self.request.release != NULL:
            self.request.release(&self.request)
        if self.block != NULL:
            fq_drop(self.block)


cdef class PlainWork:
    """One usual batch: its plan, and its answer.

    Attributes
    ----------
    plan : Plan
    weights, bytes_out, kernel_ns : int
        Weights of the batch, bytes of its outputs, and nanoseconds spent on it.
    sums : float64 array of shape (rows, 4)
        Quality sums.
    layers : list of (str, str, int, int)
        Of each layer its name, scheme, nanoseconds and bytes of weights.
    """

    cdef PlainCall _call
    cdef Held _held
    cdef char *_free
    cdef char *_outputs[3]
    cdef readonly object plan
    cdef readonly object sums
    cdef readonly list layers
    cdef readonly int64_t weights, bytes_out, kernel_ns

    cdef bint _prepare(self) except -1:
        """Lay out the answer, find memory for it and make the plan; False if it would not fit a column."""
        cdef Held held = self._held
        cdef Room room = held.room
        cdef Py_ssize_t count = room.lengths.shape[0], i
        scratch, self.bytes_out = room.layout.lay_out()
        cdef int64_t[3] nbytes
        cdef int64_t total = padded(scratch)
        for i in range(3):
            nbytes[i] = room.offsets[i, count] * (4 if i else 1)
            if nbytes[i] > MAX_ANSWER_BYTES:
                return False
            total += padded(nbytes[i])
        for i in range(count):
            self.weights += room.lengths[i]
        # The block holds the answer's structs and short columns, and what the kernels write unless that is large.
        cdef int64_t here = 1024 + self._call._columns * 192 + count * 8 * OUTPUTS
        cdef bint large = total >= MIN_BYTES
        held.block = <fq_block *>malloc(here + (0 if large else total + ALIGNMENT))
        if held.block == NULL:
            raise MemoryError()
        held.block.references, held.block.owner = 1, NULL
        self._free = <char *>held.block + padded(sizeof(fq_block))
        cdef uintptr_t at
        if large:
            held.outputs = OutputMemory(total)
            at = held.outputs.address
        else:
            at = padded(<int64_t><uintptr_t>held.block + here)
        for i in range(3):
            self._outputs[i] = <char *>at
            at += padded(nbytes[i])
        self.plan = room.layout.plan(
            self._call._isa, self._call._measure, <uintptr_t>self._outputs[0], <uintptr_t>self._outputs[1],
            <uintptr_t>self._outputs[2], at, held,
        )
        return True

    def finish(self):
        """The answer, once the plan has run; None if a layer turns out to be bad, which the general path can tell."""
        cdef Held held = self._held
        cdef Room room = held.room
        self.sums = np.zeros((room.lengths.shape[0], 4))
        failed, self.kernel_ns = self.plan.finish(self.sums, room.first_bad, room.unheld, room.nanoseconds)
        if failed:
            return None
        if self._call._measure:
            quality_columns(self.sums, *room.quality)
        self.layers = self._list_layers(held.request.children[self._call._name_at])
        cdef ArrowArray answer
        self._fill(&answer)
        try:
            return RecordBatch._import_from_c(<uintptr_t>&answer, self._call._answer)
        finally:
            if answer.release != NULL:
                answer.release(&answer)

    cdef list _list_layers(self, const ArrowArray *names):
        """Name, scheme, nanoseconds and bytes of each layer."""
        cdef Room room = self._held.room
        cdef const char *text = <const char *>names.buffers[2]
        cdef int64_t i, begin = read_offset(names, 4, 0), end
        cdef list layers = []
        for i in range(names.length):
            end = read_offset(names, 4, i + 1)
            name = PyUnicode_DecodeUTF8(text + begin, end - begin, NULL)
            layers.append((name, self._call._scheme, room.spent[i], room.lengths[i] * self._call._value_bytes))
            begin = end
        return layers

    cdef void *_take(self, int64_t nbytes) noexcept:
        """Some bytes of the block."""
        cdef void *taken = self._free
        self._free += (nbytes + 7) // 8 * 8
        return taken

    cdef void _fill(self, ArrowArray *answer) noexcept:
        """The structs of the answer, which keeps the block and what it stands on."""
        cdef Held held = self._held
        cdef PlainCall call = self._call
        cdef tuple owner = (held.outputs, held.room.constants)
        cdef int64_t count = held.room.lengths.shape[0]
        cdef ArrowArray *column
        cdef ArrowArray *source
        cdef int i, number
        Py_INCREF(owner)
        held.block.owner = <PyObject *>owner
        self._make(answer, count, 1, call._columns)
        for i in range(call._columns):
            column, number = <ArrowArray *>self._take(sizeof(ArrowArray)), call._numbers[i]
            answer.children[i] = column
            if call._kinds[i] == CONSTANT:
                memcpy(column, held.room.constants._array.children[number], sizeof(ArrowArray))
                column.release, column.private_data = fq_release_borrowed, held.block
                held.block.references += 1
            elif call._kinds[i] == REQUEST:
                source = held.request.children[number]
                memcpy(column, source, sizeof(ArrowArray))
                source.release = NULL  # moved, as the specification has it
            else:
                self._fill_output(column, number, count)

    cdef void _make(self, ArrowArray *array, int64_t length, int n_buffers, int64_t n_children) noexcept:
        """An array without nulls whose buffers and children are to be filled in."""
        memset(array, 0, sizeof(ArrowArray))
        array.length, array.n_buffers, array.n_children = length, n_buffers, n_children
        array.buffers = <const void **>self._take(n_buffers * sizeof(void *))
        array.buffers[0] = NULL
        if n_children:
            array.children = <ArrowArray **>self._take(n_children * sizeof(void *))
        array.release, array.private_data = fq_release_own, self._held.block
        self._held.block.references += 1

    cdef void _fill_output(self, ArrowArray *column, int number, int64_t count) noexcept:
        """A column of what the kernels made; its number is its place in OUTPUT_COLUMNS."""
        cdef Room room = self._held.room
        cdef int32_t *offsets
        cdef float *floats
        cdef int64_t *longs
        cdef int64_t i
        if number < 3:
            self._make(column, count, 2 if number else 3, 1 if number else 0)
            offsets = <int32_t *>self._take((count + 1) * 4)
            for i in range(count + 1):
                offsets[i] = <int32_t>room.offsets[number, i]
            column.buffers[1] = offsets
            if number == 0:
                column.buffers[2] = self._outputs[0]
            else:
                column.children[0] = <ArrowArray *>self._take(sizeof(ArrowArray))
                self._make(column.children[0], room.offsets[number, count], 2, 0)
                column.children[0].buffers[1] = self._outputs[number]
            return
        self._make(column, count, 2, 0)
        if number < 6:
            floats = <float *>self._take(count * 4)
            for i in range(count):
                floats[i] = room.found[number - 3, i]
            column.buffers[1] = floats
            return
        longs = <int64_t *>self._take(count * 8)
        for i in range(count):
            if number == 6:
                longs[i] = room.spent[i]
            elif number == 7:
                longs[i] = room.lengths[i] * self._call._value_bytes
            else:
                longs[i] = room.bytes_out[i]
        column.buffers[1] = longs
