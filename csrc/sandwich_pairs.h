// The only file with the kernel of both of a sandwich's gradients: two loops for a pair of rows, each of which does a
// part of either norm, so that it reads two tensors, writes one and computes. Memory and arithmetic then take turns
// within a loop, not one loop after another, and what rows share is loaded for both.
//
//   sum_first: ds, and Σ h·x̂ of the first norm        sum_second: dx, and Σ h·x̂ of the second norm for the next pair
//
// The next pair may be another batch's or another chunk's: what a thread sums in a loop of its own, and a last pair
// that is summed twice, every 32 rows, are 1 to 3 % of the time (512x4096, an Emerald Rapids).
//
// Of AVX-512, fp32 and bf16 alone, for the library's size.
#pragma once

#if defined(RMSNORM_AVX512)

template <class T, bool Stream>
struct SandwichPairs {
  using V = Vector<T>;
  using S = Scalar<T>;
  using Norm = RmsBackward<T>;
  const BackwardRows &first, &second;
  int64_t columns, asks;
  Norm inner[2], outer[2];
  double last[2];  // the sums that set_means() had last

  RMSNORM_INLINE SandwichPairs(const Backward* norms, const BackwardRows* rows, const SandwichAhead& ahead)
      : first(rows[0]), second(rows[1]), columns(norms[0].columns), asks(ahead.asks) {}

  // A gradient that goes past the caches is in scratch until it has been used.
  RMSNORM_INLINE T* ds_of(int64_t r) const {
    return Stream ? (T*)first.scratch + r % 2 * padded(columns) : (T*)second.grad_input[r];
  }
  RMSNORM_INLINE void set_means(Norm* norm, PairSums<T>& sums) {
    for_two([&](auto k) __attribute__((always_inline)) {
      const Double2 sum = value_of(sums[k]);
      last[k.value] = sum.high, norm[k.value].set_means(sum, (double)columns);
    });
  }

  // Stores the sum's gradient of rows from r on.
  RMSNORM_INLINE void sum_first(int64_t r) {
    const S *gain = (const S*)first.gain[0], *next_gain = (const S*)second.gain[0];
    S* dw = (S*)second.grad_weight[0];
    for_two([&](auto k) __attribute__((always_inline)) { inner[k.value].set_row(first, r + k.value); });
    PairSums<T> sums;
    sum_columns<T>(sums, columns, [&](auto span, int u) __attribute__((always_inline)) {
      const V g = span.load_raw(gain), next_g = span.load_raw(next_gain);
      V weight = span.load_raw(dw), ds[2], x[2];
      [[maybe_unused]] const int64_t at = asked<T>(columns, first.next[0], asks, span);
      for_two([&](auto k) __attribute__((always_inline)) {
        const int64_t i = r + k.value;
        if constexpr (Stream) {
          ask_for(second.grad_sum[i], at), ask_for(first.input[i], at);
        }
        const V dy = span.load_from((const T*)second.grad[i]);
        const V normalised = outer[k.value].normalised(span.load_from((const T*)second.input[i]));
        ds[k.value] = outer[k.value].dx(dy * next_g, normalised) + span.load_from((const T*)second.grad_sum[i]);
        weight = fma(dy, normalised, weight);
        x[k.value] = inner[k.value].normalised(span.load_from((const T*)first.input[i]));
      });
      for_two([&](auto k) __attribute__((always_inline)) {
        const V stored = span.present(span.store_back(ds_of(r + k.value), ds[k.value]));
        if constexpr (Stream) stream_to(span, (T*)second.grad_input[r + k.value], stored_as<T>(span, stored));
        sums[k].add(u, stored * g, x[k.value]);
      });
      span.store_raw(dw, weight);
    });
    set_means(inner, sums);
  }

