// The only file with the backward kernel: with x̂ = (x - mean)·r and h = grad·gain,
//
//   dx = r · (h - mean(h) - x̂ · mean(h · x̂))  [+ grad_sum]          dw += grad · x̂          db += grad
//
// where RMSNorm has no mean and no bias, and no mean(h · x̂) in a row whose 1/rms is the floor's. Where the output was
// kept instead of the input, x̂ = y · (1 / gain). Two passes over a row, the second from cache. Weight gradients are
// added in the order of the rows.
#pragma once

// x̂ of a vector of row r; `first` is the first of the rows that share what they load.
template <class Norm, class Span>
RMSNORM_INLINE auto normalised_at(const Norm& norm, const BackwardRows& rows, int64_t r, int64_t first, Span span) {
  using T = typename Norm::Element;
  const Vector<T> x = span.load_from((const T*)rows.input[r]);
  if constexpr (kLean<Norm>) return x * span.load_raw((const Scalar<T>*)rows.gate[first]);
  else return norm.normalised(x);
}

// Asks for columns of the row that lies `ahead` rows further on.
template <class T, class Span>
RMSNORM_INLINE void prefetch_rows(const BackwardRows& rows, int64_t r, int64_t ahead, Span span) {
  prefetch_part<T, 2>((const char*)rows.input[r] + rows.next[0] * ahead + 4096, span);
  prefetch_part<T, 2>((const char*)rows.grad[r] + rows.next[1] * ahead + 4096, span);
}

// The first pass.
template <bool Stream, class Norm, class G, bool HasGain>
RMSNORM_INLINE void find_means(const Backward& b, const BackwardRows& rows, int64_t r, Norm& norm) {
  using T = typename Norm::Element;
  typename Norm::Sums sum;
  sum_columns<T>(sum, b.columns, [&](auto span, int u) __attribute__((always_inline)) {
    if constexpr (Stream) prefetch_rows<T>(rows, r, 0, span);
    auto h = span.load_from((const G*)rows.grad[r]);
    const Vector<T> x = span.load_from((const T*)rows.input[r]);
    if constexpr (HasGain && !kLean<Norm>) h = h * span.load_raw((const Scalar<T>*)rows.gain[r]);
    if constexpr (kLean<Norm>) sum.add(u, h, x);
    else sum.add(u, h, norm.normalised(x));
  });
  norm.set_means(value_of(sum), (double)b.columns);
}

// Whether there is a loop that stores two rows while it sums the next two (backward_pairs.h).
template <class Norm, class G, bool HasGain, bool NeedInput, bool NeedWeight, bool Add>
constexpr bool kPairs = false;
#if defined(RMSNORM_AVX512)
template <bool Add>
constexpr bool kPairs<RmsBackward<float>, float, true, true, true, Add> = true;
#endif
#if defined(RMSNORM_AVX512BF16)
template <>
constexpr bool kPairs<RmsBackward<bf16>, bf16, true, true, true, false> = true;
#endif

