// The only file that knows the gate's activations, silu and sigmoid, and their slopes.
//
//   e = exp(-|g|)      sigmoid(g) = (g < 0 ? e : 1) / (1 + e)      silu(g) = g · sigmoid(g)
//
// Nothing overflows, and small results keep their bits: torch's silu(-90) in fp32 is -0, the true one is -7e-38.
// exp is 2⁻ⁿ·p(r) with r = n·ln 2 - |g| and |r| < 0.35. Additions and multiplications alone, in one order: all targets
// give the same bits without emulating a fused multiply-add.
#pragma once

// The degree of p: 6 is the polynomial with the smallest relative error (Remez, 2⁻²⁸), 13 is Taylor's (2⁻⁵⁷), for fp64.
// Half types, in fp32: exp within 1.2 ulp, sigmoid and silu within 2.5 (and 2⁻¹⁴³), over all floats. fp32, in fp64:
// 2⁻²⁸. fp64: exp within 1 ulp, sigmoid and silu within 3.1 (seen).
template <class T>
constexpr int kDegree = sizeof(T) == 8 ? 13 : 6;

constexpr double inverse_factorial(int k) { return k > 1 ? inverse_factorial(k - 1) / k : 1; }
template <int Degree>
constexpr double coefficient(int k) {
  constexpr double best[] = {0x1.fffffb5621ab5p-2, 0x1.5554897d637b7p-3, 0x1.555916642e216p-5, 0x1.123fc617d2dafp-7,
                             0x1.6a1a728d3a98cp-10};
  return Degree == 6 ? best[k - 2] : inverse_factorial(k);
}

// Of each type of register: its scalar, unsigned lanes, the format, from where on exp(-x) is 0, and ln 2 as a part
// whose multiples by n are exact, and the rest.
template <class Register>
struct ExpOf;
template <>
struct ExpOf<FloatReg> {
  using Scalar = float;
  using Bits = BitsReg;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr Scalar kRound = 0x1.8p23f, kZero = 104, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
};
template <>
struct ExpOf<DoubleReg> {
  using Scalar = double;
  typedef uint64_t Bits __attribute__((vector_size(kBytes)));
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr Scalar kRound = 0x1.8p52, kZero = 746, kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
};

// exp(-|x|); NaN of NaN.
template <int Degree, class Register>
RMSNORM_INLINE Register exp_minus_abs(Register x) {
  using E = ExpOf<Register>;
  using S = typename E::Scalar;
  using Bits = typename E::Bits;
  const Register t = (Register)((Bits)x << 1 >> 1);
  const Register rounded = t * (S)0x1.71547652b82fep+0 + E::kRound, n = rounded - E::kRound;
  const Register r = (n * E::kLn2High - t) + n * E::kLn2Low;
  Register p = Register{} + (S)coefficient<Degree>(Degree);
  for (int k = Degree - 1; k > 1; --k) p = p * r + (S)coefficient<Degree>(k);
  p = (r + r * r * p) + 1;
  // 2⁻ⁿ may be below the normal numbers, so it is made too large, and the last product rounds.
  const Bits exponent = (Bits)(Register{} + E::kRound) + (E::kBias + E::kMantissa + 1) - (Bits)rounded;
  const Register e = p * (Register)(exponent << E::kMantissa) * (S)(0.5 / ((int64_t)1 << E::kMantissa));
  return t > E::kZero ? Register{} : e;
}

// The activation of a vector of gates.
template <int Degree, int N, class Register>
RMSNORM_INLINE Pack<N, Register> activate(Pack<N, Register> gate, bool silu) {
  for (auto& g : gate.v) {
    const Register e = exp_minus_abs<Degree>(g), one = Register{} + 1;
    g = (g < 0 ? e : one) * (silu ? g : one) / (1 + e);
  }
  return gate;
}

// The same with its derivative, sigmoid' = σ·(1 - σ) or silu' = σ·(1 + g·(1 - σ)), for backward: each within 4 ulp of
// the larger of its terms.
template <int N, class Register>
struct Activation {
  Pack<N, Register> value, slope;
};
template <int Degree, int N, class Register>
RMSNORM_INLINE Activation<N, Register> activate_with_slope(const Pack<N, Register>& gate, bool silu) {
  Activation<N, Register> a;
  for (int i = 0; i < N; ++i) {
    const Register g = gate.v[i], e = exp_minus_abs<Degree>(g), one = Register{} + 1, inverse = one / (1 + e);
    const Register sigmoid = (g < 0 ? e : one) * inverse, rest = (g < 0 ? one : e) * inverse;
    a.value.v[i] = silu ? g * sigmoid : sigmoid;
    a.slope.v[i] = sigmoid * (silu ? 1 + g * rest : rest);
  }
  return a;
}

// Of one gate, in fp64.
struct Activated {
  double value, slope;
};
RMSNORM_EMULATED Activated activate_element(double gate, Gate kind) {
  const auto a = activate_with_slope<kDegree<double>>(splat<double>(gate), kind == Gate::silu);
  return {a.value.v[0][0], a.slope.v[0][0]};
}
