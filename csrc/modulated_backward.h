// The only file with the modulated norm's gradients, and those of the gated add before it:
//
//   h = dy·(1 + scale)      ds = norm'(h) [+ grad_sum]      dscale = Σ dy·x̂      dshift = Σ dy
//                           dx = ds·gate                    dgate = Σ ds·x
//
// summed over the rows that share a modulation, in the order of the rows, or stored, where each row has its own. Rows
// share what they sum to, so two of them go together, as in backward.h: but not in fp64, nor in the baseline, which are
// for who has nothing else, and would be 200 KB more.
#pragma once

// Bytes ahead, at which what is read is asked for into L1: 512x4096 fp32 takes 0.9 of the time, 4096x4096 0.7.
constexpr int64_t kSoon = 1536;

// Stores the gradient of a row's own modulation, in the modulation's type.
template <class T, class Span>
RMSNORM_INLINE void store_modulation(Type type, void* row, const Vector<T>& x, Span span) {
  if constexpr (sizeof(T) == 2)
    if (type == Type::f32) return span.store_to((float*)row, x);
  span.store_to((T*)row, x);
}

template <int Rows, class Norm>
RMSNORM_INLINE void modulated_rows(const Backward& b, const BackwardRows& rows, int64_t first) {
  using T = typename Norm::Element;
  using V = Vector<T>;
  const void* scale = rows.gate[first];
  // Not looked up in the loop, where any store might have changed them: 0.9 of the time in L2.
  const T *x[Rows], *grad[Rows], *grad_sum[Rows];
  T* grad_input[Rows];
  for (int k = 0; k < Rows; ++k) {
    x[k] = (const T*)rows.input[first + k], grad[k] = (const T*)rows.grad[first + k];
    grad_sum[k] = (const T*)rows.grad_sum[first + k], grad_input[k] = (T*)rows.grad_input[first + k];
  }
  const bool need_input = b.need_input, need_weight = b.need_weight, add = b.add, ask = rows.ask && add;
  bool stream = rows.stream && need_input;
  for (int k = 0; k < Rows; ++k) stream = stream && can_stream(grad_input[k]);
  const auto gain_of = [&](auto span) __attribute__((always_inline)) {
    return modulation_of<T>(b.modulation, scale, span) + splat<T>(1);
  };
  Norm norm[Rows];
  for (int k = 0; k < Rows; ++k) {
    norm[k].set_row(rows, first + k);
    if (!need_input) continue;
    typename Norm::Sums sum;
    sum_columns<T>(sum, b.columns, [&](auto span, int u) __attribute__((always_inline)) {
      prefetch_part<T, 3>((const char*)x[k] + kSoon, span), prefetch_part<T, 3>((const char*)grad[k] + kSoon, span);
      if (ask) prefetch_part<T, 2>((const char*)grad_sum[k], span);
      sum.add(u, span.load_from(grad[k]) * gain_of(span), norm[k].normalised(span.load_from(x[k])));
    });
    norm[k].set_means(value_of(sum), (double)b.columns);
  }
  auto* dscale = (Scalar<T>*)rows.grad_weight[first];
  auto* dshift = dscale + padded(b.columns);
  for_columns<T>(b.columns, rows.back, [&](auto span) __attribute__((always_inline)) {
    V gain, ds[Rows], dy[Rows], product[Rows];
    if (need_input) gain = gain_of(span);
    for (int k = 0; k < Rows; ++k) {
      dy[k] = span.load_from(grad[k]);
      const V normalised = norm[k].normalised(span.load_from(x[k]));
      product[k] = dy[k] * normalised;
      if (need_input) {
        ds[k] = norm[k].dx(dy[k] * gain, normalised);
        if (add) ds[k] = ds[k] + span.load_from(grad_sum[k]);
      }
    }
    if (need_weight) {
      V scales = span.load_raw(dscale), shifts = span.load_raw(dshift);
      for (int k = 0; k < Rows; ++k) scales = scales + product[k], shifts = shifts + dy[k];
      span.store_raw(dscale, scales), span.store_raw(dshift, shifts);
    } else if constexpr (Rows == 1) {
      if (rows.grad_gate[first]) store_modulation<T>(b.modulation, rows.grad_gate[first], product[0], span);
      if (rows.gain[first]) store_modulation<T>(b.modulation, rows.gain[first], dy[0], span);
    }
    for (int k = 0; need_input && k < Rows; ++k) store_or_stream<T>(stream, grad_input[k], ds[k], span);
  });
}

