// The only file for work per column: the gain before the rows, and the weight's gradient after them.
#pragma once

template <class Function>
RMSNORM_INLINE void with_type(Type type, Function&& function) {
  switch (type) {
    case Type::bf16: return function(bf16{});
    case Type::f16: return function(f16{});
    case Type::f64: return function(double{});
    default: return function(float{});
  }
}

// fp64 weights have fp64 gains, and no other weight meets an fp64 vector but through here.
RMSNORM_INLINE D to_wide(const D& x, double) { return x; }
RMSNORM_INLINE D to_wide(const F& x, double) { return widen(x); }
RMSNORM_INLINE F to_wide(const F& x, float) { return x; }
RMSNORM_INLINE F to_wide(const D& x, float) { return narrow(x); }

// NaNs whose lower half is 0, for round_own().
template <class V>
RMSNORM_INLINE V without_payload(const V& x) {
  return V::of([&](int i) __attribute__((always_inline)) {
    const BitsReg bits = (BitsReg)x.v[i];
    return (typename V::Register)(x.v[i] == x.v[i] ? bits : BitsReg{} + 0x7fc00000u);
  });
}

// For rows of type `row` the gain is raw, for none it is in columns' order.
void make_gain(Type row, Type weight_type, const void* weight, double offset, Type gain_type, void* gain,
               int64_t count) {
  const auto convert = [&](auto weight_tag, auto gain_tag) {
    const auto* from = (const decltype(weight_tag)*)weight;
    auto* to = (decltype(gain_tag)*)gain;
    const auto shift = splat<decltype(gain_tag)>((decltype(gain_tag))offset);
    for_columns<float>(count, [&](auto span) { span.store_to(to, shift + to_wide(span.load_from(from), gain_tag)); });
  };
  with_type(weight_type, [&](auto weight_tag) {
    gain_type == Type::f64 ? convert(weight_tag, double{}) : convert(weight_tag, float{});
  });
  if (row == Type::bf16) {
    float* to = (float*)gain;
    for_columns<bf16>(count, [&](auto span) { span.store_raw(to, without_payload(span.load_from(to))); });
  }
}

void put_in_order(Type row, void* partial, int64_t count) {
  float* raw = (float*)partial;
  if (row == Type::bf16) for_columns<bf16>(count, [&](auto span) { span.store_to(raw, span.load_raw(raw)); });
}

void flush(Type row, void* partial, double* total, int64_t count, bool first) {
  const auto add = [&](auto tag) {
    auto* from = (decltype(tag)*)partial;
    for_columns<float>(count, [&](auto span) {
      const auto part = span.load_from(from);
      const auto sum = to_wide(part, double{});
      span.store_to(total, first ? sum : span.load_from((const double*)total) + sum);
      span.store_to(from, decltype(part){});
    });
  };
  if (row == Type::bf16) {
    float* raw = (float*)partial;
    for_columns<bf16>(count, [&](auto span) {
      const auto part = span.load_raw(raw);
      span.store_raw(raw, {});  // beyond the last column too
      span.store_to(raw, part);
    });
  }
  row == Type::f64 ? add(double{}) : add(float{});
}

void finish(const Summands& s, int64_t begin, int64_t end, Type type, void* grad_weight) {
  with_type(type, [&](auto tag) {
    using W = decltype(tag);
    for_columns<float, 1>(begin, end, [&](auto span, auto) {
      D sum = {};
      for (int64_t k = 0; k < s.totals_count; ++k) sum = sum + span.load_from(s.totals + k * s.totals_apart);
      for (int64_t k = 0; k < s.parts_count; ++k) {
        const char* const part = s.parts + k * s.parts_apart;
        if (s.row == Type::f64) sum = sum + span.load_from((const double*)part);
        else sum = sum + widen(span.load_from((const float*)part));
      }
      span.store_to((W*)grad_weight, to_wide(sum, Scalar<W>{}));
    });
  });
}

void finish_one(Type row, void* partial, int64_t count, Type type, void* grad_weight) {
  const auto convert = [&](auto tag) {
    const auto* from = (const decltype(tag)*)partial;
    with_type(type, [&](auto weight_tag) {
      using W = decltype(weight_tag);
      for_columns<float>(count, [&](auto span) {
        const auto part = span.load_from(from);
        span.store_to((W*)grad_weight, to_wide(part + decltype(part){}, Scalar<W>{}));
      });
    });
  };
  put_in_order(row, partial, count);
  row == Type::f64 ? convert(double{}) : convert(float{});
}
