// The only file that says what decides the bits, in one line of text: rmsnorm.info().contract is its hash. Each number
// is the one that the kernels of this target are compiled with, so two targets that sum in another order say so.
#pragma once

// What no constant says: which tree adds the lanes, where a value is rounded, which operations are fused. Count it up
// when bits change and no number below does (tests/test_contract.py knows when), and write a line into CHANGELOG.md.
constexpr int kRevision = 1;

#define RMSNORM_LANES(Sums, T) (int)(Sums<T>::kUnroll * kStep<T>)
#define RMSNORM_BLOCK(Sums, T) (long long)(Sums<T>::kBlock == INT64_MAX ? 0 : Sums<T>::kBlock)

// Text of at most `room` bytes.
void describe(char* text, int64_t room) {
  __builtin_snprintf(
      text, (size_t)room,
      "revision %d; rms lanes f32 %d f64 %d bf16 %d f16 %d, block %lld %lld; layer lanes f32 %d f64 %d bf16 %d f16 %d, "
      "block %lld; unscaled f32 %a to %a, f64 %a to %a; activation degree %d %d; dw flush %lld, chunk %lld in %lld",
      kRevision, RMSNORM_LANES(Sum, float), RMSNORM_LANES(Sum, double), RMSNORM_LANES(Sum, bf16),
      RMSNORM_LANES(Sum, f16), RMSNORM_BLOCK(Sum, bf16), RMSNORM_BLOCK(Sum, f16), RMSNORM_LANES(Moments, float),
      RMSNORM_LANES(Moments, double), RMSNORM_LANES(Moments, bf16), RMSNORM_LANES(Moments, f16),
      RMSNORM_BLOCK(Moments, bf16), kSmallest<float>, kLargest<float>, kSmallest<double>, kLargest<double>,
      kDegree<float>, kDegree<double>, (long long)kFlush, (long long)kLeastChunk, (long long)kMostChunks);
}
