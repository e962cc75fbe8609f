// The only file that is compiled once per CPU target, with that target's flags, and for fp64 again: setup.py says what
// a unit is called (RMSNORM_TARGET), which types of rows it has, and whom it lends their kernels or borrows others of.
//
// Everything is in an unnamed namespace and no standard template is instantiated, so that no function compiled for a
// wide CPU can be merged by the linker with its twin for a narrow one (tests/test_native.py looks for such symbols).
#include <cstdint>
#include <cstdio>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(RMSNORM_EMULATE_AVX512)
#include "../tests/native/emulate_avx512.h"  // the tests' way to run these sources on a CPU without AVX-512
#endif

#include "kernel.h"

namespace rmsnorm {

#if defined(RMSNORM_LENDER)
extern const Kernels RMSNORM_LENDER;
#endif

namespace {

// Whether kernels for rows of a type are compiled here; those of the others are borrowed.
constexpr bool compiles(Type type) {
#if defined(RMSNORM_TYPES)
  constexpr Type types[] = {RMSNORM_TYPES};
  for (Type here : types)
    if (here == type) return true;
  return false;
#else
  return type != Type::none;
#endif
}

ForwardKernel borrowed([[maybe_unused]] const Forward& f) {
#if defined(RMSNORM_LENDER)
  return RMSNORM_LENDER.forward(f);
#else
  return nullptr;
#endif
}

BackwardKernel borrowed([[maybe_unused]] const Backward& b) {
#if defined(RMSNORM_LENDER)
  return RMSNORM_LENDER.backward(b);
#else
  return nullptr;
#endif
}

#include "simd.h"

#include "widths.h"

#include "multiply_add.h"

#include "reduce.h"

#include "half.h"

#include "split.h"

#include "columns.h"

#include "statistic.h"

#include "layer.h"

#include "activation.h"

#include "rescue.h"

#include "stream.h"

#include "pairs.h"

#include "gated.h"

#include "heads.h"

#include "plain.h"

#include "forward.h"

#include "even.h"

#include "sandwich.h"

#include "general.h"

#include "unrounded.h"

#include "modulated.h"

#include "gated_backward.h"

#include "general_backward.h"

#include "backward_statistic.h"

#include "backward.h"

#include "backward_pairs.h"

#include "sandwich_pairs.h"

#include "sandwich_rows.h"

#include "modulated_backward.h"

#if defined(RMSNORM_TARGET)
#include "weight.h"

#include "quantise.h"

#include "contract.h"
#endif

}  // namespace

#if defined(RMSNORM_LENDS)
extern const Kernels RMSNORM_LENDS;
const Kernels RMSNORM_LENDS = {&select_forward, &select_backward, kSandwich};
#endif
#if defined(RMSNORM_TARGET)
extern const Target RMSNORM_TARGET;
const Target RMSNORM_TARGET = {{&select_forward, &select_backward, kSandwich},
                               RMSNORM_TARGET_NAME,
                               kHasEven<float>,
                               kHasEven<bf16>,
                               &make_gain,
                               &flush,
                               &put_in_order,
                               &finish,
                               &finish_one,
                               &describe,
                               &quantise};
#endif

}  // namespace rmsnorm
