// selective_scan_2d on the CPU; compiled once per instruction set (core/dispatch.h). Sixteen channels of a map are laid
// out place by place once; every direction then walks those lines of 64 bytes in its own order, so that walking
// columns costs what walking rows does.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/simd.h"
#include "selective_scan/lanes.h"
#include "selective_scan_2d/selective_scan_2d.h"

namespace spk {
namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))

constexpr int kLanes = 16;                  // channels side by side
constexpr int kStates = 4;                  // states that a walk carries at once
constexpr int kChunk = 64;                  // steps of such a walk, before the next states' walk
constexpr int kSum = 8;                     // terms that are added up in a row, over states; their sums then
constexpr int kFold = 4;                    // places whose parts in g_A are added up in float, before double
constexpr int kTile = 128;                  // places laid out at once
constexpr int kAhead = 64;                  // places to fetch ahead
constexpr int kPast = 3;                    // rows that whole packs may take past the last
constexpr int kHeldStates = 256;            // states per channel that backward recomputes at once: 16 KB, and as much of decays
constexpr int kGroup = kCpuGroup / kLanes;  // blocks of 16 channels in a group

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A piece of one scratch allocation after the other, each on a cache line of its own.
struct Arena {
  char* next;
  template <class A>
  A* take(int64_t n) {
    A* p = reinterpret_cast<A*>(next);
    next += bytes<A>(n);
    return p;
  }
  template <class A>
  static int64_t bytes(int64_t n) {
    return (n * int64_t(sizeof(A)) + 63) / 64 * 64;
  }
};

// Rows [rows, L] of a tensor (at most 16, then zeros) as [L][16]; on_tile(its rows, n) as soon as n more places are there.
template <class T, class A, class F>
inline __attribute__((always_inline)) void lay_out(A* dst, const T* src, int rows, int64_t L, F on_tile) {
  alignas(64) A tile[kLanes * kTile];
  if (rows < kLanes) memset(tile, 0, sizeof tile);
  for (int64_t l = 0; l < L; l += kTile) {
    const int n = int(L - l < kTile ? L - l : kTile), whole = n / kLanes * kLanes;
    const auto arrange = [&](const A* from, int64_t step, bool far) {
      for (int i = 0; i < whole; i += kLanes) {
        // 16 far apart rows: no hardware foresees them all.
        for (int r = 0; far && r < kLanes; ++r) __builtin_prefetch(from + r * step + i + kAhead, 0, 2);
        transpose16<A>([&](int j) { return dst + (l + i + j) * kLanes; }, [&](int r) { return from + r * step + i; });
      }
      for (int i = whole; i < n; ++i)
        for (int r = 0; r < kLanes; ++r) dst[(l + i) * kLanes + r] = from[r * step + i];
    };
    if constexpr (sizeof(T) == sizeof(A)) {
      if (rows == kLanes) {
        arrange(src + l, L, true);
        on_tile(dst + l * kLanes, n);
        continue;
      }
    }
    for (int r = 0; r < rows; ++r) load_row(tile + r * kTile, src + r * L + l, n);
    arrange(tile, kTile, false);
    on_tile(dst + l * kLanes, n);
  }
}
template <class T, class A>
SPK_NOINLINE void lay_out(A* dst, const T* src, int rows, int64_t L) {
  lay_out(dst, src, rows, L, [](A*, int) {});
}

// The sum of term(i) over i < n, by 16 partial sums whatever the width of a vector.
template <class F>
inline __attribute__((always_inline)) double sum_of(int64_t n, F term) {
  double part[kLanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) part[j] += term(i + j);
  for (int j = 0; i < n; ++i, ++j) part[j] += term(i);
  for (int j = 0; j < kLanes; ++j) sum += part[j];
  return sum;
}

// The reverse: [L][16] into rows [rows, L] of a tensor of so many bytes.
template <class T, class A>
SPK_NOINLINE void lay_back(T* dst, const A* src, int rows, int64_t L, int64_t bytes) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (rows == kLanes) {
      const int64_t whole = L / kLanes * kLanes;
      put_rows(dst, reinterpret_cast<const A(*)[kLanes]>(src), whole, L, bytes);
      for (int r = 0; r < kLanes; ++r)
        for (int64_t l = whole; l < L; ++l) dst[r * L + l] = src[l * kLanes + r];
      return;
    }
  }
  alignas(64) A tile[kLanes * kTile];
  for (int64_t l = 0; l < L; l += kTile) {
    const int n = int(L - l < kTile ? L - l : kTile);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
      transpose16<A>([&](int r) { return tile + r * kTile + i; }, [&](int j) { return src + (l + i + j) * kLanes; });
    for (; i < n; ++i)
      for (int r = 0; r < kLanes; ++r) tile[r * kTile + i] = src[(l + i) * kLanes + r];
    for (int r = 0; r < rows; ++r) store_row(dst + r * L + l, tile + r * kTile, n);
  }
}

