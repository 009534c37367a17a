// Where bn_lif's CPU kernels work, tile by tile, and the sums they leave for each channel.
#pragma once
#include <stdlib.h>

#include "bn_lif/bn_lif.h"
#include "core/simd.h"
#include "lif/rows.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int kLanes = 16;         // partial sums of a channel: their number, not the vector width, fixes the order
constexpr int kMostChannels = 32;  // of a unit of maps

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
  int64_t step() const { return maps || period > kBnTile ? kBnTile : kBnTile / period * period; }
  int64_t row() const { return maps ? kBnTile : period > kBnTile ? period : step(); }  // of constants
  Tile operator[](int64_t i) const {
    const int64_t run = i / each, j = i % each * step();
    const int64_t start = maps ? run * period + first * s.inner : first * period + run * length;
    const int n = int(length - j < step() ? length - j : step());
    // The constants of a map are the same all along; a tile of whole periods starts with one.
    return {start + j, !maps && period > kBnTile ? j : 0, n};
  }
  // fill(at, n, channel) for each stretch of one channel in the rows of constants.
  template <class Fill>
  void stretches(const Fill& fill) const {
    if (maps && count == 1) return fill(0, int(row()), first);
    const int64_t end = maps ? length : row(), inner = s.inner;
    for (int64_t at = 0; at < end; at += inner) fill(at, int(inner), maps ? first + at / inner : at % period / inner);
  }
};

// sums[0] += d, sums[1] += d * d of d = x - k, in kLanes lanes or each number in a place of its own.
template <class A>
SPK_NOINLINE void add_moments(double* __restrict__ sum, double* __restrict__ squares, const A* __restrict__ x,
                              const A* __restrict__ k, int n) {
  for (int i = 0; i < n; ++i) {
    const double d = double(x[i]) - double(k[i]);
    sum[i] += d;
    squares[i] += d * d;
  }
}
template <class A>
SPK_NOINLINE void add_moments_lanes(double* __restrict__ sum, double* __restrict__ squares, const A* __restrict__ x, A k, int n) {
  double a[kLanes], b[kLanes];
  for (int j = 0; j < kLanes; ++j) a[j] = sum[j], b[j] = squares[j];
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const double d = double(x[i + j]) - double(k);
      a[j] += d;
      b[j] += d * d;
    }
  }
  for (int j = 0; j < kLanes; ++j) sum[j] = a[j], squares[j] = b[j];
  if (i == n) return;
  for (int j = 0; i < n; ++i, ++j) {
    const double d = double(x[i]) - double(k);
    sum[j] += d;
    squares[j] += d * d;
  }
}
// sum += g, product += g * (x - centre), likewise.
template <class A>
SPK_NOINLINE void add_products(double* __restrict__ sum, double* __restrict__ product, const A* __restrict__ g,
                               const A* __restrict__ x, const A* __restrict__ centre, int n) {
  for (int i = 0; i < n; ++i) {
    sum[i] += double(g[i]);
    product[i] += double(g[i] * (x[i] - centre[i]));
  }
}
template <class A>
SPK_NOINLINE void add_products_lanes(double* __restrict__ sum, double* __restrict__ product, const A* __restrict__ g,
                                     const A* __restrict__ x, A centre, int n) {
  double a[kLanes], b[kLanes];
  for (int j = 0; j < kLanes; ++j) a[j] = sum[j], b[j] = product[j];
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      a[j] += double(g[i + j]);
      b[j] += double(g[i + j] * (x[i + j] - centre));
    }
  }
  for (int j = 0; j < kLanes; ++j) sum[j] = a[j], product[j] = b[j];
  if (i == n) return;
  for (int j = 0; i < n; ++i, ++j) {
    sum[j] += double(g[i]);
    product[j] += double(g[i] * (x[i] - centre));
  }
}

// The sums of a unit's channels, `kinds` for each: in lanes (maps), or one for every place of a period.
struct Sums {
  const Unit& unit;
  const int kinds;
  const int64_t width;  // places
  Memory<double> places;

  Sums(const Unit& unit, int kinds)
      : unit(unit), kinds(kinds), width(unit.maps ? kMostChannels * kLanes : unit.row()), places(kinds * width) {
    if (places.data)
      for (int64_t i = 0; i < kinds * width; ++i) places.data[i] = 0;
  }
  double* of(int kind) const { return places.data + kind * width; }

  template <class A>
  void moments_of(const Tile& tile, const A* x, const A* k) const {
    if (!unit.maps) return add_moments(of(0) + tile.at, of(1) + tile.at, x, k + tile.at, tile.n);
    each_map(tile, [&](int64_t lanes, int j, int n) { add_moments_lanes(of(0) + lanes, of(1) + lanes, x + j, k[j], n); });
  }
  template <class A>
  void products_of(const Tile& tile, int kind, int product, const A* g, const A* x, const A* centre) const {
    if (!unit.maps) return add_products(of(kind) + tile.at, of(product) + tile.at, g, x, centre, tile.n);
    each_map(tile, [&](int64_t lanes, int j, int n) {
      add_products_lanes(of(kind) + lanes, of(product) + lanes, g + j, x + j, centre[j], n);
    });
  }
  template <class F>
  void each_map(const Tile& tile, const F& f) const {
    if (unit.count == 1) return f(0, 0, tile.n);
    for (int j = 0; j < tile.n; j += int(unit.s.inner)) f(j / unit.s.inner * kLanes, j, int(unit.s.inner));
  }
  // done(channel, [kinds] sums) for each channel of the unit.
  template <class Done>
  void finish(const Done& done) const {
    const int64_t inner = unit.s.inner, channels = unit.maps ? unit.count : unit.s.C;
    for (int64_t c = 0; c < channels; ++c) {
      double total[kBnSums + 1] = {};
      for (int k = 0; k < kinds; ++k) {
        if (unit.maps)
          for (int j = 0; j < kLanes; ++j) total[k] += of(k)[c * kLanes + j];
        else
          for (int64_t start = c * inner; start < width; start += unit.period)
            for (int64_t i = 0; i < inner; ++i) total[k] += of(k)[start + i];
      }
      done(unit.maps ? unit.first + c : c, total);
    }
  }
};

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
