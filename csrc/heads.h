// The only file with the rotary embedding: pairs of columns turned by an angle, behind the norm of a head or without
// one. With h half of the columns that are turned, and y the row, normed or as it came:
//
//   half-split     z[j] = y[j]·cos[j] - y[j+h]·sin[j]      z[j+h] = y[j+h]·cos[j+h] + y[j]·sin[j+h]
//   interleaved    the same of the columns 2i and 2i+1, not j and j+h
//
// Cosines of the row's own type round as models do: y, both products and their sum. Those of fp32 for half types: y and
// the sum. Back is the transposed matrix, which takes a gradient of z to one of y, and rounds nothing but what is
// stored.
#pragma once

ForwardKernel select_forward(const Forward& f);

// (-x[2i+1], x[2i]) for each pair of lanes' columns.
RMSNORM_INLINE FloatReg quarter(FloatReg x) {
  typedef uint64_t Pairs __attribute__((vector_size(kBytes)));
  const Pairs pairs = (Pairs)x;
  return (FloatReg)(((pairs << 32) | (pairs >> 32)) ^ 0x80000000u);
}
RMSNORM_INLINE DoubleReg quarter(DoubleReg x) {
#if defined(RMSNORM_AVX512)
  const DoubleReg swapped = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6),
                  sign = {-0.0, 0, -0.0, 0, -0.0, 0, -0.0, 0};
#elif defined(__AVX2__)
  const DoubleReg swapped = __builtin_shufflevector(x, x, 1, 0, 3, 2), sign = {-0.0, 0, -0.0, 0};
#else
  const DoubleReg swapped = __builtin_shufflevector(x, x, 1, 0), sign = {-0.0, 0};
#endif
  return (DoubleReg)((WideBitsReg)swapped ^ (WideBitsReg)sign);
}
template <class T>
RMSNORM_INLINE Vector<T> quarter(const Vector<T>& x) {
  if constexpr (kSplit<T>) return {{-x.v[1], x.v[0]}};
  else return Vector<T>::of([&](int i) __attribute__((always_inline)) { return quarter(x.v[i]); });
}

// Rows that one cosine turns, the heads of a token, and where to look for those of the next: so many bytes further on.
struct Turned {
  const void *cos, *sin;
  int64_t count;
  const void* const* from;
  void* const* to;
  int64_t next, next_output;

  // A CPU foresees neither: heads are read a part at a time, and written in as many places. And a load waits for all
  // stores under way whose addresses end in the same twelve bits, as those of all heads do.
  RMSNORM_INLINE void ask(int64_t r, int64_t byte) const {
    if constexpr (!kStreams) return;
    __builtin_prefetch((const char*)from[r] + byte + next, 0, 3);
    __builtin_prefetch((const char*)to[r] + byte + next_output, 1, 3);
  }
};

// What has nothing to convert is read row by row (16 tokens fp32: 0.8 of the time), and what has no registers for it.
template <class T>
constexpr bool kTurnsTogether = kStreams && sizeof(T) == 2;

// Each vector of angles is made wide once; then the rows are walked down, column by column.
template <class T, class Angle, bool Interleaved, bool Back, class Out>
RMSNORM_INLINE void turn(const Forward& f, const Turned& rows) {
  const Angle *cos = (const Angle*)rows.cos, *sin = (const Angle*)rows.sin;
  const int64_t count = kTurnsTogether<T> ? rows.count : 1;
  const void* const* const from = rows.from;
  void* const* const to = rows.to;
  const auto times = [](const Vector<T>& y, const Vector<T>& angle) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<T, Angle> && !Back) return round_own<T>(y * angle);
    else return y * angle;
  };
  if constexpr (Interleaved) {
    for_columns<T>(f.turned, [&](auto span) __attribute__((always_inline)) {
      const Vector<T> c = span.load_from(cos), s = span.load_from(sin);
      for (int64_t r = 0; r < count; ++r) {
        rows.ask(r, span.j * (int64_t)sizeof(T));
        const Vector<T> y = span.load_from((const T*)from[r]);
        if constexpr (Back) span.store_to((Out*)to[r], y * c - quarter<T>(y * s));
        else span.store_to((Out*)to[r], times(y, c) + times(quarter<T>(y), s));
      }
    });
  } else {
    const int64_t half = f.turned / 2;
    for_columns<T>(half, [&](auto span) __attribute__((always_inline)) {
      auto other = span;
      other.j += half;
      const Vector<T> cos_a = span.load_from(cos), cos_b = other.load_from(cos);
      const Vector<T> sin_a = span.load_from(sin), sin_b = other.load_from(sin);
      for (int64_t r = 0; r < count; ++r) {
        rows.ask(r, span.j * (int64_t)sizeof(T)), rows.ask(r, other.j * (int64_t)sizeof(T));
        const Vector<T> a = span.load_from((const T*)from[r]), b = other.load_from((const T*)from[r]);
        Vector<T> at_a = times(a, cos_a), at_b = times(b, cos_b);
        if constexpr (Back) at_a = at_a + b * sin_b, at_b = at_b - a * sin_a;
        else at_a = at_a - times(b, sin_a), at_b = at_b + times(a, sin_b);
        span.store_to((Out*)to[r], at_a), other.store_to((Out*)to[r], at_b);
      }
    });
  }
  for_columns<T, 1>(f.turned, f.columns, [&](auto span, auto) __attribute__((always_inline)) {
    for (int64_t r = 0; r < count; ++r) span.store_to((Out*)to[r], span.load_from((const T*)from[r]));
  });
}

