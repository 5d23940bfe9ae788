/* bitsandbytes' 8-bit codes of blocks of the flat tensor (flightquant/reference/dynamic8.py), and the same of the
 * scales of nf4 and fp4. */
#include "dynamic_map.h"
#include "families.h"

enum { NESTED_BLOCK = 256 };

/* The place of 16 weights of a block; what is not a number is at the first one. */
FQ_INLINE void places_16(const float *x, float inverse, int32_t *to) {
  const vf one = vf_set(1), minus = vf_set(-1);
  vf scaled = vf_mul(vf_load(x), vf_set(inverse));
  scaled = vf_where_less(minus, scaled, scaled, minus);
  scaled = vf_where_less(scaled, one, scaled, one);
  const vf halved = vf_mul(vf_add(scaled, one), vf_set(0.5f));
#ifdef FQ_HAS_FMA
  vf place;
  FQ_EACH place.p[k] = pf_fma(halved.p[k], pf_set(65535), pf_set(0.5f));
  const vi found = vf_truncate(place);
  memcpy(to, &found, sizeof found);
#else
  float lanes[FQ_LANES];
  vf_store(lanes, halved);
  for (int i = 0; i < FQ_LANES; i++) /* float64 holds the sum as it is: one rounding in all */
    to[i] = (int32_t)(float)((double)lanes[i] * 65535 + 0.5);
#endif
}

/* Codes, and weights again where they are wanted, of n weights of one block; y may be written up to whole vectors. */
FQ_INLINE void quantize_block(const float *x, int64_t n, float amax, int measured, uint8_t *codes, float *y) {
  const float inverse = 1.0f / amax;
  int32_t place[FQ_LANES];
  for (int64_t i = 0; i < n; i += FQ_LANES) {
    const int64_t some = n - i < FQ_LANES ? n - i : FQ_LANES;
    places_16(x + i, inverse, place);
    for (int64_t k = 0; k < some; k++) {
      codes[i + k] = fq_dynamic_places[place[k]];
      if (measured)
        y[i + k] = fq_dynamic_values[codes[i + k]] * amax;
    }
  }
}

FQ_INLINE float magnitude(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* The magnitude of n weights, followed by zeros up to a whole vector. */
FQ_INLINE float block_magnitude(const float *x, int64_t n) {
  pi highs, lows;
  range_lanes(x, round_up(n, FQ_LANES), 1, &highs, &lows);
  return magnitude(pi_highest(highs));
}

FQ_INLINE void quantize_blocks(const fq_job *job, int measured, int64_t begin, int64_t end, fq_result *result) {
  _Alignas(64) float buffer[FQ_SPAN], again[FQ_SPAN];
  const int joined = joins_units(job->unit);
  float amax = 0;
  for (int64_t at = begin; at < end;) {
    const int64_t stop = span_end(job, at, end), n = stop - at, unit = joined ? job->unit : n;
    const float *x = load_span(job, at, n, buffer);
    if (!joined && at % job->unit == 0) {
      fq_result found = {.first_bad = -1};
      FQ_NAME(integer_reduce)(job, at, at + job->unit < end ? at + job->unit : end, &found);
      if (result->first_bad < 0)
        result->first_bad = found.first_bad;
      amax = magnitude(found.range.high);
    }
    fetcher next = fetch_after(job, at, n);
    for (int64_t i = 0; i < n; i += unit) {
      const int64_t some = n - i < unit ? n - i : unit;
      if (joined) {
        amax = block_magnitude(x + i, some);
        if (!(amax < INFINITY))
          note_bad(x, at, n, result);
      }
      job->scales[(at + i) / job->unit] = amax;
      fetch_vectors(&next, (uintptr_t)(some / FQ_LANES * (measured ? 3 : 4) / 4));
      quantize_block(x + i, some, amax, measured, job->data + at + i, again + i);
    }
    if (measured) {
      for (int64_t i = n; i < round_up(n, FQ_LANES); i++) /* no code stands for the zeros that fill x up */
        again[i] = 0;
      measure(x, again, round_up(n, FQ_LANES), &next, result);
    }
    at = stop;
  }
}

void FQ_NAME(dynamic8_quantize)(const fq_job *job, int64_t begin, int64_t end, fq_result *result) {
  if (job->measure)
    quantize_blocks(job, 1, begin, end, result);
  else
    quantize_blocks(job, 0, begin, end, result);
}

/* Add lanes to lanes. */
FQ_INLINE void add_to(float *to, const float *from, int64_t lanes) {
  for (int64_t i = 0; i < lanes; i++)
    to[i] += from[i];
}

/* The mean of n values in torch's order of sums. */
static float torch_mean(const float *x, int64_t n) {
  const int64_t lanes = n >= 8 ? 8 : 1, width = 4 * lanes, whole = n / lanes, lines = whole / 4;
  float levels[4][32] = {{0}}, total = 0;
  int power = 4;
  while (power < 15 && lines > (INT64_C(1) << (4 * power + 3)))
    power++;
  const int64_t steps = INT64_C(1) << power;
  int64_t line = 0;
  while (line + steps <= lines) {
    for (int64_t stop = line + steps; line < stop; line++)
      add_to(levels[0], x + line * width, width);
    for (int level = 1; level < 4; level++) {
      add_to(levels[level], levels[level - 1], width);
      memset(levels[level - 1], 0, sizeof levels[level - 1]);
      if (line & ((steps - 1) << (level * power)))
        break;
    }
  }
  for (; line < lines; line++)
    add_to(levels[0], x + line * width, width);
  for (int level = 1; level < 4; level++)
    add_to(levels[0], levels[level], width);
  for (int64_t vector = lines * 4; vector < whole; vector++)
    add_to(levels[0], x + vector * lanes, lanes);
  for (int64_t k = 1; k < 4; k++)
    add_to(levels[0], levels[0] + k * lanes, lanes);
  for (int64_t i = whole * lanes; i < n; i++)
    total += x[i];
  for (int64_t i = 0; i < lanes; i++)
    total += levels[0][i];
  return total / (float)n;
}

void FQ_NAME(nest)(const fq_job *job) {
  _Alignas(64) float less[NESTED_BLOCK] = {0}, again[NESTED_BLOCK];
  const int64_t blocks = (job->n + job->unit - 1) / job->unit;
  const float offset = torch_mean(job->scales, blocks);
  float *outer = job->outer;
  for (int64_t at = 0; at < blocks; at += NESTED_BLOCK) {
    const int64_t n = blocks - at < NESTED_BLOCK ? blocks - at : NESTED_BLOCK;
    for (int64_t i = 0; i < NESTED_BLOCK; i++)
      less[i] = i < n ? job->scales[at + i] - offset : 0;
    const float amax = block_magnitude(less, n);
    *outer++ = amax;
    quantize_block(less, n, amax, 1, job->packed + at, again);
    for (int64_t i = 0; i < n; i++)
      job->scales[at + i] = again[i] + offset;
  }
  *outer = offset;
}
