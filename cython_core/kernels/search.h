/* ggml's searches for a scale (flightquant/reference/kquants.py), for 16 rows of weights at once: lane k of every
 * vector belongs to row k, so that each row's sums run in the order of its elements. */
#ifndef FQ_SEARCH_H
#define FQ_SEARCH_H

#include "families.h"

enum { FQ_ROW = 32 }; /* elements of a row, at most */

typedef struct {
  _Alignas(64) float x[FQ_ROW][FQ_LANES]; /* element i of all rows */
  _Alignas(64) float w[FQ_ROW][FQ_LANES]; /* what its error counts */
  _Alignas(64) float code[FQ_ROW][FQ_LANES];
} fq_rows;

typedef struct {
  vf scale;
  vf least;           /* the negated minimum */
  vf inverse, origin; /* code = nearest(inverse * (x - origin)) */
} fq_found;

static const float fq_magic = 12582912.0f; /* 1.5 * 2^23: a float32 near it counts in ones */
static const float fq_nothing = 1e-15f;    /* rows of signed codes whose magnitudes are all below it count as zero */

FQ_INLINE vf negated(vf a) { return vi_float(vi_xor(vf_bits(a), vi_set(INT32_MIN))); }
FQ_INLINE vf magnitude(vf a) { return vi_float(vi_and(vf_bits(a), vi_set(INT32_MAX))); }

/* To the nearest integer as ggml does it: right up to 2^22, and what comes of its trick beyond. */
FQ_INLINE vi nearest_any(vf a) {
  const vi bits = vf_bits(vf_add(a, vf_set(fq_magic)));
  return vi_sub(vi_and(bits, vi_set(0x007fffff)), vi_set(0x00400000));
}

/* nearest_any, held between two integers. What is known to lie within 2^22 is held first, then rounded. */
FQ_INLINE vf nearest_within(vf a, float low, float high, int known) {
  if (!known)
    return vi_convert(vi_min(vi_max(nearest_any(a), vi_set((int32_t)low)), vi_set((int32_t)high)));
  const vf held = vf_min(vf_max(a, vf_set(low)), vf_set(high));
  return vf_sub(vf_add(held, vf_set(fq_magic)), vf_set(fq_magic));
}

/* Take 16 rows, or fewer followed by zeros, of so many consecutive weights each. */
FQ_INLINE void take_rows(fq_rows *r, const float *x, int64_t rows, int length) {
  for (int64_t k = 0; k < FQ_LANES; k++)
    for (int i = 0; i < length; i++) {
      float value = 0;
      if (k < rows)
        memcpy(&value, x + k * length + i, sizeof value);
      r->x[i][k] = value;
    }
}

/* The trials of a search for scale and minimum: number i of them, from 0 to last, divides the range into
 * first + step * i + top levels. */
typedef struct {
  float top, first, step;
  int last;
  int absolute; /* the error is that of magnitudes, not of squares */
} fq_trials;

FQ_INLINE vf error_of(const fq_rows *r, int length, vf scale, vf minimum, int absolute) {
  vf sum = vf_set(0);
  for (int i = 0; i < length; i++) {
    const vf back = vf_add(vf_mul(scale, vf_load(r->code[i])), minimum);
    const vf difference = vf_sub(back, vf_load(r->x[i]));
    const vf term = absolute ? magnitude(difference) : vf_mul(difference, difference);
    sum = vf_add(sum, vf_mul(vf_load(r->w[i]), term));
  }
  return sum;
}

typedef struct {
  vf l, l2, xl; /* of w * code, w * code^2, w * code * x */
} fq_sums;

