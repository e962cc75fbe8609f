// The only file that knows the gate's activations, silu and sigmoid, and their slopes.
//
//   e = exp(-|g|)      sigmoid(g) = (g < 0 ? e : 1) / (1 + e)      silu(g) = g · sigmoid(g)
//
// Nothing overflows, and small results keep their bits: torch's silu(-90) in fp32 is -0, the true one is -7e-38.
// exp is 2⁻ⁿ·p(r) with r = n·ln 2 - |g| and |r| < 0.35. Additions and multiplications alone, in one order: all targets
// give the same bits without emulating a fused multiply-add.
#pragma once

// The degree of p: 6 is the polynomial with the smallest relative error (Remez, 2⁻²⁸), 13 is Taylor's (2⁻⁵⁷), for fp64.
// Half types, in fp32: exp within 1.1 ulp, sigmoid and silu within 2.5 (and 2⁻¹⁴³), over all floats. fp32, in fp64:
// 2⁻²⁸. fp64: exp within 1 ulp, sigmoid and silu within 3.1 (seen).
template <class T>
constexpr int kDegree = sizeof(T) == 8 ? 13 : 6;

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

constexpr double inverse_factorial(int k) { return k > 1 ? inverse_factorial(k - 1) / k : 1; }
template <int Degree>
constexpr double coefficient(int k) {
  constexpr double best[] = {0x1.fffffb5621ab5p-2, 0x1.5554897d637b7p-3, 0x1.555916642e216p-5, 0x1.123fc617d2dafp-7,
                             0x1.6a1a728d3a98cp-10};
  return Degree == 6 ? best[k - 2] : inverse_factorial(k);
}

// Σ coefficient(k)·r^(k - K), k from K on. Not a loop: the baseline is compiled for size, and would keep it.
template <int Degree, int K, class S, class Register>
RMSNORM_INLINE Register polynomial(Register r) {
  constexpr S first = (S)coefficient<Degree>(K);
  if constexpr (K == Degree) return Register{} + first;
  else return polynomial<Degree, K + 1, S>(r) * r + first;
}

// exp(-|x|); NaN of NaN.
template <int Degree, class Register>
RMSNORM_INLINE Register exp_minus_abs(Register x) {
  using E = ExpOf<Register>;
  using S = typename E::Scalar;
  using Bits = typename E::Bits;
  const Register magnitude = (Register)((Bits)x << 1 >> 1), zero = Register{} + E::kZero;
  const Register t = zero < magnitude ? zero : magnitude;
  const Register rounded = t * (S)0x1.71547652b82fep+0 + E::kRound, n = rounded - E::kRound;
  const Register r = (n * E::kLn2High - t) + n * E::kLn2Low;
  const Register p = (r + r * r * polynomial<Degree, 2, S>(r)) + 1;
  // 2⁻ⁿ may be below the normal numbers, so it is made too large, and the last product rounds.
  const Bits exponent = (Bits)(Register{} + E::kRound) + (E::kBias + E::kMantissa + 1) - (Bits)rounded;
  return p * (Register)(exponent << E::kMantissa) * (S)(0.5 / ((int64_t)1 << E::kMantissa));
}

// Silu or sigmoid of packs of gates, without a branch for each: g or 1 in front of sigmoid.
template <int Degree, class V>
class Activation {
  using Register = std::remove_cvref_t<decltype(V{}.v[0])>;

 public:
  RMSNORM_INLINE explicit Activation(bool silu) : silu_(Register{} < (silu ? Register{} + 1 : Register{})) {}

  RMSNORM_INLINE V operator()(V gate) const {
    for (auto& g : gate.v) {
      const Register e = exp_minus_abs<Degree>(g), one = Register{} + 1;
      g = (g < 0 ? e : one) * (silu_ ? g : one) / (1 + e);
    }
    return gate;
  }

  // The same, and the derivative, sigmoid' = σ·(1 - σ) or silu' = σ·(1 + g·(1 - σ)), within 4 ulp of its larger term.
  RMSNORM_INLINE V with_slope(V gate, V& slope) const {
    for (int i = 0; i < (int)(sizeof gate / sizeof(Register)); ++i) {
      const Register g = gate.v[i], e = exp_minus_abs<Degree>(g), one = Register{} + 1, inverse = one / (1 + e);
      const Register sigmoid = (g < 0 ? e : one) * inverse, rest = (g < 0 ? one : e) * inverse;
      gate.v[i] = (silu_ ? g : one) * sigmoid;
      slope.v[i] = sigmoid * (silu_ ? 1 + g * rest : rest);
    }
    return gate;
  }

 private:
  decltype(Register{} < Register{}) silu_;
};

// Of one gate, in fp64.
struct Activated {
  double value, slope;
};
RMSNORM_EMULATED Activated activate_element(double gate, Gate kind) {
  D slope;
  const D value = Activation<kDegree<double>, D>(kind == Gate::silu).with_slope(splat<double>(gate), slope);
  return {value.v[0][0], slope.v[0][0]};
}
