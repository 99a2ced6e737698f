// Which weights dropout keeps: those whose 32 bits of Philox4x32-7 exceed tob_problem's largest_dropped.
//
// Philox's key is the seed. With the counter (i / 16 * 8 + i % 8, j / 16 * 8 + j % 8, b * heads_q + h, 0) its four
// words serve the four weights whose query i and key j, counted in their sequence, differ in bit 3: word 2 (i / 8 % 2)
// + (j / 8 % 2). A call with some rows or heads of a whole counts them as the whole does: see tob_problem's
// dropout_query. Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include "band.h"

namespace tob {

// A vector of 32-bit words, each in a lane of 64 bits. The upper halves of lanes mean nothing.
inline constexpr int kWords = TOB_VECTOR_BYTES >= 32 ? 4 : 2;
typedef uint64_t Words __attribute__((vector_size(8 * kWords)));

TOB_INLINE Words broadcast_word(uint64_t x) { return x - Words{}; }

TOB_INLINE Words consecutive_words(uint64_t first) {
  Words words;
  for (int lane = 0; lane < kWords; ++lane) words[lane] = first + uint64_t(lane);
  return words;
}

TOB_INLINE Words multiply_words(Words a, uint32_t factor) {
#if defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(int64_t(factor)));
#else
  return (a & broadcast_word(0xffffffff)) * broadcast_word(factor);
#endif
}

TOB_INLINE void philox(uint64_t seed, Words (&c)[4]) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const Words left = multiply_words(c[0], 0xD2511F53), right = multiply_words(c[2], 0xCD9E8D57);
    c[0] = (right >> 32) ^ c[1] ^ broadcast_word(key0);
    c[1] = right;
    c[2] = (left >> 32) ^ c[3] ^ broadcast_word(key1);
    c[3] = left;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// A byte for each weight of a tile: -1 if the weight is kept, 0 if it is dropped.
template <int kRows, int kColumns> class KeptWeights {
  static constexpr int kStride = round_up(kColumns, 16) + 32;

 public:
  // Fills the tile that begins at query `row` and key `column` of a head, and all of each 16 x 16 square of the whole
  // that it touches.
  void fill(const tob_problem &p, int64_t b, int64_t h, int row, int column, int rows, int columns) {
    row_ = row - int((p.dropout_query + row) % 16);
    column_ = column - int((p.dropout_key + column) % 16);
    const uint64_t head = uint64_t(b * p.dropout_heads + p.dropout_head + h);
    for (int i = row_; i < row + rows; i += 16)
      for (int j = column_; j < column + columns; j += 16)
        for (int r = 0; r < 8; ++r)
          for (int c = 0; c < 8; c += kWords) {
            Words words[4] = {broadcast_word(uint64_t((p.dropout_query + i) / 2 + r)),
                              consecutive_words(uint64_t((p.dropout_key + j) / 2 + c)), broadcast_word(head), Words{}};
            philox(p.seed, words);
            for (int w = 0; w < 4; ++w) {
              const Words word = words[w] & broadcast_word(0xffffffff);
              int8_t *kept = bytes_ + (i - row_ + r + w / 2 * 8) * kStride + j - column_ + c + w % 2 * 8;
              for (int lane = 0; lane < kWords; ++lane) kept[lane] = word[lane] > p.largest_dropped ? -1 : 0;
            }
          }
  }

  // The bytes of the query `row`, from the key `column` on.
  const int8_t *at(int row, int column) const { return bytes_ + (row - row_) * kStride + column - column_; }

 private:
  int row_, column_;
  alignas(64) int8_t bytes_[(round_up(kRows, 16) + 32) * kStride];
};

// x where kept, else 0.
template <class Real> TOB_INLINE typename Simd<Real>::Vec where_kept(const int8_t *kept, typename Simd<Real>::Vec x) {
  using Lanes = Simd<Real>;
  typedef int8_t Bytes __attribute__((vector_size(Lanes::kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, kept, sizeof bytes);
  return (typename Lanes::Vec)((typename Lanes::IntVec)x & __builtin_convertvector(bytes, typename Lanes::IntVec));
}

}  // namespace tob