#if defined(__AVX2__)
// y·angle, rounded to bf16 in two more operations instead of four (Veltkamp): with C = 2^16 + 1 and g = C·p, rounded to
// 24 bits, g - (g - p) is p in 8 of them, ties to even, as p has 16 and C·angle 24, which are exact.
struct RoundedProduct {
  Split minus, scaled;
  RMSNORM_INLINE explicit RoundedProduct(const Split& angle)
      : minus(splat<bf16>(-0.0f) - angle), scaled(angle * splat<bf16>(65537.0f)) {}
  RMSNORM_INLINE Split operator()(const Split& y) const {
    const Split g = y * scaled;
    return g - fma(y, minus, g);
  }
};

typedef uint16_t ShortsReg __attribute__((vector_size(kBytes)));
RMSNORM_INLINE bool any(BitsReg bits) {
  const auto wide = (WideBitsReg)bits;
  int64_t found = 0;
  for (int i = 0; i < kBytes / 8; ++i) found |= wide[i];
  return found != 0;
}

// Whether all magnitudes are in [2^-63, 2^65), found in two operations for a vector of bf16: then one of the upper two
// bits of the exponent is set, and the other isn't.
struct Usual {
  BitsReg all = BitsReg{} + 0x40004000u;
  RMSNORM_INLINE void add(BitsReg both) { all &= both + 0x20002000u; }
  RMSNORM_INLINE explicit operator bool() const { return !any(all ^ 0x40004000u); }
};

// Whether whole vectors of angles are 0 or in [2^-40, 2).
RMSNORM_INLINE bool usual_angles(const bf16* angles, int64_t count) {
  ShortsReg unusual = {};
  for (int64_t j = 0; j < count; j += kStep<bf16>) {
    const ShortsReg magnitude = load_register<ShortsReg>(angles + j) << 1;
    unusual |= (ShortsReg)((magnitude != 0) & (magnitude - (87 << 8) >= 41 << 8));
  }
  return !any((BitsReg)unusual);
}

// turn() of whole vectors of bf16, as long as no product overflows, and none is subnormal, nor a difference of two:
// they are 0 or multiples of 2^-110. Else it returns false, and everything is to be done anew.
template <bool Interleaved>
RMSNORM_INLINE bool turn_usual(const Forward& f, const Turned& rows) {
  const bf16 *cos = (const bf16*)rows.cos, *sin = (const bf16*)rows.sin;
  if (!usual_angles(cos, f.turned) || !usual_angles(sin, f.turned)) return false;
  const int64_t count = rows.count;
  const void* const* const from = rows.from;
  void* const* const to = rows.to;
  Usual usual;
  const auto load = [&](int64_t r, int64_t j) __attribute__((always_inline)) {
    rows.ask(r, j * (int64_t)sizeof(bf16));
    const auto both = load_register<BitsReg>((const bf16*)from[r] + j);
    usual.add(both);
    return unpack(both);
  };
  const auto store = [&](int64_t r, int64_t j, const Split& z)
                         __attribute__((always_inline)) { store_register((bf16*)to[r] + j, pack<true>(z)); };
  const int64_t half = Interleaved ? 0 : f.turned / 2;
  for (int64_t a = 0; a < (Interleaved ? f.turned : half); a += kStep<bf16>) {
    const int64_t b = a + half;
    const RoundedProduct cos_a(load_split(cos + a)), sin_a(load_split(sin + a));
    if constexpr (Interleaved) {
      for (int64_t r = 0; r < count; ++r) {
        const Split y = load(r, a), by_cos = cos_a(y), by_sin = sin_a({{y.v[1], y.v[0]}});
        store(r, a, {{by_cos.v[0] - by_sin.v[0], by_cos.v[1] + by_sin.v[1]}});
      }
    } else {
      const RoundedProduct cos_b(load_split(cos + b)), sin_b(load_split(sin + b));
      for (int64_t r = 0; r < count; ++r) {
        const Split first = load(r, a), second = load(r, b);
        store(r, a, cos_a(first) - sin_a(second)), store(r, b, cos_b(second) + sin_b(first));
      }
    }
  }
  for (int64_t r = 0; r < count && f.turned < f.columns; ++r)
    __builtin_memcpy((bf16*)to[r] + f.turned, (const bf16*)from[r] + f.turned, (f.columns - f.turned) * sizeof(bf16));
  return (bool)usual;
}
#endif

