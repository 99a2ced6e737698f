// One vector type for every instruction set, on the compiler's vector extensions. The build chooses its width in bytes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef TOB_VECTOR_BYTES
#define TOB_VECTOR_BYTES 16
#endif

#define TOB_INLINE inline __attribute__((always_inline))

namespace tob {

template <class Real> struct SimdTraits;

template <> struct SimdTraits<float> {
  using Int = int32_t;
  // 1.5 * 2^23 + 127: adding it rounds to an integer, kept in the low bits with the exponent's bias.
  static constexpr float kRoundMagic = 12583039.f;
  static constexpr int kMantissaBits = 23;
  static constexpr float kMinExponent = -127.f;
  // 2^f on [-1/2, 1/2] with relative error 1.1e-7; the minimax polynomial among those with constant term 1.
  static constexpr int kDegree = 5;
  static constexpr float kExp2[kDegree] = {0.6931470036506653f, 0.24022242426872253f, 0.05550733953714371f,
                                           0.009671512991189957f, 0.0013264714507386088f};
};

template <> struct SimdTraits<double> {
  using Int = int64_t;
  static constexpr double kRoundMagic = 6755399441056767.0;  // 1.5 * 2^52 + 1023
  static constexpr int kMantissaBits = 52;
  static constexpr double kMinExponent = -1023.0;
  // The Taylor series of 2^f: its remainder on [-1/2, 1/2] is below 1e-17.
  static constexpr int kDegree = 13;
  static constexpr double kExp2[kDegree] = {0.6931471805599453,     0.24022650695910072,    0.05550410866482158,
                                            0.009618129107628477,   0.0013333558146428443,  0.0001540353039338161,
                                            1.5252733804059841e-05, 1.321548679014431e-06,  1.01780860092397e-07,
                                            7.054911620801123e-09,  4.4455382718708116e-10, 2.5678435993488206e-11,
                                            1.3691488853904128e-12};
};

template <class Real> struct Simd {
  using Traits = SimdTraits<Real>;
  static constexpr int kLanes = TOB_VECTOR_BYTES / sizeof(Real);
  typedef Real Vec __attribute__((vector_size(TOB_VECTOR_BYTES)));
  typedef Real Unaligned __attribute__((vector_size(TOB_VECTOR_BYTES), aligned(alignof(Real)), may_alias));
  typedef typename Traits::Int IntVec __attribute__((vector_size(TOB_VECTOR_BYTES)));
  typedef std::make_unsigned_t<typename Traits::Int> Bits __attribute__((vector_size(TOB_VECTOR_BYTES)));

  static TOB_INLINE Vec load(const Real *p) { return *reinterpret_cast<const Unaligned *>(p); }
  static TOB_INLINE void store(Real *p, Vec v) { *reinterpret_cast<Unaligned *>(p) = v; }
  static TOB_INLINE Vec broadcast(Real x) { return x - Vec{}; }
  // Broadcasts *p without arithmetic, because *p may hold any bits.
  static TOB_INLINE Vec broadcast_bits(const Real *p) {
    typename Traits::Int bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vec)(bits - IntVec{});
  }

  // Where either is NaN the result is b. Spelled out on x86, where compilers miss the instruction when one is constant.
  static TOB_INLINE Vec max(Vec a, Vec b) {
    constexpr bool is_float = std::is_same_v<Real, float>;
#if defined(__AVX512F__) && TOB_VECTOR_BYTES == 64
    if constexpr (is_float) return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
    else return (Vec)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX__) && TOB_VECTOR_BYTES == 32
    if constexpr (is_float) return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
    else return (Vec)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    (void)is_float;
    return a > b ? a : b;
#endif
  }

  // a b + c, rounded once where there is an instruction for it. Spelled out on x86, where compilers leave some chains
  // of sums as two instructions.
  static TOB_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    constexpr bool is_float = std::is_same_v<Real, float>;
#if defined(__AVX512F__) && TOB_VECTOR_BYTES == 64
    if constexpr (is_float) return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else return (Vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__) && TOB_VECTOR_BYTES == 32
    if constexpr (is_float) return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else return (Vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    (void)is_float;
    return a * b + c;
#endif
  }

  // 2^x for x <= 1. At or below the smallest exponent exactly 0; NaN, of whatever bits, stays NaN.
  static TOB_INLINE Vec exp2(Vec x) {
    Vec each[] = {x};
    exp2(each);
    return each[0];
  }

  // Replaces each vector x by 2^x. All vectors take a step before any vector takes the next step, because a vector's
  // step waits for its last step. Processors do not look far enough ahead to start another vector's step meanwhile.
  template <int kCount> static TOB_INLINE void exp2(Vec (&x)[kCount]) {
#if defined(__AVX512DQ__) && TOB_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<Real, float>) {
      exp2_by_exponent(x);
      return;
    }
