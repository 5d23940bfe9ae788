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

/* Take 16 rows, or fewer followed by zeros, of so many consecutive weights each, a multiple of 4. */
FQ_INLINE void take_rows(fq_rows *r, const float *x, int64_t rows, int length) {
  float padded[FQ_LANES * FQ_ROW];
  if (rows < FQ_LANES) {
    memset(padded, 0, sizeof padded);
    memcpy(padded, (const char *)x, (size_t)(rows * length) * sizeof(float));
    x = padded;
  }
  for (int i = 0; i < length; i += 4)
    for (int k = 0; k < FQ_LANES; k += FQ_PART) {
      pf columns[4];
      pf_load_columns(x + k * length + i, length, columns);
      for (int j = 0; j < 4; j++)
        pf_store(r->x[i + j] + k, columns[j]);
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

/* The value of largest magnitude of each row, the first of several; 1 where the row counts as zero, and 0 in *some.
 * Known: the elements are finite. NaN does not count. */
FQ_INLINE vf extreme_of(const fq_rows *r, int length, int known, vf *some) {
  vf extreme = vf_set(0), largest = extreme;
  for (int i = 0; i < length; i++) {
    const vf x = vf_load(r->x[i]), size = magnitude(x);
    if (!known)
      extreme = vf_where_less(largest, size, x, extreme);
    largest = known ? vf_max(largest, size) : vf_where_less(largest, size, size, largest);
  }
  for (int i = length - 1; known && i >= 0; i--) {
    const vf x = vf_load(r->x[i]);
    extreme = vf_where_less(magnitude(x), largest, extreme, x);
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
  const vf extreme = extreme_of(r, length, known, &some), zero = vf_set(0);
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

/* ggml's make_q3_quants, with weights w = x^2: plain codes, counted from 0, then each moved in turn, up to five times,
 * where that helps. */
typedef struct {
  vf lx, l2; /* sums of w * x * code and w * code^2 */
} fq_descent;

/* The plain codes, left in r->code, and their sums; r->w takes what each element adds to lx. */
FQ_INLINE fq_descent begin_descent(fq_rows *r, int length, float middle, vf *inverse) {
  vf some;
  const vf extreme = extreme_of(r, length, 1, &some);
  *inverse = vf_where_zero(some, vf_set(0), vf_div(vf_set(-middle), extreme));
  fq_descent d = {vf_set(0), vf_set(0)};
  for (int i = 0; i < length; i++) {
    const vf x = vf_load(r->x[i]), w = vf_mul(x, x);
    const vf code = nearest_within(vf_mul(*inverse, x), -middle, middle - 1, 1), share = vf_mul(vf_mul(w, x), code);
    vf_store(r->code[i], code);
    vf_store(r->w[i], share);
    d.lx = vf_add(d.lx, share);
    d.l2 = vf_add(d.l2, vf_mul(vf_mul(w, code), code));
  }
  return d;
}

/* The rows, as bits, that are not sure to keep their plain codes.
 *
 * Plain codes have all the same sign as their weights, or all the other one. If it is the other one, lx without any
 * element is not above 0, and nothing moves; so it is for about half of all rows. Else element i stays at its code c if
 * x (l2 - x^2 c^2) / (lx - x^3 c) lies nearer to it than 1/2 or beyond it if it is the last one, which is to say
 * |x l2 / lx - c| + x^3 c / lx / 2 < 1/2, the first quotient held between the last codes. All terms of both sums have
 * one sign, so that float32 errs by less than 64 * 2^-24 there, and the distance kept from 1/2 is 64 times that. It
 * also keeps the divisor above lx / 2^11, and the quotient, as x l2 < 9 lx, within what nearest_any rounds right. Where
 * products may fall below float32's least or beyond its largest number, nothing is known. */
FQ_INLINE uint32_t may_move(const fq_rows *r, int length, float middle, const fq_descent *d) {
  const vf zero = vf_set(0), low = vf_set(-middle), high = vf_set(middle - 1);
  const vf ratio = vf_div(d->l2, d->lx), half = vf_div(vf_set(0.5f), d->lx);
  vf farthest = zero;
  for (int i = 0; i < length; i++) {
    const vf x = vf_load(r->x[i]), code = vf_load(r->code[i]);
    const vf held = vf_min(vf_max(vf_mul(x, ratio), low), high), share = vf_mul(vf_load(r->w[i]), half);
    farthest = vf_max(farthest, vf_add(magnitude(vf_sub(held, code)), share));
  }
  uint32_t sure = vf_bits_less(farthest, vf_set(0.5f - 0x1p-12f));
  sure &= vf_bits_less(vf_set(0x1p-80f), d->lx) & vf_bits_less(d->lx, vf_set(0x1p100f));
  return vf_bits_less(zero, d->lx) & ~sure;
}

/* The next move of a row of 16, an element in each lane of codes; whether there is one. Of all five turns' elements,
 * next is the one whose turn it is. Sums change with a move alone: up to then all elements are tried against the same
 * ones, and the next one that helps moves. No branch: which way it would go cannot be foreseen. */
FQ_INLINE int32_t move_next(const float *row, float middle, float *codes, float *lx, float *l2, uint32_t *next) {
  static const float lanes[FQ_LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vf zero = vf_set(0), none = vf_set(-INFINITY), sum_lx = vf_set(*lx), sum_l2 = vf_set(*l2);
  const vf x = vf_load(row), w = vf_mul(x, x), wx = vf_mul(w, x), code = vf_load(codes);
  const vf rest_lx = vf_sub(sum_lx, vf_mul(wx, code)), rest_l2 = vf_sub(sum_l2, vf_mul(vf_mul(w, code), code));
  const vf moved = nearest_within(vf_div(vf_mul(x, rest_l2), rest_lx), -middle, middle - 1, 0);
  const vf its_lx = vf_add(rest_lx, vf_mul(wx, moved)), its_l2 = vf_add(rest_l2, vf_mul(vf_mul(w, moved), moved));
  const vf counted = vf_where_zero(vf_sub(moved, code), none, vf_where_less(zero, rest_lx, sum_l2, none));
  const vf gain = vf_mul(vf_mul(its_lx, its_lx), counted), old_gain = vf_mul(vf_mul(sum_lx, sum_lx), its_l2);
  _Alignas(64) float all_lx[2 * FQ_LANES], all_l2[2 * FQ_LANES]; /* with the move, and without */
  vf_store(all_lx, its_lx);
  vf_store(all_l2, its_l2);
  vf_store(all_lx + FQ_LANES, sum_lx);
  vf_store(all_l2 + FQ_LANES, sum_l2);
  const uint32_t better = vf_bits_less(old_gain, gain) & vf_bits_less(zero, its_l2);
  /* Behind those of this turn come those of the next one; those gone by have gone. The highest bit stands for none. */
  const uint32_t ahead = (better << FQ_LANES | better) >> *next % FQ_LANES;
  const uint32_t element = *next + (uint32_t)__builtin_ctz(ahead | 1u << 31), lane = element % FQ_LANES;
  const uint32_t moves = (better != 0) & (element < 5 * FQ_LANES);
  *lx = all_lx[lane + FQ_LANES * (1 - moves)];
  *l2 = all_l2[lane + FQ_LANES * (1 - moves)];
  *next = element + 1;
  const vf others = vf_sub(vf_load(lanes), vf_set((float)lane - (float)FQ_LANES * (float)(1 - moves)));
  vf_store(codes, vf_where_zero(others, moved, code));
  return (int32_t)moves;
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