// The gradient of delta, in place of that of the step sizes; sums it up to to_bias.
template <class A>
SPK_NOINLINE void step_sizes_back(A* g, const A* slope, bool positive, int64_t L, double* to_bias) {
  using F = Lanes<A>;
  A rows[kTile / kSum][kLanes];
  for (int64_t l = 0; l < L; l += kTile) {
    const int n = int(L - l < kTile ? L - l : kTile);
    F sum{};
    for (int i = 0; i < n; ++i) {
      A* const at = g + (l + i) * kLanes;
      F x = F::load(at);
      if (positive) {
        x = x * F::load(slope + (l + i) * kLanes);
        x.store(at);
      }
      sum = sum + x;
      if (i % kSum == kSum - 1 || i + 1 == n) sum.store(rows[i / kSum]), sum = F{};
    }
    add_rows(to_bias, rows, int(ceil_div(n, kSum)));
  }
}

// A row of the tensor as the kernels compute with it, all of it.
inline const float* whole(float*, const float* s, int64_t) { return s; }
inline const double* whole(double*, const double* s, int64_t) { return s; }
template <class T>
SPK_NOINLINE const float* whole(float* tmp, const T* s, int64_t n) {
  for (int64_t i = 0; i < n; i += 1 << 20) load_row(tmp + i, s + i, int(n - i < 1 << 20 ? n - i : 1 << 20));
  return tmp;
}

// The places in the order of a direction.
SPK_NOINLINE void places(int32_t* order, int code, int64_t H, int64_t W) {
  const int64_t L = H * W;
  for (int i = 0; i < kStates - 1; ++i) order[L + i] = 0;  // a walk looks ahead
  const bool back = code == 2 || code == 3 || code == 5;
  int32_t* p = back ? order + L - 1 : order;
  const int step = back ? -1 : 1;
  if (code == 0 || code == 2) {
    for (int64_t l = 0; l < L; ++l, p += step) *p = int32_t(l);
    return;
  }
  for (int64_t w = 0; w < W; ++w)
    for (int64_t h = 0; h < H; ++h, p += step) *p = int32_t(h * W + (code >= 4 ? W - 1 - w : w));
}

// Parameters of one direction of a block of channels.
template <class A>
struct Channels {
  alignas(64) A a[kMaxStates * kLanes], rate[kMaxStates * kLanes];  // [S][16]
  alignas(64) A bias[kLanes];
  A largest_rate, largest_step;

  bool bounded() const { return largest_rate * largest_step < kBound; }
  // What lay_out does to rows of delta; SLOPE: at the same places of `slope` is what gradients are multiplied with.
  template <bool SLOPE>
  auto to_steps(bool positive, const A* dt, A* slope) {
    largest_step = 0;
    return [=, this](A* rows, int n) {
      memset(rows + n * kLanes, 0, sizeof(A) * kPast * kLanes);  // to be laid out yet, or past the last
      A* const slopes = SLOPE ? slope + (rows - dt) : nullptr;
      const auto ahead = [](int) {};
      largest_step = largest(
          positive ? step_sizes<true, SLOPE>(rows, slopes, bias, n, ahead) : step_sizes<false, SLOPE>(rows, slopes, bias, n, ahead),
          largest_step);
    };
  }
  void read(const SelectiveScan2d& p, int k, int64_t first, int rows) {
    const int64_t at = k * p.C + first;
    largest_rate = 0;
    for (int i = 0; i < kLanes; ++i) {
      const bool live = i < rows;
      bias[i] = live && p.bias ? static_cast<const A*>(p.bias)[at + i] : A(0);
      for (int s = 0; s < p.S; ++s) {
        const A value = live ? static_cast<const A*>(p.A)[(at + i) * p.S + s] : A(0);
        a[s * kLanes + i] = value;
        rate[s * kLanes + i] = decay_rate(value);
        largest_rate = largest(abs_(decay_rate(value)), largest_rate);
      }
    }
  }
};

