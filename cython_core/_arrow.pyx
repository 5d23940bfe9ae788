"""Borrow columns through the Arrow C data interface: addresses and offsets, no copy, no tie to one pyarrow.

The structs carry no buffer sizes, so everything here trusts its column: ``validate.py`` has judged it before. The
capsules are held for as long as an address may be used; Arrow's memory is only ever read.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.string cimport memcpy

import numpy as np

include "arrow_abi.pxi"

cdef int64_t MOST_WEIGHTS = (<int64_t>1) << 48
cdef dict VALUE_BYTES = {b"f": 4, b"e": 2, b"g": 8, b"S": 2, b"w:2": 2, b"l": 8}


cdef class ListColumn:
    """One list column, borrowed.

    Attributes
    ----------
    address : int
        Of the child's value 0, at any alignment; 0 if it has no buffer.
    value_bytes : int
        Size of a value.
    offsets : int64 array of shape (rows + 1,)
        Row i holds the values from ``offsets[i]`` up to ``offsets[i + 1]``, counted from ``address``.
    lengths : int64 array of shape (rows,)
        Number of values of each row.
    ordered : bool
        Whether the offsets begin at 0 or more and never fall.
    """

    cdef readonly uintptr_t address
    cdef readonly int value_bytes
    cdef readonly object offsets
    cdef readonly object lengths
    cdef readonly bint ordered
    cdef object _base

    def __init__(self, column):
        """Borrow ``column``, a list, large_list or fixed_size_list array of a plain value type."""
        schema_capsule, array_capsule = column.__arrow_c_array__()
        cdef ArrowSchema *schema = <ArrowSchema *>PyCapsule_GetPointer(schema_capsule, "arrow_schema")
        cdef ArrowArray *array = <ArrowArray *>PyCapsule_GetPointer(array_capsule, "arrow_array")
        self._base = (schema_capsule, array_capsule)
        if schema.dictionary != NULL or schema.n_children != 1 or array.n_children != 1:
            raise TypeError("expected a list column")
        cdef bytes kind = schema.format
        cdef bytes value = schema.children[0].format
        if value not in VALUE_BYTES or schema.children[0].dictionary != NULL:
            raise TypeError(f"expected a list of plain values, got a list of format {value!r}")
        cdef ArrowArray *child = array.children[0]
        self.value_bytes = VALUE_BYTES[value]
        cdef const char *values = <const char *>child.buffers[1]
        self.address = 0 if values == NULL else <uintptr_t>(values + child.offset * self.value_bytes)
        self.offsets = self._read_offsets(kind, array)
        self._measure_rows()

    cdef void _measure_rows(self):
        cdef const int64_t[::1] offsets = self.offsets
        cdef Py_ssize_t rows = offsets.shape[0] - 1, i
        self.lengths = np.empty(rows, np.int64)
        cdef int64_t[::1] lengths = self.lengths
        self.ordered = offsets[0] >= 0
        for i in range(rows):
            lengths[i] = offsets[i + 1] - offsets[i]
            self.ordered &= lengths[i] >= 0

    cdef object _read_offsets(self, bytes kind, ArrowArray *array):
        cdef Py_ssize_t rows = array.length, i
        offsets = np.zeros(rows + 1, np.int64)
        cdef int64_t[::1] out = offsets
        cdef const char *from_
        cdef int64_t width
        cdef int32_t narrow = 0
        if kind.startswith(b"+w:"):
            width = int(kind[3:])
            for i in range(rows + 1):
                out[i] = (array.offset + i) * width
            return offsets
        if rows == 0:
            return offsets
        from_ = <const char *>array.buffers[1]
        if kind == b"+l":
            for i in range(rows + 1):
                memcpy(&narrow, from_ + (array.offset + i) * 4, 4)
                out[i] = narrow
        elif kind == b"+L":
            memcpy(&out[0], from_ + array.offset * 8, (rows + 1) * 8)
        else:
            raise TypeError(f"expected a list column, got format {kind!r}")
        return offsets


def text_lengths(column):
    """The longest text of a utf8 or large_utf8 array in bytes, and the index of its first empty one, or -1.

    Nulls count as what their offsets say.
    """
    schema_capsule, array_capsule = column.__arrow_c_array__()
    cdef ArrowSchema *schema = <ArrowSchema *>PyCapsule_GetPointer(schema_capsule, "arrow_schema")
    cdef ArrowArray *array = <ArrowArray *>PyCapsule_GetPointer(array_capsule, "arrow_array")
    cdef bytes kind = schema.format
    if kind not in (b"u", b"U") or schema.dictionary != NULL:
        raise TypeError(f"expected a text column, got format {kind!r}")
    cdef bint wide = kind == b"U"
    cdef const char *offsets = <const char *>array.buffers[1]
    cdef int64_t longest = 0, empty = -1, begin = 0, end = 0
    cdef int32_t narrow = 0
    cdef Py_ssize_t i
    for i in range(array.length + 1 if array.length else 0):
        begin = end
        if wide:
            memcpy(&end, offsets + (array.offset + i) * 8, 8)
        else:
            memcpy(&narrow, offsets + (array.offset + i) * 4, 4)
            end = narrow
        if i and end - begin > longest:
            longest = end - begin
        if i and empty < 0 and end == begin:
            empty = i - 1
    return longest, empty


def read_shapes(ListColumn column, const int64_t[::1] lengths, int max_dims, int64_t[:, ::1] matrix):
    """Rows and columns of every tensor from its ``shape`` column.

    Parameters
    ----------
    column : ListColumn of int64
        One shape for each row.
    lengths : int64 array of shape (rows,)
        Weights that each row really has, or -1 where its shape alone says how many.
    max_dims : int
        Most axes of a tensor.
    matrix : int64 array of shape (rows, 2), written
        Product of all axes but the last, and the last axis; (0, 0) for an empty tensor; (-1, -1) where the shape's
        product is not the length, or an axis is negative, or there are too many.
    """
    cdef const int64_t[::1] offsets = column.offsets
    cdef const char *values = <const char *>column.address
    cdef int64_t extent = 0, last, product, limit
    cdef Py_ssize_t i, k
    cdef bint good, empty, free
    for i in range(lengths.shape[0]):
        free = lengths[i] < 0
        product, last, limit = 1, 1, MOST_WEIGHTS if free else lengths[i]
        good, empty = offsets[i + 1] - offsets[i] <= max_dims, False
        if good:
            for k in range(offsets[i], offsets[i + 1]):
                memcpy(&extent, values + k * 8, 8)
                if extent < 0 or (limit > 0 and extent > 0 and product > limit // extent):
                    good = False
                    break
                if extent == 0:
                    empty = True
                elif limit > 0:
                    product *= extent
                    last = extent
        if good and empty and (free or limit == 0):
            matrix[i, 0], matrix[i, 1] = 0, 0
        elif good and not empty and (free or product == limit):
            matrix[i, 0], matrix[i, 1] = product // last, last
        else:
            matrix[i, 0], matrix[i, 1] = -1, -1
