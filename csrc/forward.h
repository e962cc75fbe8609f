// The only file with the forward kernel: the loops that sum a batch of rows by a form's load step, and store them by
// its store step.
#pragma once

// The everyday kernels that have loops of even.h, where it pays: with AVX-512, as other CPUs whose L1 has room for them
// (memory.h) weren't at hand, and with its rounding to bf16.
template <class T>
constexpr bool kHasEven = false;
#if defined(RMSNORM_AVX512)
template <>
constexpr bool kHasEven<float> = true;
#endif
#if defined(RMSNORM_AVX512BF16)
template <>
constexpr bool kHasEven<bf16> = true;
#endif
template <class Form>
constexpr bool kEven = false;
template <class T>
constexpr bool kEven<Plain<Rms<T>, T, T, false, false>> = kHasEven<T>;
template <class Form>
void forward_even(const Forward& f, const ForwardRows& rows);

// The kernel that sums the next block's rows while it stores one's, in caches: a sum with a mean waits for arithmetic,
// the store for what lies beside it (16x4096 0.8 of the time on a Zen 5, 512x4096 0.9). Its output is nobody's input,
// so rows to be rescued may be stored before.
template <class Form>
constexpr bool kSumsAhead = false;

// `load` is the load step; `ask`: bytes of a row to come to ask for with each column.
template <class Form, bool Ask, class Load>
RMSNORM_INLINE void sum_row(const Load& load, const ForwardRows& rows, int64_t r, typename Form::Norm::Block& found,
                            int64_t in_block, int64_t block, int64_t columns, int64_t ask) {
  using Norm = typename Form::Norm;
  using T = typename Norm::Element;
  const auto adder = Norm::adder((const T*)rows.input[r], columns);
  const char* next = (const char*)rows.input[r] + rows.next * block;
  const char* next_residual = (const char*)rows.residual[r] + rows.next_residual * block;
  typename Norm::Sums sum;
  sum_columns<T>(sum, columns, [&](auto span, int u) __attribute__((always_inline)) {
    if constexpr (Ask) prefetch_ahead<T>(next, span, ask);
    if constexpr (Ask && Form::kAdds) prefetch_ahead<T>(next_residual, span, ask);
    adder.add(sum, u, load(span), span);
  });
  found.set(in_block, sum);
}

template <class Form, bool Stream, bool Ask, bool Again>
RMSNORM_INLINE void store_rows(const Forward& f, const ForwardRows& rows, typename Form::Norm::Block& found,
                               int64_t begin, int64_t end, int64_t columns, bool back) {
  using Norm = typename Form::Norm;
  using T = typename Norm::Element;
  const auto keep = [&](int64_t r, const typename Norm::Row& row) __attribute__((always_inline)) {
    auto* rstd = (Scalar<T>*)rows.rstd + r;
    if constexpr (Norm::kBias) *rstd = row.high, rows.mean[r] = row.mean;
    else *rstd = row.kept;
  };
  if (rows.rstd)
    for (int64_t r = begin; r < end; ++r) keep(r, found[r - begin]);
  const int64_t half_row = columns * (int64_t)sizeof(T) / 2;
  const auto rescue = [&](int64_t r) __attribute__((always_inline)) {
    typename Norm::Row rescued = found[r - begin];
    if constexpr (Again) Form::keep_sum(f, rows, r, r - begin);
    Form::rescue(f, rows, r, rescued);
    if (rows.rstd) keep(r, rescued);
  };
  for (int64_t r = begin; r < end; ++r) {
    const int64_t later = r + end - begin;
    const bool ahead = kSumsAhead<Form> && !Stream && later < rows.count;
    if (!ahead && __builtin_expect(!found.safe(r - begin), 0)) {
      rescue(r);
      continue;
    }
    if constexpr (Form::kStores)
      if (f.output == Type::none && !f.add) continue;  // 1/rms alone is wanted
    const typename Norm::Row row = found[r - begin];   // no reference to it leaves: it would be written to memory
    auto* out = (typename Form::Out*)rows.output[r];
    const Form part(f, rows, r, r - begin, row);
    const char* half = (const char*)rows.input[r] + rows.next * (end - begin) + half_row;
    const char* half_residual = (const char*)rows.residual[r] + rows.next_residual * (end - begin) + half_row;
    const char* next_out = (const char*)out + rows.next_output * (end - begin);
    if constexpr (kSumsAhead<Form> && !Stream) {
      if (ahead) {
        const typename Form::template Loader<false, false> load(f, rows, later, r - begin);
        const auto adder = Norm::adder((const T*)rows.input[later], columns);
        typename Norm::Sums sum;
        sum_columns<T>(sum, columns, [&](auto span, int u) __attribute__((always_inline)) {
          adder.add(sum, u, load(span), span);
          span.store_to(out, part(span));
        });
        found.set(r - begin, sum);
        if (__builtin_expect(!found.safe(r - begin), 0)) rescue(r);
        continue;
      }
    }
    for_columns<T, !Stream>(columns, back, [&](auto span) __attribute__((always_inline)) {
      if constexpr (Ask && Form::kTwice) prefetch_part<T, 2>(half - half_row, span);
      else if constexpr (Ask && (Stream || !Form::kAsksInSum)) prefetch_ahead<T>(half, span);
      if constexpr (Ask && Form::kAdds && !Form::kTwice) prefetch_ahead<T>(half_residual, span);
      if constexpr (Ask && !Stream) prefetch_part<typename Form::Out, 2>(next_out, span);
      if constexpr (Stream && !Ask) prefetch_part<T, 3>(half - half_row + 4096, span);
      if constexpr (Form::kStores) {
        part.template store<Stream>(span);
      } else {
        const auto y = [&]() __attribute__((always_inline)) {
          if constexpr (Again) return part.add_again(span);
          else return part(span);
        }();
        if constexpr (Stream) stream_to(span, out, y);
        else span.store_to(out, y);
      }
    });
  }
}

