// Sums over a unit's numbers for mean and variance. Blocks of numbers are summed in the state type about a centre of their
// own, which lies among them, and then in double about the channel's k: in one pass, and with little to cancel wherever the
// mean lies and whatever outliers there are.
#pragma once
#include "bn_lif/units.h"
#include "core/lanes.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int kMomentLanes = 16;  // partial sums of a map: their number, not the vector width, fixes the order
constexpr int kMomentRows = 32;   // rows of a block of periods
constexpr int kCentreOf = 8;      // numbers whose mean is the centre of a map's block

template <class A>
constexpr int kMomentColumns = 4 * Vector<A>::W;  // as many as keep their sums in registers

// From sums of d = x - centre and of d * d, over n numbers, to those of x - k.
inline void move_centre(double sum, double squares, double shift, double n, double* to_sum, double* to_squares) {
  *to_sum += sum + n * shift;
  *to_squares += squares + shift * (2 * sum + n * shift);
}

// A block of a map's rows.
template <class A>
struct MapBlock {
  alignas(64) A sum[kMomentLanes], squares[kMomentLanes];
  A centre;
  int64_t n;

  void begin(const A* x, int count) {
    const int of = count < kCentreOf ? count : kCentreOf;
    A total[kCentreOf];
    for (int i = 0; i < kCentreOf; ++i) total[i] = i < of ? x[i] : A(0);
    for (int step = kCentreOf / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) total[i] += total[i + step];
    centre = total[0] / A(of);
    for (int j = 0; j < kMomentLanes; ++j) sum[j] = squares[j] = 0;
    n = 0;
  }
  // ahead: what will be added later is on its way meanwhile.
  void add(const A* x, const A* ahead, int count) {
    using P = Pack<typename Vector<A>::type, kMomentLanes / Vector<A>::W>;
    const P c = P::all(centre);
    P s = P::load(sum), q = P::load(squares);
    int i = 0;
    for (; i + kMomentLanes <= count; i += kMomentLanes) {
      for (int line = 0; line < kMomentLanes; line += kLine / int(sizeof(A))) __builtin_prefetch(ahead + i + line);
      const P d = P::load(x + i) - c;
      s = s + d;
      q = q + d * d;
    }
    s.store(sum);
    q.store(squares);
    for (int j = 0; i < count; ++i, ++j) {
      const A d = x[i] - centre;
      sum[j] += d;
      squares[j] += d * d;
    }
    n += count;
  }
  void end(A k, double* total) const {
    double s[kMomentLanes], q[kMomentLanes];
    for (int j = 0; j < kMomentLanes; ++j) s[j] = double(sum[j]), q[j] = double(squares[j]);
    for (int step = kMomentLanes / 2; step > 0; step /= 2)
      for (int j = 0; j < step; ++j) s[j] += s[j + step], q[j] += q[j + step];
    move_centre(s[0], q[0], double(centre) - double(k), double(n), total, total + 1);
  }
};

// done(channel, [2] sums) for each channel of a unit of maps; k: the channels' own.
template <class T, class A, class Done>
bool map_moments(const Unit& unit, const T* x, int64_t x_step, int64_t T_, const A* k, const Done& done) {
  const int channels = int(unit.count), inner = int(channels == 1 ? kBnTile : unit.s.inner), rows = kBnTile / inner;
  const Memory<MapBlock<A>> blocks(channels);
  if (!blocks.data) return false;
  alignas(64) A tmp[kBnTile + 16];
  double total[kMostChannels][2] = {};
  const int64_t all = unit.tiles * T_;
  const auto at = [&](int64_t row) { return x + row % T_ * x_step + unit[row / T_].first; };
  const T* next = at(0);
  for (int64_t row = 0; row < all; ++row) {
    const T* const here = next;
    const int n = unit[row / T_].n, each = channels == 1 ? n : inner;
    if (row + 1 < all) next = at(row + 1);
    const A* const numbers = state_row(tmp, here, n);
    const A* const ahead = sizeof(T) == sizeof(A) ? reinterpret_cast<const A*>(next) : numbers;
    for (int c = 0; c < channels; ++c) {
      MapBlock<A>& block = blocks.data[c];
      if (row % rows == 0) block.begin(numbers + c * inner, each);
      block.add(numbers + c * inner, ahead + c * inner, each);
      if (row % rows == rows - 1 || row + 1 == all) block.end(k[c], total[c]);
    }
  }
  for (int c = 0; c < channels; ++c) done(unit.first + c, total[c]);
  return true;
}

