// Packs matrices as the factors of a product A B, in cells of operands. The last panel is filled up with zeros.
#pragma once

#include "microkernel.h"
#include "runtime.h"
#include "tensor_io.h"

namespace tob {

inline constexpr int kMaxDim = TOB_MAX_DIM;

// The cells that hold as many operands as a panel has columns.
template <class Real, class Operand> inline constexpr int kChunkCells = kPanel<Real> / kOperandsPerCell<Real, Operand>;

// Packs rows of m as a left factor A: A[r][k] = m[first + r][k] lies at out[k / kPanel][r][k % kPanel]. Rows from
// `count` to `padded` are 0. The next panel begins at out + panel_stride. Reals are multiplied with `factor`.
template <class Operand, class Real>
void pack_left(const Matrix &m, int64_t first, int count, int padded, Real factor, Real *out, int64_t panel_stride) {
  constexpr int kPanelWidth = kPanel<Real>, kChunk = kChunkCells<Real, Operand>,
                kPerCell = kOperandsPerCell<Real, Operand>;
  constexpr int W = TOB_VECTOR_BYTES / sizeof(Operand);
  const int padded_dim = round_up(m.dim, kPanelWidth), whole = m.stride_d == 1 ? round_down(m.dim, W) : 0;
  visit_stored<Operand>(m, [&](const auto *data) {
    data += first * m.stride_l;
    for (int i = 0; i < count; ++i, data += m.stride_l) {
      const auto at = [&](int d) {
        return reinterpret_cast<Operand *>(out + d / kPanelWidth * panel_stride + i * kChunk) + d % kPanelWidth;
      };
      for (int d = 0; d < whole; d += W) {
        prefetch(data + d, kRowsAhead, m.stride_l);
        if constexpr (kPerCell == 1) Simd<Real>::store(at(d), factor * load_stored<Real>(data + d));
        else copy_vector(data + d, at(d));
      }
      for (int d = whole; d < padded_dim; ++d) {
        Operand x = d < m.dim ? Operand(data[d * m.stride_d]) : Operand{};
        if constexpr (kPerCell == 1) x *= factor;
        std::memcpy(at(d), &x, sizeof x);
      }
    }
  });
  for (int d = 0; d < padded_dim && count < padded; d += kPanelWidth)
    std::fill_n(out + d / kPanelWidth * panel_stride + count * kChunk, (padded - count) * kChunk, Real(0));
}

// Packs rows of m as a right factor B: B[k][c] = m[first + k][c] lies at out[c / kPanel][k][c % kPanel], where k counts
// cells. Rows from `count` to `padded` are 0. The next panel begins at out + panel_stride.
template <class Operand, class Real>
void pack_right(const Matrix &m, int64_t first, int count, int padded, Real *out, int64_t panel_stride) {
  if constexpr (std::is_same_v<Operand, Real>) {
    pack_left<Operand>(m, first, count, padded, Real(1), out, panel_stride);
  } else {
    constexpr int kPanelWidth = kPanel<Real>, W = Simd<Real>::kLanes;
    const int padded_dim = round_up(m.dim, kPanelWidth);
    Operand pair[2 * (kMaxDim + kPanelWidth)];
    for (int i = 0; i < padded; i += 2, out += kPanelWidth) {
      const int present = std::clamp(count - i, 0, 2);
      if (present > 0) read_rows(m, first + i, present, pair, padded_dim);
      std::fill(pair + present * padded_dim, pair + 2 * padded_dim, Operand{});
      for (int d = 0; d < padded_dim; d += kPanelWidth) {
        const auto upper = Halves::load(pair + d), lower = Halves::load(pair + padded_dim + d);
        Real *cells = out + d / kPanelWidth * panel_stride;
        Halves::store(cells, Halves::interleaved_first(upper, lower));
        Halves::store(cells + W, Halves::interleaved_second(upper, lower));
      }
    }
  }
}

// Packs rows of m as one panel of a right factor B, transposed: B[k][c] = m[first + c][k] lies at out[k][c], where k
// counts cells. Columns from `count` on are 0.
template <class Operand, class Real> void pack_right_transposed(const Matrix &m, int64_t first, int count, Real *out) {
  using Lanes = Simd<Real>;
  constexpr int kPanelWidth = kPanel<Real>, W = Lanes::kLanes, kPerCell = kOperandsPerCell<Real, Operand>;
  const int padded_dim = round_up(m.dim, kPanelWidth);
  const auto transpose = [&](const auto *from, int64_t stride) {
    for (int k = 0; k < padded_dim / kPerCell; k += W)
      for (int i = 0; i < kPanelWidth; i += W) {
        typename Lanes::Vec square[W];
        for (int e = 0; e < W; ++e) {
          const auto *cells = from + (i + e) * stride + k * kPerCell;
          prefetch(cells, kPanelWidth, stride);  // for the next panel
          square[e] = load_cells<Operand, Real>(cells);
        }
        Lanes::transpose(square);
        for (int e = 0; e < W; ++e) Lanes::store(out + (k + e) * kPanelWidth + i, square[e]);
      }
  };
  if (count == kPanelWidth && m.dim == padded_dim && m.stride_d == 1) {
    visit_stored<Operand>(m, [&](const auto *data) { transpose(data + first * m.stride_l, m.stride_l); });
    return;
  }
  alignas(64) Operand copies[kPanelWidth * (kMaxDim + kPanelWidth)];
  read_rows(m, first, count, copies, padded_dim);
  std::fill_n(copies + count * padded_dim, (kPanelWidth - count) * padded_dim, Operand{});
  transpose(copies, padded_dim);
}

// dots[i] = <a[first + i], b[first + i]> for `count` rows of two matrices of one dtype and width, added up along the
// dims in the order of product_tile: the same numbers give the same sum to the last bit.
template <class Operand, class Real>
void dot_rows(const Matrix &a, const Matrix &b, int64_t first, int count, Real *dots) {
  using Lanes = Simd<Real>;
  constexpr int W = Lanes::kLanes, kStep = W * kOperandsPerCell<Real, Operand>;  // rows, and dims, at a time
  const int padded_dim = round_up(a.dim, kStep);
  const bool in_place = a.dim == padded_dim && a.stride_d == 1 && b.stride_d == 1;
  const auto dot = [&](const auto *x, const auto *y, int64_t stride_x, int64_t stride_y, int rows, Real *out) {
    typename Lanes::Vec sum{};
    for (int d = 0; d < padded_dim; d += kStep) {
      typename Lanes::Vec left[W], right[W];
      for (int e = 0; e < W; ++e) {
        const int64_t row = std::min(e, rows - 1);
        prefetch(x + row * stride_x + d, kRowsAhead, stride_x);
        left[e] = load_cells<Operand, Real>(x + row * stride_x + d);
        right[e] = load_cells<Operand, Real>(y + row * stride_y + d);
      }
      Lanes::transpose(left);
      Lanes::transpose(right);
      for (int e = 0; e < W; ++e) sum = add_product<Operand, Real>(sum, left[e], right[e]);
    }
    Real lanes[W];
    Lanes::store(lanes, sum);
    std::copy_n(lanes, rows, out);
  };
  for (int i = 0; i < count; i += W) {
    const int rows = std::min(W, count - i);
    if (in_place) {
      visit_stored<Operand>(a, [&](const auto *x) {
        const auto *y = static_cast<decltype(x)>(b.data) + (first + i) * b.stride_l;
        dot(x + (first + i) * a.stride_l, y, a.stride_l, b.stride_l, rows, dots + i);
      });
    } else {
      alignas(64) Operand copies[2][W * (kMaxDim + kStep)];
      read_rows(a, first + i, rows, copies[0], padded_dim);
      read_rows(b, first + i, rows, copies[1], padded_dim);
      dot(copies[0], copies[1], padded_dim, padded_dim, rows, dots + i);
    }
  }
}

// The rows of several matrices of one size, packed as left factors and as right factors. For reals both are the same.
template <class Real, class Operand> class RowFactors {
  static constexpr int kPanelWidth = kPanel<Real>, kPerCell = kOperandsPerCell<Real, Operand>;

 public:
  // `rows` counts whole cells.
  RowFactors(int64_t matrices, int rows, int dim)
      : panel_stride(int64_t(rows) / kPerCell * kPanelWidth),
        size_(round_up(dim, kPanelWidth) / kPanelWidth * panel_stride),
        left_(matrices * size_),
        right_(kPerCell == 1 ? 0 : matrices * size_) {}

  // Packs rows [first, first + padded). `count` of them exist, the others are 0. Reals are multiplied with `factor`.
  void pack(int64_t matrix, const Matrix &m, int64_t first, int count, int padded, Real factor) const {
    pack_left<Operand>(m, first, count, padded, factor, left_at(matrix, first), panel_stride);
    if constexpr (kPerCell > 1) pack_right<Operand>(m, first, count, padded, right_at(matrix, first), panel_stride);
  }

  // Sets a packed row to 0.
  void clear(int64_t matrix, int64_t row) const {
    for (int64_t panel = 0; panel < size_; panel += panel_stride) {
      std::fill_n(left_at(matrix, row) + panel, kChunkCells<Real, Operand>, Real(0));
      auto *operands = reinterpret_cast<Operand *>(right_at(matrix, row) + panel) + row % kPerCell;
      for (int d = 0; d < kPanelWidth && kPerCell > 1; ++d) operands[d * kPerCell] = Operand{};
    }
  }

  const Real *left(int64_t matrix, int64_t row) const { return left_at(matrix, row); }
  const Real *right(int64_t matrix, int64_t row) const { return right_at(matrix, row); }

  const int64_t panel_stride;

 private:
  Real *left_at(int64_t matrix, int64_t row) const {
    return left_.get() + matrix * size_ + row * kChunkCells<Real, Operand>;
  }
  Real *right_at(int64_t matrix, int64_t row) const {
    return (kPerCell == 1 ? left_ : right_).get() + matrix * size_ + row / kPerCell * kPanelWidth;
  }

  int64_t size_;
  Scratch<Real> left_, right_;
};

}  // namespace tob