template <class Form, bool Ask>
RMSNORM_INLINE void forward_batch(const Forward& f, const ForwardRows& rows, bool stream, bool again) {
  constexpr bool kAsksInCache = sizeof(typename Form::Norm::Element) >= 4;  // as should_ask() has it
  constexpr bool kAgain = Form::kAddsAgain;
  const int64_t columns = f.columns, block = block_rows(f.input, columns);
  const int64_t counted = Form::kStores ? f.counted : columns, divisor = f.divisor ? f.divisor : columns;
  // Backwards, what wasn't asked for comes too late from memory: 8192x4096 bf16 takes 1.3 of the time.
  const bool back = rows.back && (Ask || !stream);
  const int64_t ask = (int64_t)sizeof(typename Form::Norm::Element) / (Form::kAsksInSum && !stream ? 1 : 2);
  for (int64_t begin = 0; begin < rows.count; begin += block) {
    const int64_t end = begin + block < rows.count ? begin + block : rows.count;
    typename Form::Norm::Block found;
    const auto sum_up = [&](int64_t r, auto keep) __attribute__((always_inline)) {
      const typename Form::template Loader<Ask, decltype(keep)::value> load(f, rows, r, r - begin);
      sum_row<Form, Ask>(load, rows, r, found, r - begin, block, counted, ask);
    };
    if constexpr (Form::kTwice) {
      Form::template sum_twice<Ask>(f, rows, found, begin, end, again, block);
    } else {
      for (int64_t r = begin; r < end && !(kSumsAhead<Form> && !stream && begin > 0); ++r) {
        if (again) sum_up(r, std::bool_constant<!kAgain>{});
        else sum_up(r, std::true_type{});
      }
    }
    found.find_rows(Form::rows_of(rows) + begin, end - begin, divisor, f.eps);
    if (again && stream) store_rows<Form, kStreams, Ask, kAgain>(f, rows, found, begin, end, columns, back);
    else if (again) store_rows<Form, false, Ask, kAgain>(f, rows, found, begin, end, columns, back);
    else if (stream) store_rows<Form, kStreams && !kAgain, Ask, false>(f, rows, found, begin, end, columns, back);
    else store_rows<Form, false, Ask && kAsksInCache, false>(f, rows, found, begin, end, columns, back);
  }
}