// Both passes over `Rows` rows, which share what is loaded and stored per column: the gain and the weight's gradient
// (at 4096 columns of fp32 they are as large as L1).
template <int Rows, bool Stream, class Norm, class G, bool HasGain, bool NeedInput, bool NeedWeight, bool Add>
RMSNORM_INLINE void backward_rows(const Backward& b, const BackwardRows& rows, int64_t first) {
  using T = typename Norm::Element;
  using V = Vector<T>;
  using S = Scalar<T>;
  Norm norm[Rows];
  for (int k = 0; k < Rows; ++k) {
    norm[k].set_row(rows, first + k);
    if constexpr (NeedInput && Norm::kMeans) find_means<Stream, Norm, G, HasGain>(b, rows, first + k, norm[k]);
  }
  // Of the next two rows, where three tensors are waited for.
  constexpr bool kAsks = kStreams && Add && !Stream && Rows == 2;
  const bool ask = kAsks && rows.ask && first + 2 * Rows <= rows.count;
  const char* soon[3][Rows];
  for (int k = 0; ask && k < Rows; ++k) {
    soon[0][k] = (const char*)rows.input[first + Rows + k];
    soon[1][k] = (const char*)rows.grad[first + Rows + k];
    soon[2][k] = (const char*)rows.grad_sum[first + Rows + k];
  }
  S* dw = (S*)rows.grad_weight[first];
  S* db = dw + padded(b.columns);
  for_columns<T>(b.columns, rows.back, [&](auto span) __attribute__((always_inline)) {
    V gain, weight, bias, dx[Rows];
    if constexpr (NeedInput && HasGain) gain = span.load_raw((const S*)rows.gain[first]);
    if constexpr (NeedWeight) weight = span.load_raw(dw);
    if constexpr (NeedWeight && Norm::kBias) bias = span.load_raw(db);
    for (int k = 0; k < Rows; ++k) {
      const int64_t r = first + k;
      const V dy = span.load_from((const G*)rows.grad[r]);
      const V normalised = normalised_at(norm[k], rows, r, first, span);
      if constexpr (NeedInput) {
        V h = dy;
        if constexpr (HasGain) h = h * gain;
        dx[k] = norm[k].dx(h, normalised);
        if constexpr (Add && sizeof(T) == 2)
          if (b.round_add) dx[k] = round_own<T>(dx[k]);
        if constexpr (Add) dx[k] = dx[k] + span.load_from((const T*)rows.grad_sum[r]);
        if constexpr (Stream) prefetch_rows<T>(rows, r, Rows, span);
        if constexpr (kAsks)
          for (int n = 0; ask && n < 3; ++n) prefetch_part<T, 2>(soon[n][k], span);
      }
      if constexpr (NeedWeight) weight = fma(dy, normalised, weight);
      if constexpr (NeedWeight && Norm::kBias) bias = bias + dy;
    }
    // After all loads, as rows are often a multiple of 4 KiB apart (should_walk_back() says why that matters).
    for (int k = 0; NeedInput && k < Rows; ++k) {
      T* to = (T*)rows.grad_input[first + k];
      if constexpr (Stream) stream_to(span, to, dx[k]);
      else span.store_to(to, dx[k]);
    }
    if constexpr (NeedWeight) span.store_raw(dw, weight);
    if constexpr (NeedWeight && Norm::kBias) span.store_raw(db, bias);
  });
}

// A row that isn't safe.
template <class Norm, class G, bool HasGain, bool NeedInput, bool NeedWeight, bool Add>
__attribute__((noinline, cold)) void backward_alone(const Backward& b, const BackwardRows& rows, int64_t r) {
  using T = typename Norm::Element;
  if constexpr (!Norm::kBias && !kLean<Norm>)
    if (is_floored<T>(rows, r))
      return backward_rows<1, false, FlooredBackward<T>, G, HasGain, NeedInput, NeedWeight, Add>(b, rows, r);
  rescue_backward<T, G>(b, rows, r);
}

template <class Norm, class G, bool HasGain, bool NeedInput, bool NeedWeight, bool Add>
void backward(const Backward& b, const BackwardRows& rows) {
  using T = typename Norm::Element;
  // With a sum's gradient in fp32 of AVX-512 alone, for the library's size: 512x4096 takes 0.82 to 0.89 of the time.
  constexpr bool streams_sums = NeedWeight && std::is_same_v<T, float> && kBytes == 64;
  constexpr bool may_stream = kStreams && NeedInput && (!Add || streams_sums);
  constexpr int kTogether = kEmulates ? 1 : 2;
  bool stream = may_stream && rows.stream;
  for (int64_t r = 0; stream && r < rows.count; ++r) stream = can_stream(rows.grad_input[r]);
  for (int64_t r = 0; r < rows.count;) {
    if constexpr (kPairs<Norm, G, HasGain, NeedInput, NeedWeight, Add>) {
      const int64_t paired = rows.pairs && rows.shared_weight ? rows_in_pairs<T>(rows, r) : 0;
      if (paired) {
        backward_pairs<T, T, Add>(b, rows, r, r + paired, stream), r += paired;
        continue;
      }
    }
    if (!is_safe<T>(rows, r)) {
      backward_alone<Norm, G, HasGain, NeedInput, NeedWeight, Add>(b, rows, r), r += 1;
    } else if (kTogether == 2 && (!rows.shared_weight || r + 1 == rows.count || !is_safe<T>(rows, r + 1))) {
      backward_rows<1, false, Norm, G, HasGain, NeedInput, NeedWeight, Add>(b, rows, r), r += 1;
    } else if (stream) {
      backward_rows<kTogether, may_stream, Norm, G, HasGain, NeedInput, NeedWeight, Add>(b, rows, r), r += kTogether;
    } else {
      backward_rows<kTogether, false, Norm, G, HasGain, NeedInput, NeedWeight, Add>(b, rows, r), r += kTogether;
    }
  }
}

