// Reading and writing rows of tensors of any dtype and stride, and packing them into panels.
#pragma once

#include "engine.h"
#include "microkernel.h"

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

// One (sequence, head) matrix of a tensor, from the sequence's first row on: rows of `dim` elements.
struct Matrix {
  void *data;
  int64_t dtype, stride_l, stride_d;
  int dim;
};

inline int64_t element_bytes(int64_t dtype) { return dtype == TOB_FLOAT64 ? 8 : dtype == TOB_FLOAT32 ? 4 : 2; }

inline Matrix matrix_of(const tob_tensor &t, int64_t dtype, int dim, int64_t b, int64_t h, int64_t first_row) {
  char *data =
      static_cast<char *>(t.data) + (b * t.stride_b + h * t.stride_h + first_row * t.stride_l) * element_bytes(dtype);
  return {data, dtype, t.stride_l, t.stride_d, dim};
}

// Calls visit(pointer to the stored type); Real is float or double, and double goes with TOB_FLOAT64 alone.
template <class Real, class Visit> TOB_INLINE void visit_stored(const Matrix &m, Visit visit) {
  if constexpr (std::is_same_v<Real, double>) {
    visit(static_cast<double *>(m.data));
  } else {
    if (m.dtype == TOB_BFLOAT16) visit(static_cast<BFloat16 *>(m.data));
    else if (m.dtype == TOB_FLOAT16) visit(static_cast<Float16 *>(m.data));
    else visit(static_cast<float *>(m.data));
  }
}

// A vector of stored numbers as reals.
template <class Real, class Stored> TOB_INLINE typename Simd<Real>::Vec load_stored(const Stored *data) {
  using S = Simd<Real>;
  if constexpr (std::is_same_v<Stored, Real>) {
    return S::load(data);
  } else {
    // Spelled out on x86, where compilers miss the instructions.
#if defined(__AVX512F__) && TOB_VECTOR_BYTES == 64
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(data));
    if constexpr (std::is_same_v<Stored, Float16>) return (typename S::Vec)_mm512_cvtph_ps(halves);
    else return (typename S::Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(__AVX2__) && defined(__F16C__) && TOB_VECTOR_BYTES == 32
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(data));
    if constexpr (std::is_same_v<Stored, Float16>) return (typename S::Vec)_mm256_cvtph_ps(halves);
    else return (typename S::Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
    if constexpr (std::is_same_v<Stored, BFloat16>) {
      typedef uint16_t Halves __attribute__((vector_size(2 * S::kLanes)));
      Halves halves;
      std::memcpy(&halves, data, sizeof halves);
      return (typename S::Vec)(__builtin_convertvector(halves, typename S::IntVec) << 16);
    } else {
      typename S::Vec values;
      for (int lane = 0; lane < S::kLanes; ++lane) values[lane] = data[lane];
      return values;
    }
#endif
  }
}

// rows[i * padded_dim ..] = m[first + i] * factor for `count` rows, zero beyond m.dim.
template <class Real>
void read_rows(const Matrix &m, int64_t first, int count, Real factor, Real *rows, int padded_dim) {
  using S = Simd<Real>;
  constexpr int W = S::kLanes;
  const int64_t stride_l = m.stride_l, stride_d = m.stride_d;
  const int dim = m.dim, vectors = stride_d == 1 ? dim / W : 0;
  visit_stored<Real>(m, [&](const auto *data) {
    data += first * stride_l;
    for (int i = 0; i < count; ++i, data += stride_l, rows += padded_dim) {
      for (int v = 0; v < vectors; ++v) S::store(rows + v * W, factor * load_stored<Real>(data + v * W));
      for (int d = vectors * W; d < dim; ++d) rows[d] = factor * Real(data[d * stride_d]);
      for (int d = dim; d < padded_dim; ++d) rows[d] = 0;
    }
  });
}

// m[index] = factor * row.
template <class Real> void write_row(const Matrix &m, int64_t index, Real factor, const Real *row) {
  visit_stored<Real>(m, [&](auto *data) {
    using Stored = std::remove_pointer_t<decltype(data)>;
    data += index * m.stride_l;
    if (m.stride_d == 1)
      for (int d = 0; d < m.dim; ++d) data[d] = stored_as<Real, Stored>(factor * row[d]);
    else
      for (int d = 0; d < m.dim; ++d) data[d * m.stride_d] = stored_as<Real, Stored>(factor * row[d]);
  });
}

inline constexpr int kMaxDim = 256;

// row[0 .. panels * kPanel) as row `index` of panels of rows; out + panel_stride is the next panel.
template <class Real>
TOB_INLINE void scatter_row(const Real *row, int panels, int64_t index, Real *out, int64_t panel_stride) {
  constexpr int P = kPanel<Real>;
  for (int p = 0; p < panels; ++p) std::memcpy(out + p * panel_stride + index * P, row + p * P, sizeof(Real) * P);
}

// Panels of rows: out[d / kPanel][index][d % kPanel] for `count` rows from `first`; rows past `count` up to `padded`
// are 0. out + panel_stride is the next panel.
template <class Real>
void pack_rows(const Matrix &m, int64_t first, int count, int padded, Real factor, Real *out, int64_t panel_stride) {
  using S = Simd<Real>;
  constexpr int P = kPanel<Real>, W = S::kLanes;
  const int padded_dim = round_up(m.dim, P), whole = m.stride_d == 1 ? round_down(m.dim, W) : 0;
  visit_stored<Real>(m, [&](const auto *data) {
    data += first * m.stride_l;
    for (int i = 0; i < count; ++i, data += m.stride_l) {
      const auto at = [&](int d) { return out + d / P * panel_stride + i * P + d % P; };
      for (int d = 0; d < whole; d += W) S::store(at(d), factor * load_stored<Real>(data + d));
      for (int d = whole; d < padded_dim; ++d) *at(d) = d < m.dim ? factor * Real(data[d * m.stride_d]) : Real(0);
    }
  });
  for (int d = 0; d < padded_dim && count < padded; d += P)
    std::fill_n(out + d / P * panel_stride + count * P, (padded - count) * P, Real(0));
}

// One panel of columns: out[d][i] = m[first + i][d] for kPanel rows, of which `count` exist and the others are 0.
template <class Real> void pack_transposed(const Matrix &m, int64_t first, int count, Real *out) {
  constexpr int P = kPanel<Real>, W = Simd<Real>::kLanes;
  const int padded_dim = round_up(m.dim, P);
  const auto transpose = [&](const auto *rows, int64_t stride) {
    for (int d = 0; d < padded_dim; d += W)
      for (int i = 0; i < P; i += W) {
        typename Simd<Real>::Vec square[W];
        for (int e = 0; e < W; ++e) square[e] = load_stored<Real>(rows + (i + e) * stride + d);
        Simd<Real>::transpose(square);
        for (int e = 0; e < W; ++e) Simd<Real>::store(out + int64_t(d + e) * P + i, square[e]);
      }
  };
  if (count == P && m.dim == padded_dim && m.stride_d == 1) {
    visit_stored<Real>(m, [&](const auto *data) { transpose(data + first * m.stride_l, m.stride_l); });
    return;
  }
  alignas(64) Real rows[P * (kMaxDim + P)];
  read_rows(m, first, count, Real(1), rows, padded_dim);
  std::fill_n(rows + count * padded_dim, (P - count) * padded_dim, Real(0));
  transpose(rows, padded_dim);
}

}  // namespace tob