/* Codes from 0 to top, counted from the minimum, and their sums. */
FQ_INLINE fq_sums codes_from(fq_rows *r, int length, vf inverse, vf minimum, float top, int known) {
  fq_sums s = {vf_set(0), vf_set(0), vf_set(0)};
  for (int i = 0; i < length; i++) {
    const vf x = vf_load(r->x[i]);
    const vf code = nearest_within(vf_mul(inverse, vf_sub(x, minimum)), 0, top, known);
    const vf wl = vf_mul(vf_load(r->w[i]), code);
    vf_store(r->code[i], code);
    s.l = vf_add(s.l, wl);
    s.l2 = vf_add(s.l2, vf_mul(wl, code));
    s.xl = vf_add(s.xl, vf_mul(wl, x));
  }
  return s;
}

/* Whether no weight between low and high is more than 2^21 steps away from the minimum, or its distance no number. */
FQ_INLINE int within_reach(vf span, vf low, vf minimum) {
  const vf zero = vf_set(0), one = vf_set(1), away = magnitude(vf_sub(low, minimum));
  vf far = vf_where_less(away, vf_mul(span, vf_set(0x1p15f)), zero, one);
  far = vf_where_less(vf_set(0x1p-100f), span, far, one);
  far = vf_where_less(span, vf_set(0x1p100f), far, one);
  return vi_highest(vf_bits(far)) == 0;
}

/* Scale and minimum: ggml's make_qkx2_quants, and make_qkx3_quants, which is the same with given weights. */
FQ_INLINE fq_found search_minimum(fq_rows *r, int length, const fq_trials *t) {
  vf low = vf_load(r->x[0]), high = low, sum_w = vf_load(r->w[0]), sum_x = vf_mul(sum_w, low);
  for (int i = 1; i < length; i++) {
    const vf x = vf_load(r->x[i]), w = vf_load(r->w[i]);
    low = vf_min(low, x);
    high = vf_max(high, x);
    sum_w = vf_add(sum_w, w);
    sum_x = vf_add(sum_x, vf_mul(w, x));
  }
  low = vf_min(low, vf_set(0));
  const vf whole = vf_sub(high, low); /* 0 where the row is constant: nothing is less than the error of 0 there */
  vf minimum = low, span = vf_where_zero(whole, vf_set(1), whole);
  fq_found found = {.inverse = vf_div(vf_set(t->top), span), .origin = low};
  found.scale = vf_div(vf_set(1), found.inverse);
  if (within_reach(span, low, minimum))
    codes_from(r, length, found.inverse, minimum, t->top, 1);
  else
    codes_from(r, length, found.inverse, minimum, t->top, 0);
  vf least = vf_where_zero(whole, vf_set(0), error_of(r, length, found.scale, minimum, t->absolute));
  for (int i = 0; i <= t->last; i++) {
    span = vf_where_zero(whole, vf_set(1), vf_sub(high, minimum));
    const vf inverse = vf_div(vf_set(t->first + t->step * (float)i + t->top), span);
    fq_sums s;
    if (within_reach(span, low, minimum))
      s = codes_from(r, length, inverse, minimum, t->top, 1);
    else
      s = codes_from(r, length, inverse, minimum, t->top, 0);
    const vf determinant = vf_sub(vf_mul(sum_w, s.l2), vf_mul(s.l, s.l));
    vf scale = vf_div(vf_sub(vf_mul(sum_w, s.xl), vf_mul(sum_x, s.l)), determinant);
    vf offset = vf_div(vf_sub(vf_mul(s.l2, sum_x), vf_mul(s.l, s.xl)), determinant);
    scale = vf_where_less(vf_set(0), offset, vf_div(s.xl, s.l2), scale);
    offset = vf_where_less(vf_set(0), offset, vf_set(0), offset);
    const vf error = error_of(r, length, scale, offset, t->absolute);
    /* Where the determinant is not positive, nothing is less than the error: it counts as infinite. */
    const vf counted = vf_where_less(vf_set(0), determinant, error, vf_set(INFINITY));
    found.scale = vf_where_less(counted, least, scale, found.scale);
    found.inverse = vf_where_less(counted, least, inverse, found.inverse);
    found.origin = vf_where_less(counted, least, minimum, found.origin);
    minimum = vf_where_less(counted, least, offset, minimum);
    least = vf_where_less(counted, least, error, least);
  }
  const vf zero = vf_set(0);
  found.scale = vf_where_zero(whole, zero, found.scale);
  found.inverse = vf_where_zero(whole, zero, found.inverse);
  found.least = negated(minimum);
  return found;
}

