"""The kernels of this machine: which instruction sets there are, which one is in use, where its threads run.

All kernels are linked into this module; the others take them from it (``KERNELS``).
"""

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, threadid

import os

include "kernels.pxi"

cdef extern from "fq.h" nogil:
    const fq_kernels *fq_find(const char *name)
    const char *fq_available(int i)

cdef extern from *:
    """
    #ifdef __linux__
    #include <sched.h>
    static void fq_pin(int place, const int *cpus) {
      cpu_set_t mask;
      CPU_ZERO(&mask);
      CPU_SET(cpus[place], &mask);
      (void)sched_setaffinity(0, sizeof mask, &mask);
    }
    #else
    static void fq_pin(int place, const int *cpus) { (void)place, (void)cpus; }
    #endif
    """
    void fq_pin(int place, const int *cpus) noexcept nogil

DTYPES = {"float32": FQ_F32, "float16": FQ_F16, "bfloat16": FQ_BF16, "float64": FQ_F64}
FAMILIES = {  # by Scheme.family
    **{f"int{bits}": FQ_INTEGER for bits in range(2, 9)},
    "fp8_e4m3": FQ_FP8_E4M3, "fp8_e5m2": FQ_FP8_E5M2,
    "q8_0": FQ_Q8_0, "q4_0": FQ_Q4_0, "q4_1": FQ_Q4_1, "q5_0": FQ_Q5_0, "q5_1": FQ_Q5_1,
    "nf4": FQ_NF4, "fp4": FQ_FP4, "bnb8": FQ_BNB8,
    "q2_k": FQ_Q2_K, "q3_k": FQ_Q3_K, "q4_k": FQ_Q4_K, "q5_k": FQ_Q5_K, "q6_k": FQ_Q6_K, "iq4_nl": FQ_IQ4_NL,
    "mxfp4": FQ_MXFP4, "mxfp8": FQ_MXFP8, "nvfp4": FQ_NVFP4,
    "arrowquant": FQ_ARROWQUANT, "mlx": FQ_MLX, "onnx": FQ_ONNX,
    "fbgemm": FQ_FBGEMM, "mxfp4-ggml": FQ_MXFP4_GGML,
    **{f"hqq{bits}": FQ_HQQ for bits in (8, 4, 3, 2)},
}

PACKINGS = {
    "gptq": FQ_GPTQ, "gptq-v2": FQ_GPTQ_V2, "awq": FQ_AWQ, "bnb-nested": FQ_NESTED, "onnx": FQ_ZEROS_BEHIND,
    "hqq": FQ_FOLDED,
}
"""Layouts that are made of packed integers, or of scales, at the end; all others are packed as they are made."""


def pin_team(cpus):
    """Bind each thread of the calling thread's team to one of these CPUs.

    A team that wakes for a few milliseconds at a time may be left on one CPU for as long: the scheduler looks for an
    idle one only among those that share a cache.
    """
    cdef int[1024] places
    cdef int count = min(len(cpus), 1024), i
    for i in range(count):
        places[i] = cpus[i]
    with nogil, parallel(num_threads=count):
        fq_pin(threadid(), places)


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
KERNELS = {name: PyCapsule_New(<void *>fq_find(name.encode()), "fq_kernels", NULL) for name in available_isas()}
"""Capsules of ``const fq_kernels *`` by the instruction set's name."""


def active_isa():
    """Name of the instruction set in use: the best one, or what the environment's FLIGHTQUANT_ISA names."""
    return _ACTIVE