// The same, for the angles' type and order of this call.
template <class T, bool Back, class Out>
__attribute__((noinline)) void turn_alike(const Forward& f, const Turned& rows) {
  if constexpr (sizeof(T) == 2)
    if (f.angle != f.input)
      return f.interleaved ? turn<T, float, true, Back, Out>(f, rows) : turn<T, float, false, Back, Out>(f, rows);
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, bf16> && !Back) {
    const bool whole = f.turned % ((f.interleaved ? 1 : 2) * kStep<T>) == 0;
    if (whole && (f.interleaved ? turn_usual<true>(f, rows) : turn_usual<false>(f, rows))) return;
  }
#endif
  if (f.interleaved) turn<T, T, true, Back, Out>(f, rows);
  else turn<T, T, false, Back, Out>(f, rows);
}

// Rows from `begin` on, turned on their way from one place to another: each run of those that share their angles in one
// go, or each alone.
template <class T, bool Back, class Out>
RMSNORM_INLINE void turn_to(const Forward& f, const ForwardRows& rows, int64_t begin, int64_t count,
                            const void* const* from, void* const* to) {
  const void *const *cos = rows.gate + begin, *const *sin = rows.residual + begin;
  for (int64_t done = 0, alike; done < count; done += alike) {
    alike = 1;
    while (kTurnsTogether<T> && done + alike < count && cos[done + alike] == cos[done] &&
           sin[done + alike] == sin[done])
      ++alike;
    turn_alike<T, Back, Out>(
        f, {cos[done], sin[done], alike, from + done, to + done, rows.next * alike, f.columns * (int64_t)sizeof(Out)});
  }
}

// Rows as they came, turned or turned back.
template <class T, bool Back>
void turn_rows(const Forward& f, const ForwardRows& rows) {
  turn_to<T, Back, T>(f, rows, 0, rows.count, rows.input, rows.output);
}

// Normed rows, turned: a block of them is stored in scratch by the plain norm's kernel, and leaves L1 once. Heads that
// were stored where they go, and turned there, would meet in the same lines of every cache: they are a power of two
// apart.
template <class T>
void turn_normed(const Forward& f, const ForwardRows& rows) {
  Forward plain = f;
  plain.turn = Turn::none;
  const ForwardKernel norm = select_forward(plain);
  const int64_t block = block_rows(f.input, f.columns);
  ForwardRows part;  // 2 KiB, not set to 0 for rows that take less; what adds or gates is never read
  part.stream = part.add_again = part.back = part.ask = part.even = false;
  part.keep_gain = rows.keep_gain, part.mean = nullptr;
  part.next = part.next_output = part.next_residual = 0;
  for (int64_t r = 0; r < block; ++r) part.output[r] = (T*)rows.scratch + r * f.columns, part.gain[r] = rows.gain[0];
  for (int64_t begin = 0; begin < rows.count; begin += block) {
    part.count = begin + block < rows.count ? block : rows.count - begin;
    part.rstd = rows.rstd ? (Scalar<T>*)rows.rstd + begin : nullptr;
    for (int64_t r = 0; r < part.count; ++r) part.input[r] = rows.input[begin + r];
    norm(plain, part);
    turn_to<T, false, T>(f, rows, begin, part.count, part.output, (void**)rows.output + begin);
  }
}

template <class T>
ForwardKernel turned_of(const Forward& f) {
  return f.turn == Turn::norm ? &turn_normed<T> : f.turn == Turn::back ? &turn_rows<T, true> : &turn_rows<T, false>;
}
