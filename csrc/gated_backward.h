// The only file with the gated norm's gradients. With a = activation(g) and a' its slope, and for a row r and m =
// mean(h·x̂):
//
//   gate behind the norm    x̂ = x·r      h = dy·a·gain    dx = r·(h - x̂·m)               dg = dy·x̂·gain·a'    dw +=
//   dy·a·x̂ gate first              x̂ = x·a·r    h = dy·gain      dz = r·(h - x̂·m),  dx = dz·a   dg = dz·x·a'         dw
//   += dy·x̂
//
// In the type of the kernel (fp32, or fp64 for fp64), and in two passes as in backward.h. Both find the activation: to
// keep it would cost as much.
#pragma once

// One vector of a row: what both passes need.
template <class T, bool First>
struct GatedPart {
  using Activate = Activation<kDegree<T>, Vector<T>>;
  Vector<T> x, dy, gain, slope, a, normalised, h;

  template <class Span>
  RMSNORM_INLINE GatedPart(const BackwardRows& rows, int64_t r, const Activate& activate, const Vector<T>& scale,
                           Span span)
      : x(span.load_from((const T*)rows.input[r])),
        dy(span.load_from((const T*)rows.grad[r])),
        gain(span.load_raw((const Scalar<T>*)rows.gain[r])),
        a(activate.with_slope(span.load_from((const T*)rows.gate[r]), slope)) {
    normalised = (First ? x * a : x) * scale;
    h = (First ? dy : dy * a) * gain;
  }
};

template <class T, bool First>
RMSNORM_INLINE void gated_backward_row(const Backward& b, const BackwardRows& rows, int64_t r) {
  using V = Vector<T>;
  const Scalar<T> kept = kept_rstd<T>(rows, r);
  const V scale = splat<T>(kept < 0 ? -kept : kept);
  const typename GatedPart<T, First>::Activate activate(b.gate == Gate::silu);
  V minus_mean = {};
  if ((b.need_input || (First && b.need_gate)) && !(kept < 0)) {
    Sum<T> sum;
    sum_columns<T>(sum, b.columns, [&](auto span, int u) __attribute__((always_inline)) {
      const GatedPart<T, First> part(rows, r, activate, scale, span);
      sum.add(u, part.h, part.normalised);
    });
    minus_mean = splat<T>((Scalar<T>)(-value_of(sum).high / (double)b.columns));
  }
  auto* dw = (Scalar<T>*)rows.grad_weight[r];
  for_columns<T>(b.columns, rows.back, [&](auto span) __attribute__((always_inline)) {
    const GatedPart<T, First> part(rows, r, activate, scale, span);
    const V dz = fma(part.normalised, minus_mean, part.h) * scale;
    if (b.need_input) span.store_to((T*)rows.grad_input[r], First ? dz * part.a : dz);
    if (b.need_gate)
      span.store_to((T*)rows.grad_gate[r], (First ? dz * part.x : part.dy * part.normalised * part.gain) * part.slope);
    if (b.need_weight) span.store_raw(dw, fma(First ? part.dy : part.dy * part.a, part.normalised, span.load_raw(dw)));
  });
}

template <class T, bool First>
void gated_backward(const Backward& b, const BackwardRows& rows) {
  for (int64_t r = 0; r < rows.count; ++r) {
    if (is_safe<T>(rows, r) || is_floored<T>(rows, r)) gated_backward_row<T, First>(b, rows, r);
    else rescue_backward<T>(b, rows, r);
  }
}
