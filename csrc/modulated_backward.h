// The only file with the modulated norm's gradients, and those of the gated add before it:
//
//   h = dy·(1 + scale)      ds = norm'(h) [+ grad_sum]      dscale = Σ dy·x̂      dshift = Σ dy
//                           dx = ds·gate                    dgate = Σ ds·x
//
// summed over the rows that share a modulation, in the order of the rows, or stored, where each row has its own. Rows
// share what they sum to, so two of them go together, as in backward.h: but not in fp64, nor in the baseline, which are
// for who has nothing else, and would be 200 KB more.
#pragma once

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
  const auto gain_of = [&](auto span) __attribute__((always_inline)) {
    return modulation_of<T>(b.modulation, scale, span) + splat<T>(1);
  };
  Norm norm[Rows];
  for (int k = 0; k < Rows; ++k) {
    norm[k].set_row(rows, first + k);
    if (!b.need_input) continue;
    const T *x = (const T*)rows.input[first + k], *grad = (const T*)rows.grad[first + k];
    typename Norm::Sums sum;
    const void* soon = rows.ask && b.add ? rows.grad_sum[first + k] : grad;
    sum_columns<T>(sum, b.columns, [&](auto span, int u) __attribute__((always_inline)) {
      prefetch_part<T, 2>((const char*)soon, span);
      sum.add(u, span.load_from(grad) * gain_of(span), norm[k].normalised(span.load_from(x)));
    });
    norm[k].set_means(value_of(sum), (double)b.columns);
  }
  auto* dscale = (Scalar<T>*)rows.grad_weight[first];
  auto* dshift = dscale + padded(b.columns);
  const int64_t ahead = rows.count;
  for_columns<T>(b.columns, rows.back, [&](auto span) __attribute__((always_inline)) {
    if (is_whole<decltype(span)> && rows.ask)
      for (int k = 0; k < Rows; ++k) {
        const int64_t r = first + k;
        prefetch_part<T, 2>((const char*)rows.input[r] + rows.next[0] * ahead + 4096, span);
        prefetch_part<T, 2>((const char*)rows.grad[r] + rows.next[1] * ahead + 4096, span);
      }
    V gain, ds[Rows], dy[Rows], product[Rows];
    if (b.need_input) gain = gain_of(span);
    for (int k = 0; k < Rows; ++k) {
      const int64_t r = first + k;
      dy[k] = span.load_from((const T*)rows.grad[r]);
      const V normalised = norm[k].normalised(span.load_from((const T*)rows.input[r]));
      product[k] = dy[k] * normalised;
      if (b.need_input) {
        ds[k] = norm[k].dx(dy[k] * gain, normalised);
        if (b.add) ds[k] = ds[k] + span.load_from((const T*)rows.grad_sum[r]);
      }
    }
    if (b.need_weight) {
      V scales = span.load_raw(dscale), shifts = span.load_raw(dshift);
      for (int k = 0; k < Rows; ++k) scales = scales + product[k], shifts = shifts + dy[k];
      span.store_raw(dscale, scales), span.store_raw(dshift, shifts);
    } else if constexpr (Rows == 1) {
      if (rows.grad_gate[first]) store_modulation<T>(b.modulation, rows.grad_gate[first], product[0], span);
      if (rows.gain[first]) store_modulation<T>(b.modulation, rows.gain[first], dy[0], span);
    }
    for (int k = 0; b.need_input && k < Rows; ++k) span.store_to((T*)rows.grad_input[first + k], ds[k]);
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
  for (int64_t r = 0; r < rows.count; ++r) {
    const void* gate = rows.gate[r];
    auto* dgate = (Scalar<T>*)rows.grad_weight[r];
    const bool stream = rows.stream && (!b.need_input || can_stream(rows.grad_input[r])) && can_stream(rows.gain[r]);
    const char* next = (const char*)rows.input[r] + rows.next[0] * rows.count + 4096;
    for_columns<T>(b.columns, [&](auto span) __attribute__((always_inline)) {
      const Vector<T> ds = span.load_from((const T*)rows.grad[r]);
      Vector<T> product = {};
      if (is_whole<decltype(span)> && rows.ask) prefetch_part<T, 2>(next, span);
      if (b.need_weight || rows.grad_gate[r]) product = ds * span.load_from((const T*)rows.input[r]);
      if (b.need_weight) span.store_raw(dgate, span.load_raw(dgate) + product);
      else if (rows.grad_gate[r]) store_modulation<T>(b.modulation, rows.grad_gate[r], product, span);
      if (b.need_input)
        store_or_stream<T>(stream, rows.grad_input[r], gate ? ds * modulation_of<T>(b.modulation, gate, span) : ds,
                           span);
      if (is_whole<Full<T>> && rows.gain[r]) store_or_stream<T>(stream, rows.gain[r], ds, span);
    });
    if (!is_whole<Full<T>> && rows.gain[r]) __builtin_memcpy(rows.gain[r], rows.grad[r], b.columns * sizeof(T));
  }
}

template <class T>
BackwardKernel modulated_backward_of(const Backward& b) {
  if (b.modulate == Modulate::add) return &add_gated_backward<T>;
  return b.layer ? &modulated_backward<LayerBackward<T>> : &modulated_backward<RmsBackward<T>>;
}
