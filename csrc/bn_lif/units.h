// Where bn_lif's CPU kernels work, tile by tile, and the sums they leave for each channel.
#pragma once
#include <stdlib.h>

#include "bn_lif/bn_lif.h"
#include "core/simd.h"
#include "lif/rows.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int kPiece = 256;        // neurons whose rows lie in L1 at once
constexpr int kMostChannels = 64;  // of a unit of maps

template <class T>
struct Memory {
  T* const data;
  explicit Memory(int64_t n) : data(static_cast<T*>(aligned_alloc(64, (sizeof(T) * size_t(n) + 127) / 64 * 64))) {}
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

struct Tile {
  int64_t first, at;  // its first neuron, and the place of that in the unit's rows of constants
  int n;
};

struct Unit {
  const BnShape& s;
  const bool maps;
  int64_t period, outer, first, count;  // first, count: channels (maps) or periods
  int64_t length, each, tiles;          // length: neurons of a run of tiles; each: tiles of such a run

  Unit(const BnShape& s, int64_t unit) : s(s), maps(bn_maps(s)), period(s.C * s.inner), outer(s.N / period) {
    const int64_t of = maps ? s.C : outer;
    first = unit * bn_unit(s);
    count = of - first < bn_unit(s) ? of - first : bn_unit(s);
    length = maps ? count * s.inner : period > kBnTile ? period : count * period;
    each = (length + step() - 1) / step();
    tiles = each * (maps ? outer : period > kBnTile ? count : 1);
  }
  int64_t step() const { return maps || period > kBnTile ? kBnTile : (kPiece + period - 1) / period * period; }
  bool alone() const { return maps && count == 1; }  // one channel, whose constants are the same all along
  int64_t row() const { return alone() ? kPiece : maps ? kBnTile : period > kBnTile ? period : step(); }  // of constants
  Tile operator[](int64_t i) const {
    const int64_t run = i / each, j = i % each * step();
    const int64_t start = maps ? run * period + first * s.inner : first * period + run * length;
    const int n = int(length - j < step() ? length - j : step());
    return {start + j, !maps && period > kBnTile ? j : 0, n};  // a tile of whole periods starts with one
  }
  // The tiles from the last, which may still be near; those of periods lie side by side and are better read as they lie.
  int64_t backwards(int64_t i) const { return maps ? tiles - 1 - i : i; }
  // body(first neuron, place in the rows of constants, n) for each stretch of a tile of at most `most` neurons.
  template <class Body>
  void pieces(const Tile& tile, int most, const Body& body) const {
    for (int j = 0; j < tile.n; j += most) body(tile.first + j, alone() ? 0 : tile.at + j, tile.n - j < most ? tile.n - j : most);
  }
  // fill(at, n, channel) for each stretch of one channel in the rows of constants.
  template <class Fill>
  void stretches(const Fill& fill) const {
    if (alone()) return fill(0, int(row()), first);
    const int64_t end = maps ? length : row(), inner = s.inner;
    for (int64_t at = 0; at < end; at += inner) fill(at, int(inner), maps ? first + at / inner : at % period / inner);
  }
};

// In an order that only n fixes, by sums that do not wait for each other.
inline double sum_of(const double* x, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += x[i + j];
  for (int j = 0; i < n; ++i, ++j) lanes[j] += x[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// The sums of a unit's channels, `kinds` for each place of the unit's rows of constants.
struct Sums {
  const Unit& unit;
  const int kinds;
  const int64_t width;
  Memory<double> places;

  Sums(const Unit& unit, int kinds) : unit(unit), kinds(kinds), width(unit.row()), places(kinds * width) {
    if (places.data)
      for (int64_t i = 0; i < kinds * width; ++i) places.data[i] = 0;
  }
  double* of(int kind) const { return places.data + kind * width; }
  // done(channel, [kinds] sums) for each channel of the unit.
  template <class Done>
  void finish(const Done& done) const {
    const int64_t channels = unit.maps ? unit.count : unit.s.C, inner = unit.alone() ? width : unit.s.inner;
    const int64_t period = unit.maps ? width : unit.period;
    for (int64_t c = 0; c < channels; ++c) {
      double total[kBnSums + 1] = {};
      for (int k = 0; k < kinds; ++k)
        for (int64_t start = c * inner; start < width; start += period) total[k] += sum_of(of(k) + start, inner);
      done(unit.maps ? unit.first + c : c, total);
    }
  }
};

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