// D x of all directions at once: to[l] = x[l] times the sum of D over directions.
template <class A>
SPK_NOINLINE void skip(A* to, const A* x, const SelectiveScan2d& p, int64_t first, int rows) {
  alignas(64) A D[kLanes] = {};
  for (int k = 0; p.D && k < p.K; ++k)
    for (int i = 0; i < rows; ++i) D[i] += static_cast<const A*>(p.D)[k * p.C + first + i];
  for (int64_t l = 0; l < p.H * p.W; ++l)
    for (int i = 0; i < kLanes; ++i) to[l * kLanes + i] = x[l * kLanes + i] * D[i];
}

// All states through n steps, with OUT adding their parts to y's rows to(l).
template <bool OUT, bool BOUNDED, class A, class F, class G>
inline __attribute__((always_inline)) void walk_states(const A* x, const A* dt, const A* into, const A* out_of, A* y, int64_t L,
                                                       int S, int n, const A* rate, A* h, F place, G to) {
  const A *Bs[kStates], *Cs[kStates];
  int s = 0;
  const auto rows = [&](int count) {
    for (int r = 0; r < count; ++r) Bs[r] = into + (s + r) * L, Cs[r] = out_of + (s + r) * L;
  };
  for (; s + kStates <= S; s += kStates) {
    rows(kStates);
    walk<OUT ? Out::add : Out::none, BOUNDED, kStates>(h + s * kLanes, rate + s * kLanes, dt, x, y, static_cast<const A*>(nullptr),
                                                       Bs, Cs, n, place, to);
  }
  for (; s < S; ++s) {
    rows(1);
    walk<OUT ? Out::add : Out::none, BOUNDED, 1>(h + s * kLanes, rate + s * kLanes, dt, x, y, static_cast<const A*>(nullptr), Bs,
                                                 Cs, n, place, to);
  }
}

// n steps of one direction: with OUT adds C h to y. x, dt, y: [L][16]; into, out_of: [S, L]; h: [S][16].
template <bool OUT, bool BOUNDED, class A>
SPK_NOINLINE void walk_places(const A* x, const A* dt, const A* into, const A* out_of, A* y, const int32_t* order, int64_t L, int S,
                              int n, const A* rate, A* h) {
  const auto place = [&](int l) { return int64_t(order[l]); };
  if (OUT && S > kStates) {  // the states' sum first, so that y is not the sum of many small terms one after the other
    alignas(64) A part[kChunk * kLanes];
    memset(part, 0, sizeof(A) * n * kLanes);
    walk_states<true, BOUNDED>(x, dt, into, out_of, part, L, S, n, rate, h, place, [](int l) { return l; });
    for (int l = 0; l < n; ++l) {
      A* const sum = y + place(l) * kLanes;
      (Lanes<A>::load(sum) + Lanes<A>::load(part + l * kLanes)).store(sum);
    }
    return;
  }
  walk_states<OUT, BOUNDED>(x, dt, into, out_of, y, L, S, n, rate, h, place, place);
}

template <class T, class A>
int forward(const SelectiveScan2dFwd& q, int64_t begin, int64_t end) {
  const SelectiveScan2d& p = q.scan;
  const int64_t L = p.H * p.W, map = L * kLanes, blocks = ceil_div(p.C, kLanes), converted = sizeof(T) < sizeof(A) ? p.S * L : 0;
  char* scratch = static_cast<char*>(aligned_alloc(
      64, 3 * Arena::bytes<A>(map + kPast * kLanes) + 2 * Arena::bytes<A>(converted) + Arena::bytes<int32_t>(L + kStates)));
  if (!scratch) return kOutOfMemory;
  Arena arena{scratch};
  A *x = arena.take<A>(map), *dt = arena.take<A>(map + kPast * kLanes), *y = arena.take<A>(map);
  A *into_tmp = arena.take<A>(converted), *out_tmp = arena.take<A>(converted);
  int32_t* order = arena.take<int32_t>(L + kStates);
  Channels<A> channels;
  alignas(64) A h[kMaxStates * kLanes];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, first = task % blocks * kLanes;
    const int rows = int(p.C - first < kLanes ? p.C - first : kLanes);
    lay_out(x, static_cast<const T*>(p.x) + (b * p.C + first) * L, rows, L);
    skip(y, x, p, first, rows);
    for (int k = 0; k < p.K; ++k) {
      const int64_t bk = b * p.K + k;
      channels.read(p, k, first, rows);
      lay_out(dt, static_cast<const T*>(p.delta) + (bk * p.C + first) * L, rows, L,
              channels.template to_steps<false>(p.softplus, dt, nullptr));
      const A* into = whole(into_tmp, static_cast<const T*>(p.into) + bk * p.S * L, p.S * L);
      const A* out_of = whole(out_tmp, static_cast<const T*>(p.out_of) + bk * p.S * L, p.S * L);
      places(order, p.directions[k], p.H, p.W);
      memset(h, 0, sizeof(A) * p.S * kLanes);
      const auto run = channels.bounded() ? walk_places<true, true, A> : walk_places<true, false, A>;
      for (int64_t l = 0; l < L; l += kChunk)
        run(x, dt, into, out_of, y, order + l, L, p.S, int(L - l < kChunk ? L - l : kChunk), channels.rate, h);
    }
    lay_back(static_cast<T*>(q.y) + (b * p.C + first) * L, y, rows, L, p.B * p.C * L * int64_t(sizeof(T)));
  }
  stream_fence();
  free(scratch);
  return kOk;
}

