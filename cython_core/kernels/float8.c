/* 8-bit floats, e4m3 and e5m2, with a scale apart (flightquant/reference/float8.py). */
#include "blocks.h"
#include "minifloat.h"

FQ_INLINE void quantize_span(const fq_job *job, fetcher *next, const char *x, int64_t n, const span_units *u,
                             minifloat format, int arithmetic, int careful, int measured, int8_t *codes, float *wide,
                             float *y) {
  const vf highest = vf_set(highest_level(job));
  for (int64_t at = 0; at < n; at += FQ_STEP) {
    vi code[FQ_STEP / FQ_LANES];
    fetch_step(next, measured);
    for (int v = 0; v < FQ_STEP / FQ_LANES; v++) {
      const int64_t i = at + v * FQ_LANES;
      const uint32_t unit = (uint32_t)(i / FQ_BLOCK) >> u->shift;
      const vf scale = vf_set(u->scale[unit]), inverse = vf_set(u->inverse[unit]);
      const vf weight = load_one(x + i * fq_dtype_bytes[arithmetic], arithmetic);
      if (measured && arithmetic != FQ_F32)
        vf_store(wide + i, weight);
      vf q, value;
      if (careful) {
        q = round_to(vf_div(weight, scale), arithmetic);
        q = vf_max(vf_min(q, highest), vf_sub(vf_set(0), highest));
      } else if (arithmetic == FQ_F32) {
        q = vf_quotient(weight, scale, inverse, 0); /* halves of steps are half-integers of 5 bits at most */
      } else {
        q = round_quotient(vf_mul(weight, inverse), arithmetic);
      }
      code[v] = nearest_float8(q, weight, format, &value);
      if (measured)
        vf_store(y + i, vf_mul(value, scale));
    }
    pi parts[FQ_STEP / FQ_PART];
    memcpy(parts, code, sizeof parts);
    store_64(codes + at, parts, u->streams);
  }
}

/* Float16 quotients of e5m2 may be denormal, which round_quotient does not know: always with care. */
#define FQ_FORMAT(name, half)                                                                                          \
  static __attribute__((noinline)) void name##_extreme(const fq_job *job, fetcher *next, const char *x, int64_t n,     \
                                                       const span_units *u, int8_t *codes, float *wide, float *y) {    \
    quantize_span(job, next, x, n, u, name, job->arithmetic, 1, job->measure, codes, wide, y);                         \
  }                                                                                                                    \
  static void name##_options(const fq_job *job, fetcher *next, const char *x, int64_t n, const span_units *u,          \
                             int8_t *codes, float *wide, float *y) {                                                   \
    if (u->careful || (job->arithmetic == FQ_F16 && !half))                                                            \
      name##_extreme(job, next, x, n, u, codes, wide, y);                                                              \
    else if (job->arithmetic == FQ_F32 && job->measure)                                                                \
      quantize_span(job, next, x, n, u, name, FQ_F32, 0, 1, codes, wide, y);                                           \
    else if (job->arithmetic == FQ_F32)                                                                                \
      quantize_span(job, next, x, n, u, name, FQ_F32, 0, 0, codes, wide, y);                                           \
    else if (job->arithmetic == FQ_BF16 && job->measure)                                                               \
      quantize_span(job, next, x, n, u, name, FQ_BF16, 0, 1, codes, wide, y);                                          \
    else if (job->arithmetic == FQ_BF16)                                                                               \
      quantize_span(job, next, x, n, u, name, FQ_BF16, 0, 0, codes, wide, y);                                          \
    else                                                                                                               \
      quantize_span(job, next, x, n, u, name, FQ_F16, 0, job->measure, codes, wide, y);                                \
  }

FQ_FORMAT(e4m3, 1)
FQ_FORMAT(e5m2, 0)

static void copy(const fq_job *job, int64_t begin, int64_t n, int8_t *codes) {
  store_packed(job, job->data + begin, (const uint8_t *)codes, n);
}

void FQ_NAME(float8_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  if (job->in_blocks && job->family == FQ_FP8_E4M3)
    quantize_strip(job, begin, end, result, e4m3_options, copy);
  else if (job->in_blocks)
    quantize_strip(job, begin, end, result, e5m2_options, copy);
  else if (job->family == FQ_FP8_E4M3)
    quantize_tile(job, begin, end, result, e4m3_options, copy);
  else
    quantize_tile(job, begin, end, result, e5m2_options, copy);
}
