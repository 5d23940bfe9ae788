/* calibration "mse" of integers (flightquant/reference/integer.py): ranges shrunk by the factor whose squared error is
 * the least. */
#include "scaled.h"

/* Trials that share a load of the weights: as many chains of sums; and all of them, in whole vectors. */
enum { TOGETHER = 5, ROUNDED = (FQ_SHRINKS + FQ_LANES - 1) / FQ_LANES * FQ_LANES };

static float factor(int trial) { return 1.0f - (float)trial * 0.025f; }

static int32_t shrunk(int32_t bits, int trial) {
  float a;
  memcpy(&a, &bits, sizeof a);
  a *= factor(trial);
  memcpy(&bits, &a, sizeof bits);
  return bits;
}

/* Scales, inverses that are no infinity, and zero points of all trials. */
static void make_trials(const fq_job *job, const fq_range *range, span_units *trials) {
  _Alignas(64) float factors[ROUNDED];
  for (int k = 0; k < ROUNDED; k++)
    factors[k] = factor(k);
  trials->careful = 0;
  const vf high = vi_float(vi_set(range->high)), low = vi_float(vi_set(range->low));
  for (int at = 0; at < ROUNDED; at += FQ_LANES) {
    vf_store((float *)(void *)(trials->high + at), vf_mul(high, vf_load(factors + at)));
    vf_store((float *)(void *)(trials->low + at), vf_mul(low, vf_load(factors + at)));
    parameters_16(job, trials, at);
    vf_store(trials->inverse + at, vf_min(vf_load(trials->inverse + at), vf_set(0x1.fffffep127f)));
  }
}

/* Add the lanes of all trials' sums to the errors, each trial's one after the other. */
static void add_to_errors(const float (*sums)[FQ_LANES], double *errors) {
  _Alignas(64) float lanes[FQ_LANES][ROUNDED];
  double total[ROUNDED];
  for (int trial = 0; trial < ROUNDED; trial += FQ_PART)
    for (int k = 0; k < FQ_LANES; k += 4) {
      pf columns[4];
      pf_load_columns(sums[trial] + k, FQ_LANES, columns);
      for (int j = 0; j < 4; j++)
        pf_store(lanes[k + j] + trial, columns[j]);
    }
  for (int trial = 0; trial < ROUNDED; trial++)
    total[trial] = lanes[0][trial];
  for (int k = 1; k < FQ_LANES; k++)
    for (int trial = 0; trial < ROUNDED; trial++)
      total[trial] += (double)lanes[k][trial];
  for (int trial = 0; trial < FQ_SHRINKS; trial++)
    errors[trial] += total[trial];
}

/* Add what errors count of n weights (a multiple of 16), for each trial. */
FQ_INLINE void add_errors(int bits, const span_units *t, const float *x, const float *w, int64_t n, int symmetric,
                          double *errors) {
  const float half_range = (float)(1 << (bits - 1));
  const vf low = vf_set(-half_range), high = vf_set(half_range - 1);
  _Alignas(64) float all[ROUNDED][FQ_LANES] = {{0}};
  for (int first = 0; first < FQ_SHRINKS; first += TOGETHER) {
    vf sums[TOGETHER];
    for (int k = 0; k < TOGETHER; k++)
      sums[k] = vf_set(0);
    for (int64_t i = 0; i < n; i += FQ_LANES) {
      const vf weight = vf_load(x + i);
      for (int k = 0; k < TOGETHER; k++) {
        const vf zero = vf_set(t->zero[first + k]);
        vf q = vf_mul(weight, vf_set(t->inverse[first + k]));
        if (!symmetric)
          q = vf_add(q, zero);
        vf level = vi_convert(vf_nearest(vf_min(vf_max(q, low), high)));
        if (!symmetric)
          level = vf_sub(level, zero);
        const vf error = vf_sub(vf_mul(level, vf_set(t->scale[first + k])), weight), square = vf_mul(error, error);
        sums[k] = vf_add(sums[k], w ? vf_mul(vf_load(w + i), square) : square);
      }
    }
    for (int k = 0; k < TOGETHER; k++)
      vf_store(all[first + k], sums[k]);
  }
  add_to_errors((const float (*)[FQ_LANES])all, errors);
}

static __attribute__((noinline)) void add_plain(const fq_job *job, const span_units *t, const float *x, int64_t n,
                                                double *errors) {
  if (job->symmetric)
    add_errors(job->bits, t, x, NULL, n, 1, errors);
  else
    add_errors(job->bits, t, x, NULL, n, 0, errors);
}

static __attribute__((noinline)) void add_weighted(const fq_job *job, const span_units *t, const float *x,
                                                   const float *w, int64_t n, double *errors) {
  if (job->symmetric)
    add_errors(job->bits, t, x, w, n, 1, errors);
  else
    add_errors(job->bits, t, x, w, n, 0, errors);
}

/* The importance of n weights from an index on, followed by zeros up to a whole vector. */
static void take_importance(const fq_job *job, int64_t begin, int64_t n, float *w) {
  int64_t col = begin % job->cols;
  for (int64_t i = 0; i < n; col = 0) {
    const int64_t run = job->cols - col < n - i ? job->cols - col : n - i;
    memcpy(w + i, (const char *)job->importance + col * (int64_t)sizeof(float), (size_t)run * sizeof(float));
    i += run;
  }
  for (int64_t i = n; i < round_up(n, FQ_LANES); i++)
    w[i] = 0;
}

void FQ_NAME(shrink_errors)(const fq_job *job, const fq_range *range, int64_t begin, int64_t end, double *errors) {
  _Alignas(64) float buffer[FQ_SPAN], w[FQ_SPAN];
  span_units trials;
  make_trials(job, range, &trials);
  for (int k = 0; k < FQ_SHRINKS; k++)
    errors[k] = 0;
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at;
    const float *x = load_span(job, at, n, buffer);
    if (job->importance) {
      take_importance(job, at, n, w);
      add_weighted(job, &trials, x, w, round_up(n, FQ_LANES), errors);
    } else {
      add_plain(job, &trials, x, round_up(n, FQ_LANES), errors);
    }
    at = stop;
  }
}

void FQ_NAME(shrink_range)(const double *errors, fq_range *range) {
  int best = 0;
  for (int k = 1; k < FQ_SHRINKS; k++)
    if (errors[k] < errors[best])
      best = k;
  range->high = shrunk(range->high, best);
  range->low = shrunk(range->low, best);
}

void FQ_NAME(shrink_units)(const fq_job *job, const float *x, int64_t begin, int64_t units, int32_t *high,
                           int32_t *low) {
  _Alignas(64) float w[FQ_SPAN];
  for (int64_t i = 0; i < units; i++) {
    double errors[FQ_SHRINKS] = {0};
    fq_range range = {high[i], low[i]};
    span_units trials;
    make_trials(job, &range, &trials);
    if (job->importance) {
      take_importance(job, begin + i * job->unit, job->unit, w);
      add_weighted(job, &trials, x + i * job->unit, w, job->unit, errors);
    } else {
      add_plain(job, &trials, x + i * job->unit, job->unit, errors);
    }
    FQ_NAME(shrink_range)(errors, &range);
    high[i] = range.high;
    low[i] = range.low;
  }
}
