// The types of numbers in tensors, and their conversion to and from vectors of reals.
#pragma once

#include "simd.h"

namespace tob {

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
  operator float() const { return as_float(uint32_t(bits) << 16); }
  static BFloat16 from(float x) {
    const uint32_t b = as_bits(x);
    const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;  // to nearest even
    return {uint16_t((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
  }
};

struct Float16 {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits & 0x7c00,
                   magnitude = uint32_t(bits & 0x7fff) << 13;
    const float subnormal = float(bits & 0x3ff) * 0x1p-24f;
    const uint32_t rebias = exponent == 0x7c00 ? 0x70000000 : 0x38000000;
    return as_float(sign | (exponent == 0 ? as_bits(subnormal) : magnitude + rebias));
  }
  static Float16 from(float x) {
    const uint32_t sign = (as_bits(x) >> 16) & 0x8000, b = as_bits(x) & 0x7fffffff;
    // Adding 1/2 shifts a subnormal half's mantissa to the low bits, rounded to nearest even by the addition itself.
    const uint32_t subnormal = as_bits(as_float(b) + 0.5f) - 0x3f000000;
    const uint32_t normal = (b + 0xc8000fff + ((b >> 13) & 1)) >> 13;
    const uint32_t overflow = b > 0x7f800000 ? 0x7e00 : 0x7c00;
    return {uint16_t(sign | (b >= 0x477ff000 ? overflow : b < 0x38800000 ? subnormal : normal))};
  }
};

template <class Real, class Stored> Stored stored_as(Real x) {
  if constexpr (std::is_same_v<Stored, Real>) return x;
  else return Stored::from(float(x));
}

// A vector of stored numbers as reals.
template <class Real, class Stored> TOB_INLINE typename Simd<Real>::Vec load_stored(const Stored *data) {
  using Lanes = Simd<Real>;
  if constexpr (std::is_same_v<Stored, Real>) {
    return Lanes::load(data);
  } else {
    // Spelled out on x86, where compilers miss the instructions.
#if defined(__AVX512F__) && TOB_VECTOR_BYTES == 64
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(data));
    if constexpr (std::is_same_v<Stored, Float16>) return (typename Lanes::Vec)_mm512_cvtph_ps(halves);
    else return (typename Lanes::Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(__AVX2__) && defined(__F16C__) && TOB_VECTOR_BYTES == 32
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(data));
    if constexpr (std::is_same_v<Stored, Float16>) return (typename Lanes::Vec)_mm256_cvtph_ps(halves);
    else return (typename Lanes::Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
    if constexpr (std::is_same_v<Stored, BFloat16>) {
      typedef uint16_t Halves __attribute__((vector_size(2 * Lanes::kLanes)));
      Halves halves;
      std::memcpy(&halves, data, sizeof halves);
      return (typename Lanes::Vec)(__builtin_convertvector(halves, typename Lanes::IntVec) << 16);
    } else {
      typename Lanes::Vec values;
      for (int lane = 0; lane < Lanes::kLanes; ++lane) values[lane] = data[lane];
      return values;
    }
#endif
  }
}

// A vector of reals as stored numbers.
template <class Real, class Stored> TOB_INLINE void store_stored(Stored *data, typename Simd<Real>::Vec reals) {
  using Lanes = Simd<Real>;
  if constexpr (std::is_same_v<Stored, Real>) {
    Lanes::store(data, reals);
  } else if constexpr (std::is_same_v<Stored, BFloat16>) {
    typedef uint16_t Halves __attribute__((vector_size(2 * Lanes::kLanes)));
    const auto bits = (typename Lanes::Bits)reals;
    const auto rounded = reals != reals ? 0x7fc0 - typename Lanes::Bits{} : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves halves = __builtin_convertvector(rounded, Halves);
    std::memcpy(data, &halves, sizeof halves);
  } else {
#if defined(__AVX512F__) && TOB_VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(data), _mm512_cvtps_ph((__m512)reals, 0));
#elif defined(__AVX2__) && defined(__F16C__) && TOB_VECTOR_BYTES == 32
    _mm_storeu_si128(reinterpret_cast<__m128i *>(data), _mm256_cvtps_ph((__m256)reals, 0));
#else
    for (int lane = 0; lane < Lanes::kLanes; ++lane) data[lane] = Stored::from(reals[lane]);
#endif
  }
}

// Copies a vector of elements: stored numbers as reals, or as they are.
template <class Stored, class Element> TOB_INLINE void copy_vector(const Stored *from, Element *to) {
  if constexpr (std::is_same_v<Stored, Element>) std::memcpy(to, from, TOB_VECTOR_BYTES);
  else Simd<Element>::store(to, load_stored<Element>(from));
}

}  // namespace tob
