/* Which instruction sets there are. Each list of flags in meson.build and the checks here must agree. */
#include "fq.h"

#include <stddef.h>
#include <string.h>
#if defined(FQ_HAVE_AVX2) || defined(FQ_HAVE_AVX512)
#include <cpuid.h>
#endif

#ifdef FQ_HAVE_BASELINE
extern const fq_kernels fq_kernels_baseline;
#endif
#ifdef FQ_HAVE_AVX2
extern const fq_kernels fq_kernels_avx2;
#endif
#ifdef FQ_HAVE_AVX512
extern const fq_kernels fq_kernels_avx512;
#endif
#ifdef FQ_HAVE_NEON
extern const fq_kernels fq_kernels_neon;
#endif

static int always(void) { return 1; }

#if defined(FQ_HAVE_AVX2) || defined(FQ_HAVE_AVX512)
/* Clang 14 does not know this feature by name. Whether the system keeps its registers is what "avx2" asks as well.
   Asked once: in a virtual machine the instruction goes to the hypervisor, which takes longer than a small plan. */
static int has_f16c(void) {
  static int known = -1;
  int has = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (has < 0) {
    unsigned a, b, c, d;
    has = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
    __atomic_store_n(&known, has, __ATOMIC_RELAXED);
  }
  return has;
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
#endif
#ifdef FQ_HAVE_AVX512
static int has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && has_avx2();
}
#endif

static const struct {
  const fq_kernels *kernels;
  int (*supported)(void);
} variants[] = {
#ifdef FQ_HAVE_AVX512
    {&fq_kernels_avx512, has_avx512},
#endif
#ifdef FQ_HAVE_AVX2
    {&fq_kernels_avx2, has_avx2},
#endif
#ifdef FQ_HAVE_NEON
    {&fq_kernels_neon, always},
#endif
#ifdef FQ_HAVE_BASELINE
    {&fq_kernels_baseline, always},
#endif
};

enum { VARIANTS = sizeof variants / sizeof variants[0] };

const char *fq_available(int i) {
  for (int v = 0; v < VARIANTS; v++)
    if (variants[v].supported() && i-- == 0)
      return variants[v].kernels->name;
  return NULL;
}

const fq_kernels *fq_find(const char *name) {
  for (int v = 0; v < VARIANTS; v++)
    if (variants[v].supported() && strcmp(variants[v].kernels->name, name) == 0)
      return variants[v].kernels;
  return NULL;
}