/* The value of largest magnitude of each row, the first of several; 1 where the row counts as zero, and 0 in *some. */
FQ_INLINE vf extreme_of(const fq_rows *r, int length, vf *some) {
  vf extreme = vf_set(0), largest = extreme;
  for (int i = 0; i < length; i++) {
    const vf x = vf_load(r->x[i]), size = magnitude(x);
    extreme = vf_where_less(largest, size, x, extreme);
    largest = vf_where_less(largest, size, size, largest);
  }
  *some = vf_where_less(largest, vf_set(fq_nothing), vf_set(0), vf_set(1));
  return vf_where_zero(*some, vf_set(1), extreme);
}

/* sum(w x code) and sum(w code^2) of codes around 0; r->code holds w * x. */
FQ_INLINE void sums_around(const fq_rows *r, int length, vf inverse, float middle, int known, vf *lx, vf *l2) {
  *lx = *l2 = vf_set(0);
  for (int i = 0; i < length; i++) {
    const vf code = nearest_within(vf_mul(inverse, vf_load(r->x[i])), -middle, middle - 1, known);
    *lx = vf_add(*lx, vf_mul(vf_load(r->code[i]), code));
    *l2 = vf_add(*l2, vf_mul(vf_mul(vf_load(r->w[i]), code), code));
  }
}

/* A scale for codes from -middle to middle - 1: ggml's make_qx_quants. Known: the elements are finite. */
FQ_INLINE fq_found search_signed(fq_rows *r, int length, float middle, int known) {
  vf some, lx, l2;
  const vf extreme = extreme_of(r, length, &some), zero = vf_set(0);
  for (int i = 0; i < length; i++)
    vf_store(r->code[i], vf_mul(vf_load(r->w[i]), vf_load(r->x[i])));
  fq_found found = {.inverse = vf_div(vf_set(-middle), extreme), .least = zero, .origin = zero};
  sums_around(r, length, found.inverse, middle, known, &lx, &l2);
  found.scale = vf_where_zero(l2, zero, vf_div(lx, l2));
  vf best = vf_mul(found.scale, lx);
  for (int i = -9; i <= 9; i++) {
    if (i == 0)
      continue;
    const vf inverse = vf_div(vf_set(-(middle + 0.1f * (float)i)), extreme);
    sums_around(r, length, inverse, middle, known, &lx, &l2);
    const vf scale = vf_div(lx, l2), least = vf_mul(best, l2);
    /* Without squares there is nothing to be had: 0 is not less than 0. */
    const vf gain = vf_where_less(zero, l2, vf_mul(lx, lx), vf_set(-INFINITY));
    found.scale = vf_where_less(least, gain, scale, found.scale);
    found.inverse = vf_where_less(least, gain, inverse, found.inverse);
    best = vf_where_less(least, gain, vf_mul(scale, lx), best);
  }
  found.scale = vf_where_zero(some, zero, found.scale);
  found.inverse = vf_where_zero(some, zero, found.inverse);
  return found;
}

/* One step of the descent: what becomes of element i's code. */
typedef struct {
  vf lx, l2; /* sums of w * x * code and w * code^2 */
  vi changes;
} fq_descent;

