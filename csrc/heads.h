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

// One row: read(span) is y, write(span, z) keeps what became of it.
template <class T, class Angle, bool Interleaved, bool Back, class Read, class Write>
RMSNORM_INLINE void turn(const Forward& f, const void* cosines, const void* sines, const Read& read,
                         const Write& write) {
  const Angle *cos = (const Angle*)cosines, *sin = (const Angle*)sines;
  const auto times = [](const Vector<T>& y, const Vector<T>& angle) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<T, Angle> && !Back) return round_to<T>(y * angle);
    else return y * angle;
  };
  if constexpr (Interleaved) {
    for_columns<T>(f.turned, [&](auto span) __attribute__((always_inline)) {
      const Vector<T> y = read(span), c = span.load_from(cos), s = span.load_from(sin);
      if constexpr (Back) write(span, y * c - quarter<T>(y * s));
      else write(span, times(y, c) + times(quarter<T>(y), s));
    });
  } else {
    const int64_t half = f.turned / 2;
    for_columns<T>(half, [&](auto span) __attribute__((always_inline)) {
      auto other = span;
      other.j += half;
      const Vector<T> a = read(span), b = read(other);
      const Vector<T> sin_a = span.load_from(sin), sin_b = other.load_from(sin);
      const Vector<T> at_a = times(a, span.load_from(cos)), at_b = times(b, other.load_from(cos));
      if constexpr (Back) {
        write(span, at_a + b * sin_b), write(other, at_b - a * sin_a);
      } else {
        write(span, at_a - times(b, sin_a)), write(other, at_b + times(a, sin_b));
      }
    });
  }
  for_columns<T, 1>(f.turned, f.columns,
                    [&](auto span, auto) __attribute__((always_inline)) { write(span, read(span)); });
}

// The same, for the angles' type and order of this call: a branch a row.
template <class T, bool Back, class Read, class Write>
RMSNORM_INLINE void turn_row(const Forward& f, const ForwardRows& rows, int64_t r, const Read& read,
                             const Write& write) {
  const void *cos = rows.gate[r], *sin = rows.residual[r];
  if constexpr (sizeof(T) == 2) {
    if (f.angle != f.input) {
      if (f.interleaved) turn<T, float, true, Back>(f, cos, sin, read, write);
      else turn<T, float, false, Back>(f, cos, sin, read, write);
      return;
    }
  }
  if (f.interleaved) turn<T, T, true, Back>(f, cos, sin, read, write);
  else turn<T, T, false, Back>(f, cos, sin, read, write);
}

// Row r, turned on its way from one place to another.
template <class T, bool Back, class Out>
__attribute__((noinline)) void turn_to(const Forward& f, const ForwardRows& rows, int64_t r, const T* from, Out* to) {
  turn_row<T, Back>(
      f, rows, r, [&](auto span) __attribute__((always_inline)) { return span.load_from(from); },
      [&](auto span, const Vector<T>& z) __attribute__((always_inline)) { span.store_to(to, z); });
}

// Rows as they came, turned or turned back.
template <class T, bool Back>
void turn_rows(const Forward& f, const ForwardRows& rows) {
  for (int64_t r = 0; r < rows.count; ++r) turn_to<T, Back>(f, rows, r, (const T*)rows.input[r], (T*)rows.output[r]);
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
  part.stream = part.add_again = part.back = part.ask = false;
  part.keep_gain = rows.keep_gain, part.mean = nullptr;
  part.next = part.next_output = part.next_residual = 0;
  for (int64_t r = 0; r < block; ++r) part.output[r] = (T*)rows.scratch + r * f.columns, part.gain[r] = rows.gain[0];
  for (int64_t begin = 0; begin < rows.count; begin += block) {
    part.count = begin + block < rows.count ? block : rows.count - begin;
    part.rstd = rows.rstd ? (Scalar<T>*)rows.rstd + begin : nullptr;
    for (int64_t r = 0; r < part.count; ++r) part.input[r] = rows.input[begin + r];
    norm(plain, part);
    for (int64_t r = 0; r < part.count; ++r)
      turn_to<T, false>(f, rows, begin + r, (const T*)part.output[r], (T*)rows.output[begin + r]);
  }
}

template <class T>
ForwardKernel turned_of(const Forward& f) {
  return f.turn == Turn::norm ? &turn_normed<T> : f.turn == Turn::back ? &turn_rows<T, true> : &turn_rows<T, false>;
}
