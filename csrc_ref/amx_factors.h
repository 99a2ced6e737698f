// Rows as left factors of AMX tiles: as they are, and transposed.
#pragma once

#include "amx.h"
#include "packing.h"

namespace tob {

// 32 rows transposed, A[d][i] = m[first + i][d], 32 bfloat16 numbers at out[d]. Rows from `count` on are 0.
inline void pack_left_transposed(const Matrix &m, int64_t first, int count, float *out) {
  using Lanes = Simd<float>;
  constexpr int kRows = kPanel<float>, kPairs = kRows / 2, W = Lanes::kLanes;
  static_assert(kPairs == W, "the pairs of 32 rows fill a vector");
  alignas(64) float panels[kPairs * (kMaxDim + kRows)];
  pack_right<BFloat16>(m, first, count, kRows, panels, kPairs * kRows);
  for (int d = 0; d < round_up(m.dim, kRows); d += W) {
    const float *pairs = panels + d / kRows * kPairs * kRows + d % kRows;
    Lanes::Vec square[W];
    for (int e = 0; e < W; ++e) square[e] = Lanes::load(pairs + e * kRows);
    Lanes::transpose(square);
    for (int e = 0; e < W; ++e) Lanes::store(out + (d + e) * W, square[e]);
  }
}

// The rows of several matrices of one size, packed as left factors and, 32 rows at a time, as transposed ones.
class TransposedFactors {
  static constexpr int kRows = kPanel<float>, kCells = kRows / 2;  // 32 rows, or 32 dims, and the cells that hold them

 public:
  // `rows` is a multiple of 32.
  TransposedFactors(int64_t matrices, int rows, int dim)
      : panel_stride(int64_t(rows) * kCells),
        padded_dim_(round_up(dim, kRows)),
        size_(padded_dim_ / kRows * panel_stride),
        left_(matrices * size_),
        transposed_(matrices * size_) {}

  // Packs rows [first, first + padded), multiples of 32. `count` of them exist, the others are 0.
  void pack(int64_t matrix, const Matrix &m, int64_t first, int count, int padded, float factor) const {
    pack_left<BFloat16>(m, first, count, padded, factor, left_at(matrix, first), panel_stride);
    for (int i = 0; i < padded; i += kRows)
      pack_left_transposed(m, first + i, std::clamp(count - i, 0, kRows), transposed_at(matrix, first + i));
  }

  // Sets a packed row to 0.
  void clear(int64_t matrix, int64_t row) const {
    for (int64_t panel = 0; panel < size_; panel += panel_stride)
      std::fill_n(left_at(matrix, row) + panel, kCells, 0.f);
    auto *column = reinterpret_cast<BFloat16 *>(transposed_at(matrix, row / kRows * kRows)) + row % kRows;
    for (int d = 0; d < padded_dim_; ++d) column[d * kRows] = BFloat16{};
  }

  const float *left(int64_t matrix, int64_t row) const { return left_at(matrix, row); }
  // From a row on that is a multiple of 32. The row of a dim has 32 numbers; padded_dim of these follow one another.
  const float *transposed(int64_t matrix, int64_t row) const { return transposed_at(matrix, row); }

  const int64_t panel_stride;

 private:
  float *left_at(int64_t matrix, int64_t row) const { return left_.get() + matrix * size_ + row * kCells; }
  float *transposed_at(int64_t matrix, int64_t row) const {
    return transposed_.get() + matrix * size_ + row / kRows * padded_dim_ * kCells;
  }

  const int padded_dim_;
  const int64_t size_;
  const Scratch<float> left_, transposed_;
};

}  // namespace tob