// The states before every stretch of n places but the first: starts[stretch][S][16].
template <class A>
SPK_NOINLINE void leave_starts(const A* x, const A* dt, const A* into, const int32_t* order, int64_t L, int S, int n,
                               const Channels<A>& c, A* starts) {
  const int row = S * kLanes;
  const auto run = c.bounded() ? walk_places<false, true, A> : walk_places<false, false, A>;
  memset(starts, 0, sizeof(A) * row);
  for (int64_t l = 0; l + n < L; l += n, starts += row) {
    memcpy(starts + row, starts, sizeof(A) * row);
    run(x, dt, into, into, nullptr, order + l, L, S, n, c.rate, starts + row);
  }
}

// a = 2^a, for whole packs.
template <bool BOUNDED, class A>
SPK_NOINLINE void decay_all(A* a, int n) {
  for (int i = 0; i < n; i += kPack<A>) decays<BOUNDED>(Packed<A>::load(a + i)).store(a + i);
}

// The states [n + 1][S][16] and decays [n][S][16] of a stretch; h[0] is given. There is room for whole packs of decays.
template <class A>
SPK_NOINLINE void recompute(const A* x, const A* dt, const A* into, const int32_t* order, int64_t L, int S, int n,
                            const Channels<A>& c, A* h, A* a) {
  using F = Lanes<A>;
  const int row = S * kLanes;
  for (int j = 0; j < n; ++j) {
    const F t = F::load(dt + order[j] * int64_t(kLanes));
    for (int i = 0; i < row; i += kLanes) (t * F::load(c.rate + i)).store(a + j * row + i);
  }
  c.bounded() ? decay_all<true>(a, n * row) : decay_all<false>(a, n * row);
  for (int j = 0; j < n; ++j, h += row, a += row) {
    const int64_t p = order[j];
    const F tu = F::load(dt + p * kLanes) * F::load(x + p * kLanes);
    for (int s = 0; s < S; ++s)
      scan_step(F::load(h + s * kLanes), F::load(a + s * kLanes), tu * F::all(into[s * L + p])).store(h + row + s * kLanes);
  }
}

// What a walk back accumulates for its channels.
template <class A>
struct Sums {
  alignas(64) A g_h[kMaxStates * kLanes], g_A[kMaxStates * kLanes];  // g_A: of kFold places
  double total_A[kMaxStates * kLanes];
};

// Places of a stretch.
int most_places(int S) { return S < 4 ? 64 : S > 32 ? 8 : kHeldStates / S; }