// n <= kMomentColumns columns of some rows, into the columns' sums. ahead: from a row to one that comes later.
template <class A>
SPK_NOINLINE void add_columns(const A* const* x, int64_t ahead, int rows, int n, const A* k, double* __restrict__ sum,
                              double* __restrict__ squares) {
  constexpr int kMost = kMomentColumns<A>;
  alignas(64) A c[kMost], s[kMost], q[kMost];
  if (rows < 4)
    for (int j = 0; j < n; ++j) c[j] = x[0][j];
  else
    for (int j = 0; j < n; ++j) c[j] = ((x[0][j] + x[1][j]) + (x[2][j] + x[3][j])) * A(0.25);
  if (n == kMost) {
    using P = Pack<typename Vector<A>::type, 4>;
    const P centre = P::load(c);
    P a = P::all(A(0)), b = a;
    for (int r = 0; r < rows; ++r) {
      for (int line = 0; line < kMost; line += kLine / int(sizeof(A))) __builtin_prefetch(x[r] + ahead + line);
      const P d = P::load(x[r]) - centre;
      a = a + d;
      b = b + d * d;
    }
    a.store(s);
    b.store(q);
  } else {
    for (int j = 0; j < n; ++j) s[j] = q[j] = 0;
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < n; ++j) {
        const A d = x[r][j] - c[j];
        s[j] += d;
        q[j] += d * d;
      }
    }
  }
  for (int j = 0; j < n; ++j) move_centre(double(s[j]), double(q[j]), double(c[j]) - double(k[j]), rows, sum + j, squares + j);
}

// A unit of periods, as rows of `width` places, whole periods, of all time steps; k: those of a row, sums: the row's.
template <class T, class A>
void period_moments(const Unit& unit, const T* x, int64_t x_step, int64_t T_, const A* k, const Sums& sums) {
  constexpr int kMost = kMomentColumns<A>;
  alignas(64) A tmp[kMomentRows][kMost];
  const int64_t length = unit.count * unit.period, width = unit.row();
  const T* row[kMomentRows];
  const A* numbers[kMomentRows];
  const auto add = [&](int rows, int64_t wide) {
    for (int64_t j = 0; rows > 0 && j < wide; j += kMost) {
      const int n = int(wide - j < kMost ? wide - j : kMost);
      for (int r = 0; r < rows; ++r) numbers[r] = state_row(tmp[r], row[r] + j, n);
      add_columns(numbers, sizeof(T) == sizeof(A) ? rows * width : 0, rows, n, k + j, sums.of(0) + j, sums.of(1) + j);
    }
  };
  int rows = 0;
  for (int64_t t = 0; t < T_; ++t) {
    const T* const from = x + t * x_step + unit.first * unit.period;
    for (int64_t start = 0; start + width <= length; start += width) {
      row[rows++] = from + start;
      if (rows == kMomentRows) add(rows, width), rows = 0;
    }
  }
  add(rows, width);
  if (length % width == 0) return;
  rows = 0;
  for (int64_t t = 0; t < T_; ++t) {  // the last rows, not whole
    row[rows++] = x + t * x_step + unit.first * unit.period + length / width * width;
    if (rows == kMomentRows || t + 1 == T_) add(rows, length % width), rows = 0;
  }
}

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