  // Stores rows from r on, and sums those from `next` on.
  RMSNORM_INLINE void sum_second(int64_t r, int64_t next) {
    const S *gain = (const S*)first.gain[0], *next_gain = (const S*)second.gain[0];
    S* dw = (S*)first.grad_weight[0];
    for_two([&](auto k) __attribute__((always_inline)) { outer[k.value].set_row(second, next + k.value); });
    PairSums<T> sums;
    sum_columns<T>(sums, columns, [&](auto span, int u) __attribute__((always_inline)) {
      const V g = span.load_raw(gain), next_g = span.load_raw(next_gain);
      V weight = span.load_raw(dw), dx[2];
      [[maybe_unused]] const int64_t at = asked<T>(columns, second.next[0], asks, span);
      for_two([&](auto k) __attribute__((always_inline)) {
        const int64_t i = r + k.value, n = next + k.value;
        if constexpr (Stream) {
          ask_for(second.grad[n], at), ask_for(second.input[n], at);
        }
        const V ds = span.load_from((const T*)ds_of(i));
        const V x = inner[k.value].normalised(span.load_from((const T*)first.input[i]));
        dx[k.value] = inner[k.value].dx(ds * g, x);
        weight = fma(ds, x, weight);
        const V dy = span.load_from((const T*)second.grad[n]);
        sums[k].add(u, dy * next_g, outer[k.value].normalised(span.load_from((const T*)second.input[n])));
      });
      for_two([&](auto k) __attribute__((always_inline)) {
        T* to = (T*)first.grad_input[r + k.value];
        if constexpr (Stream) stream_to(span, to, dx[k.value]);
        else span.store_to(to, dx[k.value]);
      });
      span.store_raw(dw, weight);
    });
    set_means(outer, sums);
  }
};

template <class T, bool Stream>
void sandwich_pairs(const Backward* norms, const BackwardRows* rows, SandwichAhead& ahead) {
  SandwichPairs<T, Stream> pairs(norms, rows, ahead);
  for (int k = 0; k < 2; ++k) {
    pairs.outer[k].set_row(rows[1], k);
    if (ahead.found) pairs.outer[k].set_means({ahead.sums[k], 0.0}, (double)pairs.columns);
    else find_means<false, RmsBackward<T>, T, true>(norms[1], rows[1], k, pairs.outer[k]);
  }
  for (int64_t r = 0; r < rows[0].count; r += 2) {
    pairs.sum_first(r);
    pairs.sum_second(r, r + 2 < rows[0].count || ahead.more ? r + 2 : r);
  }
  ahead.found = ahead.more;  // of rows that aren't safe, too: then the next batch isn't done here
  for (int k = 0; k < 2; ++k) ahead.sums[k] = pairs.last[k];
}

// Whether it was done: all rows are safe.
template <class T>
bool sandwich_both(const Backward* norms, const BackwardRows* rows, SandwichAhead& ahead) {
  bool safe = true, stream = rows[0].stream;
  for (int64_t r = 0; r < rows[0].count; ++r) {
    safe = safe && is_safe<T>(rows[0], r) && is_safe<T>(rows[1], r);
    stream = stream && can_stream(rows[0].grad_input[r]) && can_stream(rows[1].grad_input[r]);
  }
  if (safe && stream) sandwich_pairs<T, true>(norms, rows, ahead);
  else if (safe) sandwich_pairs<T, false>(norms, rows, ahead);
  return safe;
}

bool sandwich_gradients(Type type, const Backward* norms, const BackwardRows* rows, SandwichAhead& ahead) {
  if constexpr (compiles(Type::bf16))
    if (type == Type::bf16) return sandwich_both<bf16>(norms, rows, ahead);
  if constexpr (compiles(Type::f32))
    if (type == Type::f32) return sandwich_both<float>(norms, rows, ahead);
#if defined(RMSNORM_LENDER)
  return RMSNORM_LENDER.sandwich(type, norms, rows, ahead);
#else
  return false;
#endif
}
constexpr auto kSandwich = &sandwich_gradients;
#else
constexpr decltype(Kernels::sandwich) kSandwich = nullptr;
#endif