// Back through a stretch. g_x is added to, dt becomes its gradient; h and a become each place's parts in g_C and g_B.
template <class A>
SPK_NOINLINE void walk_back(const A* x, A* dt, const A* g_y, A* g_x, const A* into, const A* out_of, const int32_t* order,
                            int64_t L, int S, int n, const Channels<A>& c, A* h, A* a, Sums<A>& sums) {
  using F = Lanes<A>;
  const int row = S * kLanes;
  for (int j = n - 1; j >= 0; --j) {
    const int64_t p = order[j];
    const F t = F::load(dt + p * kLanes), u = F::load(x + p * kLanes), g = F::load(g_y + p * kLanes), tu = t * u;
    F g_decays{}, g_steps{};
    A *before = h + j * row, *after = before + row, *decayed = a + j * row;
    for (int s0 = 0; s0 < S; s0 += kSum) {
      F decays_part{}, steps_part{};
      for (int s = s0; s < S && s < s0 + kSum; ++s) {
        const int i = s * kLanes;
        const F g_h = F::load(sums.g_h + i) + g * F::all(out_of[s * L + p]);
        const F g_decayed = g_h * F::load(decayed + i), through = g_decayed * F::load(before + i);
        decays_part = decays_part + F::load(c.a + i) * through;
        steps_part = steps_part + g_h * F::all(into[s * L + p]);
        (F::load(sums.g_A + i) + t * through).store(sums.g_A + i);
        (g * F::load(after + i)).store(after + i);
        (g_h * tu).store(decayed + i);
        g_decayed.store(sums.g_h + i);
      }
      g_decays = g_decays + decays_part;
      g_steps = g_steps + steps_part;
    }
    (g_decays + g_steps * u).store(dt + p * kLanes);
    (F::load(g_x + p * kLanes) + g_steps * t).store(g_x + p * kLanes);
    if (j % kFold == 0)
      for (int i = 0; i < row; ++i) sums.total_A[i] += double(sums.g_A[i]), sums.g_A[i] = 0;
  }
}

// to[s, order[j]] += the sum over lanes of parts[j][s]; parts has room for a multiple of 16 rows.
template <class A>
SPK_NOINLINE void add_up(A* to, const A* parts, const int32_t* order, int64_t L, int S, int n) {
  alignas(64) A sums[kLanes];
  for (int r = 0, j = 0, s = 0; r < n * S; r += kLanes) {
    sum16(sums, parts + r * kLanes);
    for (int i = 0; i < kLanes && r + i < n * S; ++i) {
      to[s * L + order[j]] += sums[i];
      if (++s == S) s = 0, ++j;
    }
  }
}

