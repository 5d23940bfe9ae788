# Arrow's C data interface, as its specification gives it.

cdef extern from *:
    """
    #ifndef ARROW_C_DATA_INTERFACE
    #define ARROW_C_DATA_INTERFACE
    #include <stdint.h>
    struct ArrowSchema {
      const char *format, *name, *metadata;
      int64_t flags, n_children;
      struct ArrowSchema **children, *dictionary;
      void (*release)(struct ArrowSchema *);
      void *private_data;
    };
    struct ArrowArray {
      int64_t length, null_count, offset, n_buffers, n_children;
      const void **buffers;
      struct ArrowArray **children, *dictionary;
      void (*release)(struct ArrowArray *);
      void *private_data;
    };
    #endif
    """
    struct ArrowSchema:
        const char *format
        int64_t n_children
        ArrowSchema **children
        ArrowSchema *dictionary
    struct ArrowArray:
        int64_t length
        int64_t null_count
        int64_t offset
        int64_t n_buffers
        int64_t n_children
        const void **buffers
        ArrowArray **children
        ArrowArray *dictionary
        void (*release)(ArrowArray *) noexcept
        void *private_data