FQ_INLINE void move_code(fq_rows *r, int i, float middle, fq_descent *d) {
  const vf zero = vf_set(0), x = vf_load(r->x[i]), w = vf_load(r->w[i]), code = vf_load(r->code[i]);
  const vf wx = vf_mul(w, x);
  const vf lx = vf_sub(d->lx, vf_mul(wx, code)), l2 = vf_sub(d->l2, vf_mul(vf_mul(w, code), code));
  const vf moved = nearest_within(vf_div(vf_mul(x, l2), lx), -middle, middle - 1, 0);
  const vf new_lx = vf_add(lx, vf_mul(wx, moved)), new_l2 = vf_add(l2, vf_mul(vf_mul(w, moved), moved));
  const vf old_gain = vf_mul(vf_mul(d->lx, d->lx), new_l2);
  vf gain = vf_mul(vf_mul(new_lx, new_lx), d->l2);
  gain = vf_where_less(zero, lx, gain, vf_set(-INFINITY));
  gain = vf_where_less(zero, new_l2, gain, vf_set(-INFINITY));
  gain = vf_where_zero(vf_sub(moved, code), vf_set(-INFINITY), gain);
  const vf kept = vf_where_less(old_gain, gain, moved, code);
  vf_store(r->code[i], kept);
  d->changes = vi_or(d->changes, vi_xor(vf_bits(kept), vf_bits(code)));
  d->lx = vf_where_less(old_gain, gain, new_lx, d->lx);
  d->l2 = vf_where_less(old_gain, gain, new_l2, d->l2);
}

/* The same with every code moved in turn, up to five times, where that helps: ggml's make_q3_quants. The codes, counted
 * from 0, are left in r->code; all 0 where the row counts as zero. Each step waits for a division in the one before:
 * FQ_SIDE sets of 16 rows take theirs side by side. */
enum { FQ_SIDE = 2 };
FQ_INLINE void descend_signed(fq_rows *r, int length, float middle, fq_found *found) {
  const vf zero = vf_set(0);
  vf some[FQ_SIDE];
  fq_descent d[FQ_SIDE];
  for (int k = 0; k < FQ_SIDE; k++) {
    const vf inverse = vf_div(vf_set(-middle), extreme_of(r + k, length, some + k));
    d[k] = (fq_descent){zero, zero, vi_set(0)};
    for (int i = 0; i < length; i++) {
      const vf x = vf_load(r[k].x[i]), w = vf_load(r[k].w[i]);
      const vf code = nearest_within(vf_mul(inverse, x), -middle, middle - 1, 1);
      vf_store(r[k].code[i], code);
      d[k].lx = vf_add(d[k].lx, vf_mul(vf_mul(w, x), code));
      d[k].l2 = vf_add(d[k].l2, vf_mul(vf_mul(w, code), code));
    }
  }
  for (int turn = 0; turn < 5; turn++) {
    for (int k = 0; k < FQ_SIDE; k++)
      d[k].changes = vi_set(0);
    for (int i = 0; i < length; i++)
      for (int k = 0; k < FQ_SIDE; k++)
        move_code(r + k, i, middle, d + k);
    vi changes = d[0].changes;
    for (int k = 1; k < FQ_SIDE; k++)
      changes = vi_or(changes, d[k].changes);
    if (vi_highest(vi_and(changes, vi_set(INT32_MAX))) == 0)
      break;
  }
  for (int k = 0; k < FQ_SIDE; k++) {
    for (int i = 0; i < length; i++) {
      const vf code = vf_add(vf_load(r[k].code[i]), vf_set(middle));
      vf_store(r[k].code[i], vf_where_zero(some[k], zero, code));
    }
    const vf scale = vf_where_less(zero, d[k].l2, vf_div(d[k].lx, d[k].l2), zero);
    found[k] = (fq_found){.scale = vf_where_zero(some[k], zero, scale), .least = zero, .inverse = zero, .origin = zero};
  }
}

/* Codes as ggml keeps them, in 8 bits. */
FQ_INLINE vf byte_of(vi a) { return vi_convert(vi_and(a, vi_set(255))); }

