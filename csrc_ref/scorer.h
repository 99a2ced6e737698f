// The scores of tiles, with everything that they depend on beside queries and keys: band, bias, gate, masks and scale.
#pragma once

#include "gate_table.h"
#include "products.h"

namespace tob {

// A tile of pairs of a query head, whose place in the scratch memory is the slot. Its corner is (query, key); of its
// columns some are needed.
struct PairTile {
  int64_t slot, b, h;
  int query, key, rows;
  Range columns;
};

// Forward and backward both make their scores here, so that their roundings are the same.
template <class Products> class Scorer {
  using Real = typename Products::Real;

 public:
  // `slots` heads are at work. A gate needs its transposed table for its gradient.
  Scorer(const tob_problem &problem, const BiasTable<Real> &table, int64_t slots, bool has_transposed)
      : bands(bands_of(problem)),
        strips(problem, table),
        gathered(problem, table),
        mask(problem),
        bias_tiles(problem, strips, slots),
        gate(problem, slots, has_transposed),
        scale(problem.scale, bias_tiles.present()),
        p(problem) {}

  // Makes what scores of a head need.
  void make(int64_t slot, int64_t b, int64_t h) const {
    bias_tiles.make(slot, b, h);
    gate.pack(slot, b, h);
  }

  // See score_block for the factors and for `out`. `gates` are those of the tile's rows, and `products` has room for G.
  template <int kRows, int kColumns>
  TOB_INLINE void scores(const PairTile &tile, const Real *a, int64_t chunk_stride, const Real *panels, int chunks,
                         Real *out, int64_t stride, const GateRows<Real> &gates,
                         GateProducts<Real, kRows, kColumns> &products) const {
    const auto &[slot, b, h, query, key, rows, columns] = tile;
    const Band &band = bands[size_t(b)];
    const bool inside = band.covers(query, query + rows, key + columns.begin, key + columns.end);
    const bool biased = p.bias || !inside;
    const GatheredTile<Real> gathered_tile = gathered.from(b, h, query, key);
    ScoreTerms<Real> terms{scale.products, biased && !bias_tiles.present() ? strips.at(b, h, key - query) : nullptr,
                           gathered.present() ? &gathered_tile : nullptr, mask.present() ? mask.at(b) + key : nullptr,
                           biased ? bias_tiles.at(slot, query, key) : nullptr};
    if (gate.present()) gate.set_terms(terms, slot, b, gates, query, key, rows, columns, products);
    Products::scores(a, chunk_stride, panels, chunks, out, stride, terms, rows, columns, band.len_k - key);
    if (gate.present() && !inside && !gathered.present()) forbid_outside(band, out, stride, query, key, rows, columns);
  }

  // Members are initialised in this order, so each may read only the members above it.
  const std::vector<Band> bands;
  const BiasStrips<Real> strips;
  const GatheredBias<Real> gathered;
  const KeyMask<Real> mask;
  const typename Products::BiasTiles bias_tiles;
  const GateTable<Real> gate;
  const Scale<Real, typename Products::Operand> scale;

 private:
  const tob_problem &p;
};

}  // namespace tob
