// Rates of a processor in loops that do nothing else: products as a build of the engine multiplies them, and powers of
// 2 as it computes them. All numbers are in registers or in the L1 cache.
#include "../csrc_ref/amx.h"
#include "../csrc_ref/engine.h"

namespace {

using Lanes = tob::Simd<float>;
using Vec = Lanes::Vec;

volatile float sink;  // keeps results alive, and hides what loops begin with

// Sums that no sum waits for: as many as the latency of a product asks for.
constexpr int kSums = 12;

template <class Operand> double multiply(int64_t steps) {
  Vec sums[kSums], a = Lanes::broadcast(1), b = Lanes::broadcast(1e-6f);
  for (Vec &sum : sums) sum = Lanes::broadcast(sink);  // the compiler cannot know that they are equal
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = tob::add_product<Operand, float>(sums[i], a, b);
  }
  for (Vec sum : sums) sink = Lanes::sum(sum);
  return 2.0 * double(steps) * kSums * Lanes::kLanes * tob::kOperandsPerCell<float, Operand>;
}

#if defined(__AMX_BF16__)
double multiply_tiles(int64_t steps) {
  alignas(64) static float zeros[tob::amx::kTileReals];
  const tob::amx::Session session;
  tob::amx::load<4>(zeros, tob::amx::kRowBytes);
  tob::amx::load<5>(zeros, tob::amx::kRowBytes);
  tob::amx::zero<0>();
  tob::amx::zero<1>();
  tob::amx::zero<2>();
  tob::amx::zero<3>();
  for (int64_t step = 0; step < steps; ++step) {
    tob::amx::multiply_add<0, 4, 5>();
    tob::amx::multiply_add<1, 4, 5>();
    tob::amx::multiply_add<2, 4, 5>();
    tob::amx::multiply_add<3, 4, 5>();
  }
  return 2.0 * double(steps) * 4 * 16 * 16 * 32;
}
#endif

}  // namespace

extern "C" {

// Each does some steps and returns their number of floating point operations, or of powers.
TOB_API double multiply_float32(int64_t steps) { return multiply<float>(steps); }

TOB_API double multiply_bfloat16(int64_t steps) {
#if defined(__AMX_BF16__)
  return multiply_tiles(steps);
#else
  return multiply<tob::BFloat16Operand>(steps);
#endif
}

TOB_API double make_powers(int64_t steps) {
  constexpr int kVectors = 64, kTogether = 4;
  alignas(64) float scores[kVectors * Lanes::kLanes];
  for (int i = 0; i < kVectors * Lanes::kLanes; ++i) scores[i] = -0.01f * float(i);
  Vec sums[kTogether] = {};
  for (int64_t step = 0; step < steps; ++step)
    for (int v = 0; v < kVectors; v += kTogether) {
      Vec x[kTogether];
      for (int i = 0; i < kTogether; ++i) x[i] = Lanes::load(scores + (v + i) * Lanes::kLanes);
      asm volatile("" ::: "memory");  // else the powers of one step serve all steps
      Lanes::exp2(x);
      for (int i = 0; i < kTogether; ++i) sums[i] += x[i];
    }
  for (Vec sum : sums) sink = Lanes::sum(sum);
  return double(steps) * kVectors * Lanes::kLanes;
}
}