// A row that isn't safe.
template <class T>
__attribute__((noinline, cold)) void rescue_modulated(const Backward& b, const BackwardRows& rows, int64_t r) {
  const auto set = [&](void* row, int64_t i, double x) {
    if (!row) return;
    if (sizeof(T) == 2 && b.modulation == Type::f32) ((float*)row)[i] = (float)x;
    else set_element((T*)row, i, x);
  };
  rescue_gradients<T, T>(
      b, rows, r, [&](int64_t i) { return 1 + modulation_at<T>(b.modulation, rows.gate[r], i); },
      [&](int64_t i, double dy, double normalised) {
        if (b.need_weight) return;
        set(rows.grad_gate[r], i, dy * normalised), set(rows.gain[r], i, dy);
      });
}

template <class Norm>
void modulated_backward(const Backward& b, const BackwardRows& rows) {
  using T = typename Norm::Element;
  constexpr int kTogether = kStreams && sizeof(T) < 8 ? 2 : 1;
  for (int64_t r = 0; r < rows.count;) {
    if (!is_safe<T>(rows, r)) {
      rescue_modulated<T>(b, rows, r), r += 1;
    } else if (kTogether == 1 || !b.need_weight || r + 1 == rows.count || !is_safe<T>(rows, r + 1)) {
      modulated_rows<1, Norm>(b, rows, r), r += 1;
    } else {
      modulated_rows<kTogether, Norm>(b, rows, r), r += kTogether;
    }
  }
}

// Of the add: the gradient that arrived at the sum is rows.grad, and may be stored once more, to rows.gain.
template <class T>
void add_gated_backward(const Backward& b, const BackwardRows& rows) {
  const bool need_input = b.need_input, need_weight = b.need_weight;
  const Type modulation = b.modulation;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T *grad = (const T*)rows.grad[r], *x = (const T*)rows.input[r];
    const void* gate = rows.gate[r];
    auto* dgate = (Scalar<T>*)rows.grad_weight[r];
    void *grad_input = rows.grad_input[r], *own = rows.grad_gate[r], *copy = rows.gain[r];
    const bool stream = rows.stream && (!need_input || can_stream(grad_input)) && can_stream(copy);
    for_columns<T>(b.columns, [&](auto span) __attribute__((always_inline)) {
      const Vector<T> ds = span.load_from(grad);
      Vector<T> product = {};
      prefetch_part<T, 3>((const char*)x + kSoon, span);
      if (need_weight || own) product = ds * span.load_from(x);
      if (need_weight) span.store_raw(dgate, span.load_raw(dgate) + product);
      else if (own) store_modulation<T>(modulation, own, product, span);
      if (need_input)
        store_or_stream<T>(stream, grad_input, gate ? ds * modulation_of<T>(modulation, gate, span) : ds, span);
      if (is_whole<Full<T>> && copy) store_or_stream<T>(stream, copy, ds, span);
    });
    if (!is_whole<Full<T>> && copy) __builtin_memcpy(copy, grad, b.columns * sizeof(T));
  }
}

template <class T>
BackwardKernel modulated_backward_of(const Backward& b) {
  if (b.modulate == Modulate::add) return &add_gated_backward<T>;
  return b.layer ? &modulated_backward<LayerBackward<T>> : &modulated_backward<RmsBackward<T>>;
}