template <class T, class A>
int backward(const SelectiveScan2dBwd& q, int64_t begin, int64_t end) {
  const SelectiveScan2d& p = q.scan;
  const int64_t L = p.H * p.W, map = L * kLanes, blocks = ceil_div(p.C, kLanes), groups = ceil_div(p.C, kCpuGroup);
  const int64_t converted = sizeof(T) < sizeof(A) ? p.S * L : 0;
  const int64_t bytes = p.B * p.C * L * sizeof(T);
  const int S = p.S, row = S * kLanes, held = most_places(S), rows16 = (held * S + 15) / 16 * 16;  // and so whole packs
  char* scratch = static_cast<char*>(aligned_alloc(
      64, 5 * Arena::bytes<A>(map + kPast * kLanes) + 2 * Arena::bytes<A>(converted) + Arena::bytes<A>(ceil_div(L, held) * row) +
              Arena::bytes<A>(row + rows16 * kLanes) + Arena::bytes<A>(rows16 * kLanes) + Arena::bytes<int32_t>(L + kStates)));
  if (!scratch) return kOutOfMemory;
  Arena arena{scratch};
  A *x = arena.take<A>(map), *dt = arena.take<A>(map + kPast * kLanes), *slope = arena.take<A>(map + kPast * kLanes),
    *g_y = arena.take<A>(map), *g_x = arena.take<A>(map);
  A *into_tmp = arena.take<A>(converted), *out_tmp = arena.take<A>(converted), *starts = arena.take<A>(ceil_div(L, held) * row);
  A *h = arena.take<A>(row + rows16 * kLanes), *a = arena.take<A>(rows16 * kLanes);
  int32_t* order = arena.take<int32_t>(L + kStates);
  memset(h, 0, sizeof(A) * (row + rows16 * kLanes));  // rows past the last stretch's are summed, though not used
  memset(a, 0, sizeof(A) * rows16 * kLanes);
  Channels<A> channels;
  Sums<A> sums;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / groups, group = task % groups;
    memset(static_cast<A*>(q.g_into) + task * p.K * S * L, 0, sizeof(A) * p.K * S * L);
    memset(static_cast<A*>(q.g_out) + task * p.K * S * L, 0, sizeof(A) * p.K * S * L);
    for (int64_t block = group * kGroup; block < (group + 1) * kGroup && block < blocks; ++block) {
      const int64_t first = block * kLanes, at = (b * p.C + first) * L;
      const int rows = int(p.C - first < kLanes ? p.C - first : kLanes);
      lay_out(x, static_cast<const T*>(p.x) + at, rows, L);
      lay_out(g_y, static_cast<const T*>(q.g_y) + at, rows, L);
      skip(g_x, g_y, p, first, rows);
      double g_D[kLanes] = {};  // the same for every direction
      for (int r = 0; q.g_D && r < rows; ++r)
        g_D[r] = sum_of(L, [&](int64_t l) { return double(g_y[l * kLanes + r]) * double(x[l * kLanes + r]); });
      for (int k = 0; k < p.K; ++k) {
        const int64_t bk = b * p.K + k, bkc = bk * p.C + first;
        const T* delta = static_cast<const T*>(p.delta) + bkc * L;
        channels.read(p, k, first, rows);
        lay_out(dt, delta, rows, L, channels.template to_steps<true>(p.softplus, dt, slope));
        const A* into = whole(into_tmp, static_cast<const T*>(p.into) + bk * S * L, S * L);
        const A* out_of = whole(out_tmp, static_cast<const T*>(p.out_of) + bk * S * L, S * L);
        A* g_into = static_cast<A*>(q.g_into) + (task * p.K + k) * S * L;
        A* g_out = static_cast<A*>(q.g_out) + (task * p.K + k) * S * L;
        places(order, p.directions[k], p.H, p.W);
        leave_starts(x, dt, into, order, L, S, held, channels, starts);
        memset(&sums, 0, sizeof sums);
        for (int64_t stretch = ceil_div(L, held) - 1; stretch >= 0; --stretch) {
          const int32_t* here = order + stretch * held;
          const int n = int(L - stretch * held < held ? L - stretch * held : held);
          memcpy(h, starts + stretch * row, sizeof(A) * row);
          recompute(x, dt, into, here, L, S, n, channels, h, a);
          walk_back(x, dt, g_y, g_x, into, out_of, here, L, S, n, channels, h, a, sums);
          add_up(g_out, h + row, here, L, S, n);
          add_up(g_into, a, here, L, S, n);
        }
        double g_bias[kLanes] = {};
        step_sizes_back(dt, slope, p.softplus, L, g_bias);
        lay_back(static_cast<T*>(q.g_delta) + bkc * L, dt, rows, L, p.K * bytes);
        for (int r = 0; r < rows; ++r) {
          for (int s = 0; s < S; ++s) static_cast<A*>(q.g_A)[(bkc + r) * S + s] = A(sums.total_A[s * kLanes + r]);
          if (q.g_bias) static_cast<A*>(q.g_bias)[bkc + r] = A(g_bias[r]);
          if (q.g_D) static_cast<A*>(q.g_D)[bkc + r] = A(g_D[r]);
        }
      }
      lay_back(static_cast<T*>(q.g_x) + at, g_x, rows, L, bytes);
    }
  }
  stream_fence();
  free(scratch);
  return kOk;
}

}  // namespace

int selective_scan_2d_fwd(const SelectiveScan2dFwd& p, int64_t begin, int64_t end) {
  switch (p.scan.dtype) {
    case DType::f32: return forward<float, float>(p, begin, end);
    case DType::bf16: return forward<bf16, float>(p, begin, end);
    case DType::f16: return forward<f16, float>(p, begin, end);
    default: return forward<double, double>(p, begin, end);
  }
}

int selective_scan_2d_bwd(const SelectiveScan2dBwd& p, int64_t begin, int64_t end) {
  switch (p.scan.dtype) {
    case DType::f32: return backward<float, float>(p, begin, end);
    case DType::bf16: return backward<bf16, float>(p, begin, end);
    case DType::f16: return backward<f16, float>(p, begin, end);
    default: return backward<double, double>(p, begin, end);
  }
}

}  // namespace SPK_ISA

#ifdef SPK_DISPATCH
SelectiveScan2dFwdFn* selective_scan_2d_fwd_cpu() {
  static SelectiveScan2dFwdFn* const f = SPK_PICK(selective_scan_2d_fwd);
  return f;
}
SelectiveScan2dBwdFn* selective_scan_2d_bwd_cpu() {
  static SelectiveScan2dBwdFn* const f = SPK_PICK(selective_scan_2d_bwd);
  return f;
}
#endif

}  // namespace spk
