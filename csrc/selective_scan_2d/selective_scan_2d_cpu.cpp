// selective_scan_2d on the CPU; compiled once per instruction set (core/dispatch.h). Sixteen channels of a map are laid
// out place by place once (lanes.h); every direction then walks those lines of 64 bytes in its own order, so that walking
// columns costs what walking rows does.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "selective_scan_2d/lanes.h"
#include "selective_scan_2d/selective_scan_2d.h"

namespace spk {
namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))

constexpr int kSum = 8;                     // terms that are added up in a row, over states; their sums then
constexpr int kFold = 4;                    // places whose parts in g_A are added up in float, before double
constexpr int kTile = 128;                  // places laid out at once
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

// Rows [rows, L] of a tensor (at most 16, then zeros) as [L][16]. `on_row(piece of a row, row, n)` may change it first.
template <class T, class A, class F>
inline __attribute__((always_inline)) void lay_out(A* dst, const T* src, int rows, int64_t L, F on_row) {
  alignas(64) A tile[kLanes * kTile];
  if (rows < kLanes) memset(tile, 0, sizeof tile);
  for (int64_t l = 0; l < L; l += kTile) {
    const int n = int(L - l < kTile ? L - l : kTile);
    for (int r = 0; r < rows; ++r) {
      load_row(tile + r * kTile, src + r * L + l, n);
      on_row(tile + r * kTile, r, n);
    }
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) turn16(dst + (l + i) * kLanes, kLanes, tile + i, kTile);
    for (; i < n; ++i)
      for (int r = 0; r < kLanes; ++r) dst[(l + i) * kLanes + r] = tile[r * kTile + i];
  }
}
template <class T, class A>
SPK_NOINLINE void lay_out(A* dst, const T* src, int rows, int64_t L) {
  lay_out(dst, src, rows, L, [](A*, int, int) {});
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

// The reverse: [L][16] into rows [rows, L]. `on_row(tile row, channel, first place, n)` may change a row before it is stored.
template <class T, class A, class F>
inline __attribute__((always_inline)) void lay_back(T* dst, const A* src, int rows, int64_t L, F on_row) {
  alignas(64) A tile[kLanes * kTile];
  for (int64_t l = 0; l < L; l += kTile) {
    const int n = int(L - l < kTile ? L - l : kTile);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) turn16(tile + i, kTile, src + (l + i) * kLanes, kLanes);
    for (; i < n; ++i)
      for (int r = 0; r < kLanes; ++r) tile[r * kTile + i] = src[(l + i) * kLanes + r];
    for (int r = 0; r < rows; ++r) {
      on_row(tile + r * kTile, r, l, n);
      store_row(dst + r * L + l, tile + r * kTile, n);
    }
  }
}
template <class T, class A>
SPK_NOINLINE void lay_back(T* dst, const A* src, int rows, int64_t L) {
  lay_back(dst, src, rows, L, [](A*, int, int64_t, int) {});
}

// Step sizes from delta, in place.
template <class A>
SPK_NOINLINE void step_sizes(A* dt, A bias, bool positive, int n) {
  if (positive)
    for (int i = 0; i < n; ++i) dt[i] = softplus(dt[i] + bias);
  else
    for (int i = 0; i < n; ++i) dt[i] = dt[i] + bias;
}