#endif
    Vec shifted[kCount], power[kCount];
    for (int i = 0; i < kCount; ++i) {
      x[i] = max(broadcast(Traits::kMinExponent), x[i]);
      shifted[i] = x[i] + Traits::kRoundMagic;
    }
    for (int i = 0; i < kCount; ++i) {
      x[i] -= shifted[i] - Traits::kRoundMagic;
      power[i] = broadcast(Traits::kExp2[Traits::kDegree - 1]);
    }
    for (int k = Traits::kDegree - 2; k >= 0; --k)
      for (int i = 0; i < kCount; ++i) power[i] = power[i] * x[i] + Traits::kExp2[k];
    for (int i = 0; i < kCount; ++i)
      x[i] = (power[i] * x[i] + Real(1)) * (Vec)((Bits)shifted[i] << Traits::kMantissaBits);
  }

  // Whether some lane of a mask, whose lanes are 0 or -1, is set.
  static TOB_INLINE bool any(IntVec mask) {
#if defined(__AVX512DQ__) && TOB_VECTOR_BYTES == 64
    if constexpr (kLanes == 16) return _mm512_movepi32_mask((__m512i)mask) != 0;
    else return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif defined(__AVX2__) && TOB_VECTOR_BYTES == 32
    return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__SSE2__) && TOB_VECTOR_BYTES == 16
    return _mm_movemask_epi8((__m128i)mask) != 0;
#else
    typename Traits::Int some = 0;
    for (int i = 0; i < kLanes; ++i) some |= mask[i];
    return some != 0;
#endif
  }

  static TOB_INLINE Vec reverse(Vec v) { return reverse(v, std::make_integer_sequence<int, kLanes>()); }

  // Transposes a square of kLanes vectors. Blocks of 1, 2, 4, ... elements off the diagonal change places.
  static TOB_INLINE void transpose(Vec (&square)[kLanes]) { transpose_from<1>(square); }

  // The sums of kLanes vectors, as one vector. It equals transposing and adding, with half of the exchanges.
  static TOB_INLINE Vec sum_each(Vec (&square)[kLanes]) {
    fold_halves<1>(square, [](Vec a, Vec b) { return a + b; });
    return square[0];
  }
  // The largest elements of kLanes vectors, as one vector.
  static TOB_INLINE Vec max_each(Vec (&square)[kLanes]) {
    fold_halves<1>(square, [](Vec a, Vec b) { return max(a, b); });
    return square[0];
  }

  static TOB_INLINE Real sum(Vec v) {
    Real lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
  }

  static TOB_INLINE Real max_lane(Vec v) {
    Real lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
  }

 private:
#if defined(__AVX512DQ__) && TOB_VECTOR_BYTES == 64
  // 2^x = 2^f 2^floor(x), where f = x - floor(x). Two instructions take x apart and put the powers together. They are
  // right for -inf and NaN as well.
  template <int kCount> static TOB_INLINE void exp2_by_exponent(Vec (&x)[kCount]) {
    constexpr int kToFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    Vec fraction[kCount], power[kCount];
    for (int i = 0; i < kCount; ++i) {
      fraction[i] = (Vec)_mm512_reduce_ps((__m512)x[i], kToFloor);
      power[i] = broadcast(kExp2OfFraction[Traits::kDegree - 1]);
    }
    for (int k = Traits::kDegree - 2; k >= 0; --k)
      for (int i = 0; i < kCount; ++i) power[i] = multiply_add(power[i], fraction[i], broadcast(kExp2OfFraction[k]));
    for (int i = 0; i < kCount; ++i)
      x[i] = (Vec)_mm512_scalef_ps((__m512)multiply_add(power[i], fraction[i], broadcast(1)), (__m512)x[i]);
  }
  // 2^f on [0, 1] with relative error 9.3e-8; the minimax polynomial among those that are right at 0 and 1.
  static constexpr float kExp2OfFraction[] = {0.6931517124176025f, 0.24015948176383972f, 0.055818118155002594f,
                                              0.008991599082946777f, 0.001879088580608368f};
#endif

  template <int... kLane> static TOB_INLINE Vec reverse(Vec v, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(v, v, (kLanes - 1 - kLane)...);
  }

  template <int kBlock> static TOB_INLINE void transpose_from(Vec (&square)[kLanes]) {
    if constexpr (kBlock < kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        if (i & kBlock) continue;
        const Vec upper = square[i], lower = square[i + kBlock];
        square[i] = exchange<kBlock, false>(upper, lower, std::make_integer_sequence<int, kLanes>());
        square[i + kBlock] = exchange<kBlock, true>(upper, lower, std::make_integer_sequence<int, kLanes>());
      }
      transpose_from<2 * kBlock>(square);
    }
  }

  template <int kBlock, class Fold> static TOB_INLINE void fold_halves(Vec (&square)[kLanes], Fold fold) {
    if constexpr (kBlock < kLanes) {
      for (int i = 0; i < kLanes; i += 2 * kBlock) {
        const Vec upper = square[i], lower = square[i + kBlock];
        square[i] = fold(exchange<kBlock, false>(upper, lower, std::make_integer_sequence<int, kLanes>()),
                         exchange<kBlock, true>(upper, lower, std::make_integer_sequence<int, kLanes>()));
      }
      fold_halves<2 * kBlock>(square, fold);
    }
  }

  template <int kBlock, bool kRight, int... kLane>
  static TOB_INLINE Vec exchange(Vec upper, Vec lower, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(upper, lower,
                                   (kRight ? (kLane & kBlock ? kLanes + kLane : kLane + kBlock)
                                           : (kLane & kBlock ? kLanes + kLane - kBlock : kLane))...);
  }
};

}  // namespace tob
