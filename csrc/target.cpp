// The only file that is compiled once per CPU target: setup.py gives it RMSNORM_TARGET and that target's flags.
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

// avx512bf16 differs from avx512 in how it rounds to bf16 alone: it borrows the other kernels instead of compiling them
// again, for 25 seconds.
#if defined(RMSNORM_LENDER)
extern const Target RMSNORM_LENDER;
#endif

namespace {

#include "simd.h"

#include "reduce.h"

#include "half.h"

#include "split.h"

#include "columns.h"

#include "statistic.h"

#include "layer.h"

#include "activation.h"

#include "rescue.h"

#include "stream.h"

#include "gated.h"

#include "heads.h"

#include "forward.h"

#include "sandwich.h"

#include "general.h"

#include "unrounded.h"

#include "modulated.h"

#include "gated_backward.h"

#include "general_backward.h"

#include "backward.h"

#include "sandwich_pairs.h"

#include "modulated_backward.h"

#include "weight.h"

#include "quantise.h"

#include "contract.h"

}  // namespace

extern const Target RMSNORM_TARGET;
const Target RMSNORM_TARGET = {RMSNORM_TARGET_NAME, &select_forward, &select_backward, &make_gain, &flush, &finish,
                               &finish_one,         &describe,       &quantise,        kSandwich};

}  // namespace rmsnorm
