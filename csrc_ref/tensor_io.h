// Reading and writing rows of tensors of any dtype and stride.
#pragma once

#include <algorithm>

#include "dtypes.h"
#include "engine.h"

namespace tob {

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

// The same of a result: an output, or a gradient of the queries, keys or values. Parts have results in reals.
inline Matrix result_matrix(const tob_problem &p, const tob_tensor &t, int dim, int64_t b, int64_t h,
                            int64_t first_row) {
  const int64_t real = p.dtype == TOB_FLOAT64 ? p.dtype : int64_t(TOB_FLOAT32);
  return matrix_of(t, p.is_part ? real : p.dtype, dim, b, h, first_row);
}

// Calls visit with a pointer of the stored type, for tensors whose numbers are read as Elements.
template <class Element, class Visit> TOB_INLINE void visit_stored(const Matrix &m, Visit visit) {
  if constexpr (std::is_same_v<Element, float>) {
    if (m.dtype == TOB_BFLOAT16) visit(static_cast<BFloat16 *>(m.data));
    else if (m.dtype == TOB_FLOAT16) visit(static_cast<Float16 *>(m.data));
    else visit(static_cast<float *>(m.data));
  } else {
    visit(static_cast<Element *>(m.data));
  }
}

// The number of rows by which prefetching runs ahead of reading. The hardware's own prefetching stays within a page of
// memory, which rows soon leave.
inline constexpr int kRowsAhead = 32;

// Brings the element that lies `rows` rows behind *p into the caches, if there is one.
template <class Stored> TOB_INLINE void prefetch(const Stored *p, int rows, int64_t stride) {
  const uintptr_t distance = uintptr_t(stride) * uintptr_t(rows) * sizeof *p;  // may wrap where there is no such row
  __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(p) + distance));
}

// to[i * padded_dim ..] = m[first + i] for `count` rows, zero beyond m.dim.
template <class Element> void read_rows(const Matrix &m, int64_t first, int count, Element *to, int padded_dim) {
  constexpr int W = TOB_VECTOR_BYTES / sizeof(Element);
  const int whole = m.stride_d == 1 ? m.dim / W * W : 0;
  visit_stored<Element>(m, [&](const auto *data) {
    data += first * m.stride_l;
    for (int i = 0; i < count; ++i, data += m.stride_l, to += padded_dim) {
      for (int d = 0; d < whole; d += W) {
        prefetch(data + d, kRowsAhead, m.stride_l);
        copy_vector(data + d, to + d);
      }
      for (int d = whole; d < m.dim; ++d) to[d] = Element(data[d * m.stride_d]);
      for (int d = m.dim; d < padded_dim; ++d) to[d] = Element{};
    }
  });
}

// m[first + i] = kept * m[first + i] + factor * from[i * row_stride ..] for `count` rows. If kept is 0, the rows may
// have been uninitialised.
template <class Real>
void write_rows(const Matrix &m, int64_t first, int count, Real kept, Real factor, const Real *from,
                int64_t row_stride) {
  constexpr int W = Simd<Real>::kLanes;
  const int whole = m.stride_d == 1 ? m.dim / W * W : 0;
  visit_stored<Real>(m, [&](auto *data) {
    using Stored = std::remove_pointer_t<decltype(data)>;
    data += first * m.stride_l;
    for (int i = 0; i < count; ++i, data += m.stride_l, from += row_stride) {
      for (int d = 0; d < whole; d += W) {
        prefetch(data + d, kRowsAhead, m.stride_l);
        const auto x = factor * Simd<Real>::load(from + d);
        store_stored<Real>(data + d, kept == 0 ? x : kept * load_stored<Real>(data + d) + x);
      }
      for (int d = whole; d < m.dim; ++d) {
        Stored &to = data[d * m.stride_d];
        to = stored_as<Real, Stored>(factor * from[d] + (kept == 0 ? Real(0) : kept * Real(to)));
      }
    }
  });
}

}  // namespace tob
