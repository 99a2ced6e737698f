// The numbers that products multiply, called operands: reals, or bfloat16 numbers. A cell has the size of a real. It
// holds one real, or two bfloat16 numbers that are neighbours along the product's depth. Products are added up in
// reals.
#pragma once

#include "dtypes.h"

// Whether bfloat16 problems are multiplied by AMX tiles: if the processor has them.
#ifndef TOB_AMX
#ifdef __AMX_BF16__
#define TOB_AMX 1
#else
#define TOB_AMX 0
#endif
#endif

// Whether bfloat16 problems multiply bfloat16 numbers: if the processor has an instruction for it.
#ifndef TOB_BFLOAT16_PRODUCTS
#if defined(__AVX512BF16__) || TOB_AMX
#define TOB_BFLOAT16_PRODUCTS 1
#else
#define TOB_BFLOAT16_PRODUCTS 0
#endif
#endif

namespace tob {

// The operands of bfloat16 problems.
using BFloat16Operand = std::conditional_t<TOB_BFLOAT16_PRODUCTS, BFloat16, float>;

// The number of operands in a cell. A cell is stored as a Real.
template <class Real, class Operand> inline constexpr int kOperandsPerCell = 1;
template <> inline constexpr int kOperandsPerCell<float, BFloat16> = 2;

// The first, or the second, bfloat16 number of every cell, as a real.
template <class Real> TOB_INLINE typename Simd<Real>::Vec first_of_pairs(typename Simd<Real>::Vec cells) {
  return (typename Simd<Real>::Vec)((typename Simd<Real>::Bits)cells << 16);
}
template <class Real> TOB_INLINE typename Simd<Real>::Vec second_of_pairs(typename Simd<Real>::Vec cells) {
  return (typename Simd<Real>::Vec)((typename Simd<Real>::Bits)cells & 0xffff0000);
}

// sum + a b in every lane, where a and b hold a cell in each lane.
template <class Operand, class Real>
TOB_INLINE typename Simd<Real>::Vec add_product(typename Simd<Real>::Vec sum, typename Simd<Real>::Vec a,
                                                typename Simd<Real>::Vec b) {
  if constexpr (std::is_same_v<Operand, Real>) {
    return Simd<Real>::multiply_add(a, b, sum);
  } else {
#if defined(__AVX512BF16__) && TOB_VECTOR_BYTES == 64
    return (typename Simd<Real>::Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + first_of_pairs<Real>(a) * first_of_pairs<Real>(b) +
           second_of_pairs<Real>(a) * second_of_pairs<Real>(b);
#endif
  }
}

// Vectors of 16-bit numbers, two in each cell.
struct Halves {
  static constexpr int kLanes = TOB_VECTOR_BYTES / 2;
  typedef uint16_t Vec __attribute__((vector_size(TOB_VECTOR_BYTES)));

  static TOB_INLINE Vec load(const void *p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static TOB_INLINE void store(void *p, Vec v) { std::memcpy(p, &v, sizeof v); }
  // Stores v's first half and its second half at two places.
  static TOB_INLINE void store_halves(void *first, void *second, Vec v) {
    std::memcpy(first, &v, sizeof v / 2);
    std::memcpy(second, reinterpret_cast<const char *>(&v) + sizeof v / 2, sizeof v / 2);
  }

  // a and then b, rounded to bfloat16: to nearest even.
  static TOB_INLINE Vec narrowed(Simd<float>::Vec a, Simd<float>::Vec b) {
#if defined(__AVX512BF16__) && TOB_VECTOR_BYTES == 64
    return (Vec)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
    using Bits = Simd<float>::Bits;
    const auto rounded = [](Simd<float>::Vec x) {
      const Bits bits = (Bits)x;
      return (Vec)(x != x ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1));
    };
    return upper_halves(rounded(a), rounded(b), std::make_integer_sequence<int, kLanes>());
#endif
  }

  // The first vector, or the second, of the sequence a[0], b[0], a[1], b[1], ...
  static TOB_INLINE Vec interleaved_first(Vec a, Vec b) {
    return interleaved<0, kLanes>(a, b, std::make_integer_sequence<int, kLanes>());
  }
  static TOB_INLINE Vec interleaved_second(Vec a, Vec b) {
    return interleaved<kLanes / 2, kLanes>(a, b, std::make_integer_sequence<int, kLanes>());
  }
  // The sequence of v's first half and v's second half, interleaved in the same way.
  static TOB_INLINE Vec interleaved_halves(Vec v) {
    return interleaved<0, kLanes / 2>(v, v, std::make_integer_sequence<int, kLanes>());
  }

 private:
  template <int... kLane> static TOB_INLINE Vec upper_halves(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, (2 * kLane + 1)...);
  }
  template <int kFirst, int kApart, int... kLane>
  static TOB_INLINE Vec interleaved(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kApart)...);
  }
};

// A cell in every lane.
template <class Operand, class Real> TOB_INLINE typename Simd<Real>::Vec broadcast_cell(const Real *cell) {
  if constexpr (std::is_same_v<Operand, Real>) return Simd<Real>::broadcast(*cell);
  else return Simd<Real>::broadcast_bits(cell);
}

// A vector of cells of stored numbers.
template <class Operand, class Real, class Stored> TOB_INLINE typename Simd<Real>::Vec load_cells(const Stored *from) {
  if constexpr (std::is_same_v<Operand, Real>) return load_stored<Real>(from);
  else return (typename Simd<Real>::Vec)Halves::load(from);
}

// Stores two vectors of neighbouring reals of a row, first a and then b, as operands.
template <class Operand, class Real>
TOB_INLINE void store_operands(Real *to, typename Simd<Real>::Vec a, typename Simd<Real>::Vec b) {
  if constexpr (std::is_same_v<Operand, Real>) {
    Simd<Real>::store(to, a);
    Simd<Real>::store(to + Simd<Real>::kLanes, b);
  } else {
    Halves::store(to, Halves::narrowed(a, b));
  }
}

}  // namespace tob