// One row of g_delta from the gradients of the step sizes; returns its sum.
template <class A>
SPK_NOINLINE double step_sizes_back(A* g, const A* delta, A bias, bool positive, int n) {
  if (positive)
    for (int i = 0; i < n; ++i) g[i] = g[i] * softplus_slope(delta[i] + bias);
  return sum_of(n, [&](int i) { return double(g[i]); });
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

  void read(const SelectiveScan2d& p, int k, int64_t first, int rows) {
    const int64_t at = k * p.C + first;
    for (int i = 0; i < kLanes; ++i) {
      const bool live = i < rows;
      bias[i] = live && p.bias ? static_cast<const A*>(p.bias)[at + i] : A(0);
      for (int s = 0; s < p.S; ++s) {
        const A value = live ? static_cast<const A*>(p.A)[(at + i) * p.S + s] : A(0);
        a[s * kLanes + i] = value;
        rate[s * kLanes + i] = decay_rate(value);
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

// One direction: adds C h to y. x, dt, y: [L][16]; into, out_of: [S, L]; h: [S][16], zero at first.
template <bool ONE, class A>
SPK_NOINLINE void walk(const A* x, const A* dt, const A* into, const A* out_of, A* y, const int32_t* order, int64_t L, int S,
                       const Channels<A>& c, A* h) {
  using F = Lanes<A>;
  const F rate = F::load(c.rate);
  F state = F::all(0);
  for (int64_t l = 0; l < L; ++l) {
    const int64_t p = order[l];
    const F t = F::load(dt + p * kLanes), tu = t * F::load(x + p * kLanes);
    if (ONE) {
      state = scan_step(state, decays(t, rate), tu * F::all(into[p]));
      (F::load(y + p * kLanes) + state * F::all(out_of[p])).store(y + p * kLanes);
    } else {
      F sum = F::all(0);
      for (int s0 = 0; s0 < S; s0 += kSum) {
        F part = F::all(0);
        for (int s = s0; s < S && s < s0 + kSum; ++s) {
          const F a = decays(t, F::load(c.rate + s * kLanes));
          const F next = scan_step(F::load(h + s * kLanes), a, tu * F::all(into[s * L + p]));
          next.store(h + s * kLanes);
          part = part + next * F::all(out_of[s * L + p]);
        }
        sum = sum + part;
      }
      (F::load(y + p * kLanes) + sum).store(y + p * kLanes);
    }
  }
}

template <class T, class A>
int forward(const SelectiveScan2dFwd& q, int64_t begin, int64_t end) {
  const SelectiveScan2d& p = q.scan;
  const int64_t L = p.H * p.W, map = L * kLanes, blocks = ceil_div(p.C, kLanes), converted = sizeof(T) < sizeof(A) ? p.S * L : 0;
  char* scratch =
      static_cast<char*>(aligned_alloc(64, 3 * Arena::bytes<A>(map) + 2 * Arena::bytes<A>(converted) + Arena::bytes<int32_t>(L)));
  if (!scratch) return kOutOfMemory;
  Arena arena{scratch};
  A *x = arena.take<A>(map), *dt = arena.take<A>(map), *y = arena.take<A>(map);
  A *into_tmp = arena.take<A>(converted), *out_tmp = arena.take<A>(converted);
  int32_t* order = arena.take<int32_t>(L);
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
              [&](A* row, int r, int n) { step_sizes(row, channels.bias[r], p.softplus, n); });
      const A* into = whole(into_tmp, static_cast<const T*>(p.into) + bk * p.S * L, p.S * L);
      const A* out_of = whole(out_tmp, static_cast<const T*>(p.out_of) + bk * p.S * L, p.S * L);
      places(order, p.directions[k], p.H, p.W);
      memset(h, 0, sizeof(A) * p.S * kLanes);
      const auto run = p.S == 1 ? walk<true, A> : walk<false, A>;
      run(x, dt, into, out_of, y, order, L, p.S, channels, h);
    }
    lay_back(static_cast<T*>(q.y) + (b * p.C + first) * L, y, rows, L);
  }
  free(scratch);
  return kOk;
}

// The states before every stretch of n places but the first: starts[stretch][S][16].
template <class A>
SPK_NOINLINE void leave_starts(const A* x, const A* dt, const A* into, const int32_t* order, int64_t L, int S, int n,
                               const Channels<A>& c, A* starts) {
  using F = Lanes<A>;
  memset(starts, 0, sizeof(A) * S * kLanes);
  const int64_t stretches = ceil_div(L, n);
  for (int64_t stretch = 0; stretch + 1 < stretches; ++stretch, starts += S * kLanes) {
    A* h = starts + S * kLanes;
    memcpy(h, starts, sizeof(A) * S * kLanes);
    for (int64_t l = stretch * n; l < (stretch + 1) * n; ++l) {
      const int64_t p = order[l];
      const F t = F::load(dt + p * kLanes), tu = t * F::load(x + p * kLanes);
      for (int s = 0; s < S; ++s) {
        const F a = decays(t, F::load(c.rate + s * kLanes));
        scan_step(F::load(h + s * kLanes), a, tu * F::all(into[s * L + p])).store(h + s * kLanes);
      }
    }
  }
}

// The states [n + 1][S][16] and decays [n][S][16] of a stretch; h[0] is given.
template <class A>
SPK_NOINLINE void recompute(const A* x, const A* dt, const A* into, const int32_t* order, int64_t L, int S, int n,
                            const Channels<A>& c, A* h, A* a) {
  using F = Lanes<A>;
  const int row = S * kLanes;
  for (int j = 0; j < n; ++j, h += row, a += row) {
    const int64_t p = order[j];
    const F t = F::load(dt + p * kLanes), tu = t * F::load(x + p * kLanes);
    for (int s = 0; s < S; ++s) {
      const F decayed = decays(t, F::load(c.rate + s * kLanes));
      decayed.store(a + s * kLanes);
      scan_step(F::load(h + s * kLanes), decayed, tu * F::all(into[s * L + p])).store(h + row + s * kLanes);
    }
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
    F g_decays = F::all(0), g_steps = F::all(0);
    A *before = h + j * row, *after = before + row, *decayed = a + j * row;
    for (int s0 = 0; s0 < S; s0 += kSum) {
      F decays_part = F::all(0), steps_part = F::all(0);
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
    sum_lanes(sums, parts + r * kLanes);
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
  const int S = p.S, row = S * kLanes, held = most_places(S), rows16 = (held * S + 15) / 16 * 16;
  char* scratch = static_cast<char*>(
      aligned_alloc(64, 4 * Arena::bytes<A>(map) + 2 * Arena::bytes<A>(converted) + Arena::bytes<A>(ceil_div(L, held) * row) +
                            Arena::bytes<A>(row + rows16 * kLanes) + Arena::bytes<A>(rows16 * kLanes) + Arena::bytes<int32_t>(L)));
  if (!scratch) return kOutOfMemory;
  Arena arena{scratch};
  A *x = arena.take<A>(map), *dt = arena.take<A>(map), *g_y = arena.take<A>(map), *g_x = arena.take<A>(map);
  A *into_tmp = arena.take<A>(converted), *out_tmp = arena.take<A>(converted), *starts = arena.take<A>(ceil_div(L, held) * row);
  A *h = arena.take<A>(row + rows16 * kLanes), *a = arena.take<A>(rows16 * kLanes);
  int32_t* order = arena.take<int32_t>(L);
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
        lay_out(dt, delta, rows, L, [&](A* piece, int r, int n) { step_sizes(piece, channels.bias[r], p.softplus, n); });
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
        alignas(64) A delta_tmp[kTile];
        lay_back(static_cast<T*>(q.g_delta) + bkc * L, dt, rows, L, [&](A* tile, int r, int64_t l, int n) {
          g_bias[r] += step_sizes_back(tile, state_row(delta_tmp, delta + r * L + l, n), channels.bias[r], p.softplus, n);
        });
        for (int r = 0; r < rows; ++r) {
          for (int s = 0; s < S; ++s) static_cast<A*>(q.g_A)[(bkc + r) * S + s] = A(sums.total_A[s * kLanes + r]);
          if (q.g_bias) static_cast<A*>(q.g_bias)[bkc + r] = A(g_bias[r]);
          if (q.g_D) static_cast<A*>(q.g_D)[bkc + r] = A(g_D[r]);
        }
      }
      lay_back(static_cast<T*>(q.g_x) + at, g_x, rows, L);
    }
  }
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