// The gradient of a norm that was turned: turned back into scratch, where half types have fp32, a few rows at a time.
template <class T, bool NeedWeight>
void turned_backward(const Backward& b, const BackwardRows& rows) {
  using G = Scalar<T>;
  const BackwardKernel norm = &backward<RmsBackward<T>, G, true, true, NeedWeight, false>;
  const int64_t block = turned_rows(b.input, b.columns);
  ForwardRows turn;
  turn.next = rows.next[1];
  BackwardRows part;  // 2 KiB: not set to 0 for 32 rows that take less
  part.shared_weight = true, part.stream = rows.stream, part.back = rows.back, part.pairs = rows.pairs;
  part.ask = false, part.next[1] = 0;  // what is turned back is in L1
  part.next[0] = rows.next[0], part.gain[0] = rows.gain[0], part.grad_weight[0] = rows.grad_weight[0];
  for (int64_t r = 0; r < block; ++r) {
    part.grad[r] = (G*)rows.scratch + r * padded(b.columns);
    part.gain[r] = rows.gain[0], part.grad_weight[r] = rows.grad_weight[0];
  }
  for (int64_t begin = 0; begin < rows.count; begin += block) {
    part.count = begin + block < rows.count ? block : rows.count - begin;
    part.rstd = (const G*)rows.rstd + begin;
    for (int64_t r = 0; r < part.count; ++r) {
      part.input[r] = rows.input[begin + r], part.grad_input[r] = rows.grad_input[begin + r];
      turn.gate[r] = rows.gate[begin + r], turn.residual[r] = rows.grad_sum[begin + r];
    }
    turn_to<T, true, G>(b.turn, turn, 0, part.count, rows.grad + begin, part.grad);
    norm(b, part);
  }
}

template <class Norm, bool NeedInput, bool NeedWeight, bool Add>
BackwardKernel backward_with_gain(const Backward& b) {
  return b.gain.data ? &backward<Norm, typename Norm::Element, true, NeedInput, NeedWeight, Add>
                     : &backward<Norm, typename Norm::Element, false, NeedInput, NeedWeight, Add>;
}

// There is always a gain, if only of ones, and the input's gradient.
template <class T, bool NeedWeight, bool Add>
constexpr BackwardKernel kLeanBackward = &backward<LeanBackward<T>, T, true, true, NeedWeight, Add>;

template <class T>
BackwardKernel lean_backward_of(const Backward& b) {
  if (b.add) return b.need_weight ? kLeanBackward<T, true, true> : kLeanBackward<T, false, true>;
  return b.need_weight ? kLeanBackward<T, true, false> : kLeanBackward<T, false, false>;
}

template <class T>
BackwardKernel modulated_backward_of(const Backward& b);

template <class T>
BackwardKernel backward_of(const Backward& b) {
  if (b.general) return &general_backward<T>;
  if (b.modulate != Modulate::none) return modulated_backward_of<T>(b);
  if (b.inverse.data) return lean_backward_of<T>(b);
  if (b.turn.turn != Turn::none) return b.need_weight ? &turned_backward<T, true> : &turned_backward<T, false>;
  if (b.gate != Gate::none) return b.gate_first ? &gated_backward<T, true> : &gated_backward<T, false>;
  if (b.layer) {
    using Norm = LayerBackward<T>;
    if (!b.need_input) return &backward<Norm, typename Norm::Element, false, false, true, false>;
    return b.need_weight ? backward_with_gain<Norm, true, true, false>(b)
                         : backward_with_gain<Norm, true, false, false>(b);
  }
  using Norm = RmsBackward<T>;
  if (!b.need_input) return &backward<Norm, typename Norm::Element, false, false, true, false>;
  if (b.need_weight)  // there is a gain then
    return b.add ? &backward<Norm, typename Norm::Element, true, true, true, true>
                 : &backward<Norm, typename Norm::Element, true, true, true, false>;
  return b.add ? backward_with_gain<Norm, true, false, true>(b) : backward_with_gain<Norm, true, false, false>(b);
}

BackwardKernel select_backward(const Backward& b) {
  switch (b.input) {
    case Type::bf16:
      if constexpr (compiles(Type::bf16)) return backward_of<bf16>(b);
      break;
    case Type::f16:
      if constexpr (compiles(Type::f16)) return backward_of<f16>(b);
      break;
    case Type::f64:
      if constexpr (compiles(Type::f64)) return backward_of<double>(b);
      break;
    default:
      if constexpr (compiles(Type::f32)) return backward_of<float>(b);
  }
  return borrowed(b);
}