template <class Form>
void forward(const Forward& f, const ForwardRows& rows) {
  if constexpr (kEven<Form>)
    if (rows.even) return forward_even<Form>(f, rows);
  bool again = Form::kAddsAgain && rows.add_again;
  for (int64_t r = 0; again && r < rows.count; ++r) again = can_stream(rows.sum[r]);
  bool stream = kStreams && rows.stream && again == Form::kAddsAgain;  // no output without its sum, where that can go
  for (int64_t r = 0; stream && r < rows.count; ++r)
    stream = can_stream(rows.output[r]) && !(Form::kStores && f.add && !can_stream(rows.sum[r]));
  if (Form::kAsks && rows.ask) forward_batch<Form, Form::kAsks>(f, rows, stream, again);
  else forward_batch<Form, false>(f, rows, stream, again);
}

template <class T>
ForwardKernel sandwich_of(const Forward& f);
template <class T>
ForwardKernel general_of();
template <class T>
ForwardKernel unrounded_of();
template <class T>
ForwardKernel modulated_of(const Forward& f);

template <class T, class Out>
ForwardKernel gated_of(const Forward& f) {
  return f.gate_first ? &forward<Gated<T, Out, true>> : &forward<Gated<T, T, false>>;
}

template <class T, class Gain, class Out, bool RoundFirst>
ForwardKernel forward_of(const Forward& f) {
  return f.add ? &forward<Plain<Rms<T>, Gain, Out, RoundFirst, true>>
               : &forward<Plain<Rms<T>, Gain, Out, RoundFirst, false>>;
}

template <class T>
ForwardKernel layer_of(const Forward& f) {
  return f.gain_type == Type::none ? &forward<Plain<Layer<T>, void, T, false, false>>
                                   : &forward<Plain<Layer<T>, Scalar<T>, T, false, false>>;
}

template <class T>
ForwardKernel forward_of_half(const Forward& f) {
  if (f.general) return f.unrounded ? unrounded_of<T>() : general_of<T>();
  if (f.modulate != Modulate::none) return modulated_of<T>(f);
  if (f.turn != Turn::none) return turned_of<T>(f);
  if (f.layer) return layer_of<T>(f);
  if (f.add_after || f.twice) return sandwich_of<T>(f);
  if (f.gate != Gate::none) return f.output == f.input ? gated_of<T, T>(f) : gated_of<T, float>(f);
  if (f.gain_type == Type::none) return forward_of<T, void, T, false>(f);
  if constexpr (std::is_same_v<T, bf16>)
    if (f.round_output) return &forward<Plain<Rms<T>, T, float, true, true>>;
  if (f.gain_type == f.input) return f.round_first ? forward_of<T, T, T, true>(f) : forward_of<T, T, T, false>(f);
  if (f.output == Type::f32) return forward_of<T, float, float, true>(f);
  return f.round_first ? forward_of<T, float, T, true>(f) : forward_of<T, float, T, false>(f);
}

// For fp32 and fp64 rounding before the gain is no rounding: both modes are one kernel.
template <class T>
ForwardKernel forward_of_full(const Forward& f) {
  if (f.general) return general_of<T>();
  if (f.modulate != Modulate::none) return modulated_of<T>(f);
  if (f.turn != Turn::none) return turned_of<T>(f);
  if (f.layer) return layer_of<T>(f);
  if (f.add_after || f.twice) return sandwich_of<T>(f);
  if (f.gate != Gate::none) return gated_of<T, T>(f);
  return f.gain_type == Type::none ? forward_of<T, void, T, false>(f) : forward_of<T, T, T, false>(f);
}

ForwardKernel select_forward(const Forward& f) {
  switch (f.input) {
    case Type::bf16:
      if constexpr (compiles(Type::bf16)) return forward_of_half<bf16>(f);
      break;
    case Type::f16:
      if constexpr (compiles(Type::f16)) return forward_of_half<f16>(f);
      break;
    case Type::f64:
      if constexpr (compiles(Type::f64)) return forward_of_full<double>(f);
      break;
    default:
      if constexpr (compiles(Type::f32)) return forward_of_full<float>(f);
  }
  return borrowed(f);
}