/* A scale for codes from 0 to top of positive values: ggml's make_qp_quants. The codes are left in r->code. */
FQ_INLINE vf search_positive(fq_rows *r, int length, float top) {
  const vf zero = vf_set(0), top_v = vf_set(top);
  const vi top_i = vi_set((int32_t)top);
  vf largest = zero;
  for (int i = 0; i < length; i++)
    largest = vf_max(largest, vf_load(r->x[i]));
  const vf some = vf_where_less(largest, vf_set(fq_nothing), zero, vf_set(1));
  largest = vf_where_zero(some, vf_set(1), largest);
  vf inverse = vf_div(top_v, largest), least = zero;
  for (int trial = -5; trial <= 4; trial++) { /* the first one stands for the plain range */
    if (trial == 0)
      continue;
    const int plain = trial == -5;
    const vf tried = plain ? inverse : vf_div(vf_set(0.1f * (float)trial + top), largest);
    const vf scale = vf_div(vf_set(1), tried);
    vf error = zero;
    for (int i = 0; i < length; i++) {
      const vf x = vf_load(r->x[i]);
      const vi code = nearest_any(vf_mul(tried, x));
      const vf held = plain ? byte_of(code) : vi_convert(vi_min(code, top_i));
      const vf difference = vf_sub(x, vf_mul(scale, held));
      error = vf_add(error, vf_mul(vf_mul(vf_load(r->w[i]), difference), difference));
    }
    if (plain) {
      least = error;
      continue;
    }
    inverse = vf_where_less(error, least, tried, inverse);
    least = vf_where_less(error, least, error, least);
  }
  vf sum_lx = zero, sum_l2 = zero;
  for (int i = 0; i < length; i++) {
    const vf x = vf_load(r->x[i]), w = vf_load(r->w[i]);
    const vi nearest = vi_min(nearest_any(vf_mul(inverse, x)), top_i);
    const vf code = vi_convert(nearest);
    vf_store(r->code[i], byte_of(nearest));
    sum_lx = vf_add(sum_lx, vf_mul(vf_mul(w, x), code));
    sum_l2 = vf_add(sum_l2, vf_mul(vf_mul(w, code), code));
  }
  for (int turn = 0; turn < 5; turn++)
    for (int i = 0; i < length; i++) {
      const vf x = vf_load(r->x[i]), w = vf_load(r->w[i]), code = vf_load(r->code[i]), wx = vf_mul(w, x);
      const vf lx = vf_sub(sum_lx, vf_mul(wx, code)), l2 = vf_sub(sum_l2, vf_mul(vf_mul(w, code), code));
      const vi nearest = vi_min(nearest_any(vf_div(vf_mul(x, l2), lx)), top_i);
      const vf moved = vi_convert(nearest);
      const vf new_lx = vf_add(lx, vf_mul(wx, moved)), new_l2 = vf_add(l2, vf_mul(vf_mul(w, moved), moved));
      const vf old_gain = vf_mul(vf_mul(sum_lx, sum_lx), new_l2);
      vf gain = vf_mul(vf_mul(new_lx, new_lx), sum_l2);
      gain = vf_where_less(zero, lx, gain, vf_set(-INFINITY));
      gain = vf_where_less(zero, l2, gain, vf_set(-INFINITY));
      gain = vf_where_zero(vf_sub(moved, code), vf_set(-INFINITY), gain);
      vf_store(r->code[i], vf_where_less(old_gain, gain, byte_of(nearest), code));
      sum_lx = vf_where_less(old_gain, gain, new_lx, sum_lx);
      sum_l2 = vf_where_less(old_gain, gain, new_l2, sum_l2);
    }
  for (int i = 0; i < length; i++)
    vf_store(r->code[i], vf_where_zero(some, zero, vf_load(r->code[i])));
  return vf_where_zero(some, zero, vf_where_less(zero, sum_l2, vf_div(sum_lx, sum_l2), zero));
}

#endif
