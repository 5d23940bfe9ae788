"""Memory for answers that is used again.

A fresh large buffer costs a page fault for every 4 KiB, which takes as long as the kernels need to fill it. So large
outputs come from a small store, into which they return when the last Arrow array on them is gone.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdlib cimport free
from libc.stdint cimport uintptr_t
from libc.string cimport memmove

cdef extern from *:
    """
    #include <stdlib.h>
    #include <sys/mman.h>
    /* Huge pages where the system has them: one fault for 2 MiB. */
    static void *fq_allocate(size_t nbytes) {
      const size_t huge = (size_t)2 << 20;
      void *memory = NULL;
      if (posix_memalign(&memory, nbytes < huge ? 64 : huge, nbytes) != 0)
        return NULL;
    #ifdef MADV_HUGEPAGE
      if (nbytes >= huge)
        madvise(memory, nbytes, MADV_HUGEPAGE);
    #endif
      return memory;
    }
    """
    void *fq_allocate(size_t nbytes) nogil

MIN_BYTES = 1 << 20
"""Smaller outputs are not worth it: Arrow's own pool keeps such memory."""
MAX_KEPT_BYTES = 128 << 20
"""Most memory that the store keeps while nobody uses it: what was used last."""

cdef enum:
    SLOTS = 64

cdef struct Block:
    void *data
    size_t nbytes

cdef Block kept[SLOTS]
cdef size_t kept_count = 0
cdef size_t kept_bytes = 0
cdef size_t most_kept = MAX_KEPT_BYTES
cdef cython.pymutex store


cdef Block take(size_t nbytes) noexcept:
    """The smallest kept block that fits without wasting half of itself, or none."""
    cdef Block found
    cdef size_t i, best = SLOTS
    found.data, found.nbytes = NULL, 0
    with store:
        for i in range(kept_count):
            if nbytes <= kept[i].nbytes <= 2 * nbytes and (best == SLOTS or kept[i].nbytes < kept[best].nbytes):
                best = i
        if best < SLOTS:
            found = kept[best]
            remove(best)
    return found


cdef void remove(size_t i) noexcept:
    """Take a block out of the store, which is in the order in which blocks came back."""
    global kept_count, kept_bytes
    kept_bytes -= kept[i].nbytes
    kept_count -= 1
    memmove(&kept[i], &kept[i + 1], (kept_count - i) * sizeof(Block))


cdef void give_back(Block block) noexcept:
    """Keep a block in place of those that nobody has asked for the longest."""
    global kept_count, kept_bytes
    cdef Block unused[SLOTS]
    cdef size_t i, count = 0
    if block.nbytes > most_kept:
        free(block.data)
        return
    with store:
        while kept_count == SLOTS or kept_bytes + block.nbytes > most_kept:
            unused[count] = kept[0]
            count += 1
            remove(0)
        kept[kept_count] = block
        kept_count += 1
        kept_bytes += block.nbytes
    for i in range(count):
        free(unused[i].data)


def bytes_kept():
    """Bytes that the store holds and nobody uses."""
    with store:
        return kept_bytes


cdef class OutputMemory:
    """A writable buffer of ``nbytes`` bytes, 64-byte aligned; its content is whatever it was, and must be overwritten.

    Attributes
    ----------
    nbytes : int
    address : int
    """

    cdef Block _block
    cdef readonly size_t nbytes

    def __cinit__(self, size_t nbytes):
        self.nbytes = nbytes
        self._block = take(nbytes)
        if self._block.data == NULL:
            self._block.nbytes = max(nbytes, <size_t>1)
            self._block.data = fq_allocate(self._block.nbytes)
        if self._block.data == NULL:
            raise MemoryError(f"no memory for {nbytes} bytes of output")

    def __dealloc__(self):
        if self._block.data != NULL:
            give_back(self._block)

    @property
    def address(self):
        return <uintptr_t>self._block.data

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self._block.data, self.nbytes, 0, flags)
