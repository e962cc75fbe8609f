// The only file with the gradients of the norm in general. With h = dy·gain, x̂ = x·r and N what the sum of squares is
// divided by:
//
//   dx = r · (h - x̂ · (Σ h·x̂ + dr·r) / N)  [+ ds]        dw += dy·x̂        db += dy
//
// where dr arrives at r, and columns that don't count have no second term. What is saved of a sum that isn't rounded is
// the rounded one: x̂ is that times the r which was kept.
#pragma once

template <class T>
RMSNORM_INLINE void general_backward_row(const Backward& b, const BackwardRows& rows, int64_t r) {
  using V = Vector<T>;
  using S = Scalar<T>;
  const S kept = kept_rstd<T>(rows, r);
  const V scale = splat<T>(kept < 0 ? -kept : kept);
  const auto* x = (const T*)rows.input[r];
  const auto dy_of = [&](auto span) __attribute__((always_inline)) { return load_as<T>(span, b.grad, rows.grad[r]); };
  const auto h_of = [&](auto span, const V& dy) __attribute__((always_inline)) {
    return b.gain.data ? dy * span.load_raw((const S*)rows.gain[r]) : dy;
  };
  V minus_mean = {};
  if (b.need_input && !(kept < 0)) {
    double total = rows.mean ? rows.mean[r] * (double)kept : 0.0;
    if (b.grad != Type::none) {
      Sum<T> sum;
      sum_columns<T>(sum, b.columns, [&](auto span, int u) __attribute__((always_inline)) {
        sum.add(u, h_of(span, dy_of(span)), span.load_from(x) * scale);
      });
      total += value_of(sum).high;
    }
    minus_mean = splat<T>((S)(-total / (double)b.divisor));
  }
  S *dw = (S*)rows.grad_weight[r], *db = dw + padded(b.columns);
  const bool stream = rows.stream && can_stream(rows.grad_input[r]);
  const char *next = (const char*)x + rows.next[0], *next_grad = (const char*)rows.grad[r] + rows.next[1];
  for_columns<T>(b.columns, rows.back, [&](auto span) __attribute__((always_inline)) {
    if (is_whole<decltype(span)> && stream) prefetch_part<T, 2>(next, span), prefetch_part<T, 2>(next_grad, span);
    const V normalised = span.load_from(x) * scale;
    const V dy = b.grad != Type::none ? dy_of(span) : V{};
    if (b.need_weight) span.store_raw(dw, fma(dy, normalised, span.load_raw(dw)));
    if (b.need_bias) span.store_raw(db, span.load_raw(db) + dy);
    if (!b.need_input) return;
    const V mean = b.mask ? minus_mean * span.load_raw((const S*)b.mask) : minus_mean;
    V dx = fma(normalised, mean, h_of(span, dy)) * scale;
    if (b.add) dx = dx + span.load_from((const T*)rows.grad_sum[r]);
    store_or_stream<T>(stream, rows.grad_input[r], dx, span);
  });
}

template <class T>
__attribute__((noinline, cold)) void general_rescue(const Backward& b, const BackwardRows& rows, int64_t r) {
  using S = Scalar<T>;
  const double n = (double)b.divisor;
  const auto x_at = [&](int64_t i) { return element((const T*)rows.input[r], i); };
  const auto dy_at = [&](int64_t i) { return b.grad == Type::none ? 0.0 : element_as(b.grad, rows.grad[r], i); };
  const auto h_at = [&](int64_t i) {
    return b.gain.data ? dy_at(i) * (double)((const S*)rows.gain[r])[raw_index<T>(i)] : dy_at(i);
  };
  const ScaledRow row = kept_or_scaled<T>(rows, r, [&] { return scale_row(x_at, b.counted, b.eps, false, b.divisor); });
  double mean = 0.0;
  // What doesn't arrive isn't zeros: 0 · x̂ of an infinity is NaN, and so would be the row.
  for (int64_t i = 0; b.grad != Type::none && i < b.columns; ++i) mean += h_at(i) / n * row.normalise(x_at(i));
  if (rows.mean) mean += rows.mean[r] / n * (row.high * row.scale);
  if (row.floored) mean = 0.0;
  for (int64_t i = 0; i < b.columns; ++i) {
    const double normalised = row.normalise(x_at(i));
    S* grad_weight = (S*)rows.grad_weight[r] + raw_index<T>(i);
    if (b.need_weight) *grad_weight += (S)(dy_at(i) * normalised);
    if (b.need_bias) grad_weight[padded(b.columns)] += (S)dy_at(i);
    if (!b.need_input) continue;
    double dx = (h_at(i) - (i < b.counted ? normalised * mean : 0.0)) * row.high * row.scale;
    if (b.add) dx += element((const T*)rows.grad_sum[r], i);
    set_element((T*)rows.grad_input[r], i, dx);
  }
}

// Whether rows that differ from the plain norm's in nothing but gradients that arrive as bf16 go by its loop of two
// rows (backward_pairs.h).
template <class T>
constexpr bool kWidenedPairs = false;
#if defined(RMSNORM_AVX512)
template <>
constexpr bool kWidenedPairs<float> = true;
#endif

template <class T>
void general_backward(const Backward& b, const BackwardRows& rows) {
  const bool all = b.gain.data && b.need_input && b.need_weight, more = b.need_bias || rows.mean;
  const bool plain = all && !more && b.divisor == b.columns;
  const bool pairs = kWidenedPairs<T> && plain && b.grad == Type::bf16 && rows.pairs && rows.shared_weight;
  bool stream = pairs && rows.stream;
  for (int64_t r = 0; stream && r < rows.count; ++r) stream = can_stream(rows.grad_input[r]);
  for (int64_t r = 0; r < rows.count;) {
    if constexpr (kWidenedPairs<T>) {
      const int64_t paired = pairs ? rows_in_pairs<T>(rows, r) : 0;
      if (paired) {
        const auto run = b.add ? &backward_pairs<T, bf16, true> : &backward_pairs<T, bf16, false>;
        run(b, rows, r, r + paired, stream), r += paired;
        continue;
      }
    }
    if (is_safe<T>(rows, r) || is_floored<T>(rows, r)) general_backward_row<T>(b, rows, r);
    else general_rescue<T>(b, rows, r);
    r += 1;
  }
}
