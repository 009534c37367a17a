// lif on the CPU; compiled once per instruction set (core/dispatch.h). A chunk of neurons goes through all time steps
// with its potentials in L1; inner loops run over the neurons of a row and are written for the vectoriser.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/simd.h"
#include "core/surrogate.h"
#include "lif/lif.h"
#include "lif/neuron.h"
#include "lif/rows.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int64_t kStreamBytes = 8 << 20;  // output sequences from this size on bypass the caches
constexpr int kTile = 1024;                // neurons of a chunk whose rows lie in L1 at once
constexpr int kStreamTile = 32;            // neurons between two bursts of streamed stores: loads go on meanwhile
constexpr int kBackStreamTile = 128;       // the same in backward, whose loop is longer
constexpr int kUnroll = kLifUnroll;
constexpr int kSegment = 16;  // time steps whose potentials backward holds at once

// Lengths of a row of working space: a little over a tile or chunk, to keep the rows out of each other's cache sets.
constexpr int kTileRow = kTile + 16;
constexpr int kRow = kLifChunk + 16;

// decay or gain written out for the neurons [first, first + n): one form for numbers, scalars and channels.
template <class A>
void expand(A* out, const void* per_channel, double number, const LifNeuron& p, int64_t first, int n) {
  const A* values = static_cast<const A*>(per_channel);
  int64_t c = (first / p.inner) % p.C, left = p.inner - first % p.inner;
  for (int i = 0; i < n;) {
    const A value = values ? values[c] : A(number);
    const int end = left < n - i ? i + int(left) : n;
    for (; i < end; ++i) out[i] = value;
    left = p.inner;
    c = c + 1 == p.C ? 0 : c + 1;
  }
}

// How much a row v, written (and read, unless it lasts one block from rest), is in the way of the rows of x and s that are
// walked so: 0 to kNearest.
template <class T>
int hindrance(const void* v, const LifFwd& p, bool down) {
  const int sign = down ? -1 : 1;
  const bool is_read = p.v_init || p.T > kUnroll;
  int most = 0;
  for (int r = 0; r < kUnroll; ++r) {
    const int of_x = sign * direction(static_cast<const T*>(p.x) + r * p.x_step, v);
    const int of_s = is_read ? sign * direction(v, static_cast<const T*>(p.s) + r * p.N) : 0;
    most = of_x > most ? of_x : most;
    most = of_s > most ? of_s : most;
  }
  return most;
}

// R time steps of a row at once: the potentials pass through registers from `from` to `to` (which may be the same row).
// ONE: decay and gain are those of the first neuron for all. Null s or h: not wanted. down: see `direction`.
template <bool HARD, bool AT_ZERO, bool ONE, bool S, bool H, int R, class A>
SPK_NOINLINE void steps(const A* const* x, const A* from, A* to, A* const* s, A* const* h, const A* decay, const A* gain,
                        const Neuron<A> c, int n, bool down) {
  const A* xr[R];
  A *sr[R], *hr[R];
  for (int r = 0; r < R; ++r) {
    xr[r] = x[r];
    if (S) sr[r] = s[r];
    if (H) hr[r] = h[r];
  }
  const A d0 = decay[0], g0 = gain[0];
  const int64_t away = down ? -kFetch : kFetch;
  by_lines<A>(
      n, down,
      [&](int64_t first, int lane, auto) {
        const int64_t i = first + lane;
        A vi = from[i], xi[R];
        const A di = ONE ? d0 : decay[i], gi = ONE ? g0 : gain[i];
        // Loads before stores: rows a multiple of 4 KB apart look like the same address to the store buffer.
        for (int r = 0; r < R; ++r) xi[r] = xr[r][i];
        for (int r = 0; r < R; ++r) {
          const A hi = charge(vi, xi[r], di, gi, AT_ZERO ? A(0) : c.rest);
          if (H) hr[r][i] = hi;
          if (S) sr[r][i] = hi >= c.fire_at ? A(1) : A(0);
          vi = reset(hi, HARD, c);
        }
        to[i] = vi;
      },
      // The processor's own prefetchers see too many rows at once to follow each.
      [&](int64_t i) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char*>(xr[r] + i) + away);
      });
}

template <class A>
SPK_NOINLINE void pack_row(uint8_t* __restrict__ bits, const A* __restrict__ s, int bit, int n) {
  const uint8_t one = uint8_t(1u << bit);
  if (bit == 0)
    for (int i = 0; i < n; ++i) bits[i] = s[i] != 0 ? one : 0;
  else
    for (int i = 0; i < n; ++i) bits[i] |= s[i] != 0 ? one : 0;
}

// Back through kUnroll time steps at once, h recomputed from the potentials `start`: nothing but x, g_s and g_x is moved.
// The gradient of the last v comes in as g_to and that of `start` goes out as g_from, which may be the same row.
template <bool HARD, bool AT_ZERO, bool DETACH, Surrogate K, class A>
SPK_NOINLINE void steps_back(const A* const* x, RowOrLine<const A> start, const A* const* g_s, RowOrLine<const A> g_to,
                             RowOrLine<A> g_from, A* const* g_x, RowOrLine<const A> decay, RowOrLine<const A> gain,
                             const Neuron<A> neuron, A a, A b, int n, bool down) {
  // A rest at 0 is known before the loop: asked for each element, it costs the loop half its time.
  const Neuron<A> c = {AT_ZERO ? A(0) : neuron.rest, neuron.fire_at, neuron.threshold, neuron.reset_by};
  const A *xr[kUnroll], *gs[kUnroll];
  A* gx[kUnroll];
  for (int r = 0; r < kUnroll; ++r) {
    xr[r] = x[r];
    gs[r] = g_s[r];
    gx[r] = g_x[r];
  }
  by_lines<A, 2>(
      n, down,
      [&](int64_t first, int lane, auto lines) __attribute__((always_inline)) {
        constexpr int W = decltype(lines)::value, kStep = kLine / int(sizeof(A));
        // Its loops are unrolled: rolled, those of a long surrogate would keep the one around them from being vectorised.
        A v[W], g[W], di[W], ga[W], h[kUnroll][W], sg[kUnroll][W], gi[kUnroll][W];
        for (int w = 0; w < W; ++w) {
          const int64_t l = first + w * kStep;
          v[w] = start.line(l)[lane], g[w] = g_to.line(l)[lane], di[w] = decay.line(l)[lane], ga[w] = gain.line(l)[lane];
          for (int r = 0; r < kUnroll; ++r) h[r][w] = xr[r][l + lane], gi[r][w] = gs[r][l + lane];
        }
#pragma GCC unroll 4
        for (int r = 0; r < kUnroll; ++r)
#pragma GCC unroll 2
          for (int w = 0; w < W; ++w) {
            h[r][w] = charge(v[w], h[r][w], di[w], ga[w], c.rest);
            v[w] = reset(h[r][w], HARD, c);
            // Here, not on the way back: there it would lie on the chain of dependent operations.
            sg[r][w] = surrogate<K, A>(h[r][w] - c.threshold, a, b);
          }
        for (int r = kUnroll - 1; r >= 0; --r)
          for (int w = 0; w < W; ++w) {
            const A gh = step_backward<false>(h[r][w], gi[r][w], g[w], A(0), sg[r][w], HARD, DETACH, c);
            gi[r][w] = ga[w] * gh;
            g[w] = di[w] * gh;
          }
        for (int w = 0; w < W; ++w) {
          const int64_t l = first + w * kStep;
          for (int r = 0; r < kUnroll; ++r) gx[r][l + lane] = gi[r][w];
          g_from.line(l)[lane] = g[w];
        }
      },
      [](int64_t) {});
}

// One step back from a row of h. g_v comes in as the gradient of v[t] and goes out as that of v[t-1]; g is left holding
// that of h[t].
template <bool HARD, bool DETACH, Surrogate K, class A>
SPK_NOINLINE void step_back(const A* h, const A* g_s, const A* g_h, A* g_v, A* g, A* g_x, const A* decay, const A* gain,
                            const Neuron<A> c, A a, A b, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const A sg = surrogate<K, A>(h[i] - c.threshold, a, b);
    const A gi = step_backward(h[i], g_s[i], g_v[i], g_h[i], sg, HARD, DETACH, c);
    g[i] = gi;
    g_x[i] = gain[i] * gi;
    g_v[i] = decay[i] * gi;
  }
}

template <class A>
void add_product(A* __restrict__ d, const A* __restrict__ x, const A* __restrict__ y, A minus, int n) {
  for (int i = 0; i < n; ++i) d[i] += x[i] * (y[i] - minus);
}

// Back through kUnroll steps, and through one from its row of h.
template <class A>
struct LifBack {
  void (*steps)(const A* const* x, RowOrLine<const A> start, const A* const* g_s, RowOrLine<const A> g_to, RowOrLine<A> g_from,
                A* const* g_x, RowOrLine<const A> decay, RowOrLine<const A> gain, Neuron<A> c, A a, A b, int n, bool down);
  LifStepBack<A>* step;
};

template <bool HARD, bool AT_ZERO, bool DETACH, class A>
LifBack<A> back_of(int kind) {
#define SPK_BACK(K)                                                                              \
  {                                                                                              \
    steps_back<HARD, AT_ZERO, DETACH, Surrogate::K, A>, step_back<HARD, DETACH, Surrogate::K, A> \
  }
  switch (static_cast<Surrogate>(kind)) {
    case Surrogate::atan: return SPK_BACK(atan);
    case Surrogate::sigmoid: return SPK_BACK(sigmoid);
    case Surrogate::rectangle: return SPK_BACK(rectangle);
    case Surrogate::triangle: return SPK_BACK(triangle);
    case Surrogate::fast_sigmoid: return SPK_BACK(fast_sigmoid);
    case Surrogate::erf: return SPK_BACK(erf);
    default: return SPK_BACK(leaky_relu);
  }
#undef SPK_BACK
}
template <bool HARD, bool AT_ZERO, class A>
LifBack<A> back_of(bool detach, int kind) {
  return detach ? back_of<HARD, AT_ZERO, true, A>(kind) : back_of<HARD, AT_ZERO, false, A>(kind);
}
template <class A>
LifBack<A> back_of(bool hard, bool at_zero, bool detach, int kind) {
  if (!hard) return back_of<false, true, A>(detach, kind);  // soft reset rests at 0
  return at_zero ? back_of<true, true, A>(detach, kind) : back_of<true, false, A>(detach, kind);
}

template <class A>
using LifForth = void(const A* const* x, const A* from, A* to, A* const* s, A* const* h, const A* decay, const A* gain, Neuron<A> c,
                      int n, bool down);

template <bool S, bool H, int R, class A>
LifForth<A>* forth_of(const LifNeuron& p) {
  if (!p.hard) return steps<false, true, false, S, H, R, A>;  // soft reset rests at 0
  if (p.rest != 0) return steps<true, false, false, S, H, R, A>;
  return p.C == 1 ? steps<true, true, true, S, H, R, A> : steps<true, true, false, S, H, R, A>;
}

// What a chunk of neurons carries through time, and how it advances.
template <class T, class A>
struct Walk {
  alignas(64) A decay[kRow], gain[kRow], x_tmp[kUnroll][kTileRow];
  const Neuron<A> c;
  const LifNeuron& p;
  const T* x;
  int64_t first, x_step;
  int n;

  Walk(const LifNeuron& neuron, const void* x, int64_t x_step)
      : c(constants<A>(neuron)), p(neuron), x(static_cast<const T*>(x)), first(0), x_step(x_step), n(0) {
    if (p.C == 1) expand_parameters(kLifChunk);
  }
  void expand_parameters(int count) {
    expand(decay, p.decay_c, p.decay, p, first, count);
    expand(gain, p.gain_c, p.gain, p, first, count);
  }
  void at(int64_t chunk, int64_t N) {
    first = chunk * kLifChunk;
    n = int(N - first < kLifChunk ? N - first : kLifChunk);
    if (p.C > 1) expand_parameters(n);
  }
  const A* x_row(int r, int64_t t, int j, int m) { return state_row(x_tmp[r], x + t * x_step + first + j, m); }

  // R time steps of the chunk's m neurons from j on, from the potentials `from` to `to`; x, s and h are the rows of those
  // neurons.
  template <bool S, bool H, int R>
  void advance(const A* const* x, const A* from, A* to, A* const* s, A* const* h, int j, int m, bool down = false) {
    forth_of<S, H, R, A>(p)(x, from, to, s, h, decay + j, gain + j, c, m, down);
  }
};

template <class T, class A>
int forward(const LifFwd& p, int64_t begin, int64_t end) {
  const bool stream = p.T * p.N * int64_t(sizeof(T)) >= kStreamBytes;
  constexpr int kShift = 1024 / int(sizeof(A));
  alignas(64) A v_tmp[kRow + 3 * kShift], s_tmp[kUnroll][kTileRow], h_tmp[kTileRow], rest[kTileRow];
  Walk<T, A> walk(p.neuron, p.x, p.x_step);
  fill_row(rest, walk.c.rest, kTile);
  int towards = direction<T>(p.x, p.x_step, p.s, p.N);
  for (int r = 0; r < kUnroll && !stream; ++r) towards += direction(walk.x + r * p.x_step, p.v_last);
  const bool down = !p.packed && towards > 0;
  // A copy costs more than all hindrances but the greatest.
  const bool aside = stream || hindrance<T>(p.v_last, p, down) == kNearest;
  A* v_aside = v_tmp;
  for (int k = 0; k < 3 && hindrance<T>(v_aside, p, down); ++k) v_aside += kShift;
  for (int64_t k = begin; k < end; ++k) {
    walk.at(down ? begin + end - 1 - k : k, p.N);
    const int64_t first = walk.first;
    const int n = walk.n;
    A* const v_last = static_cast<A*>(p.v_last) + first;
    A* const v = aside ? v_aside : v_last;
    if (p.v_init) load_row(v, static_cast<const A*>(p.v_init) + first, n);
    bool at_rest = !p.v_init;  // and v not yet written
    T* const s_out = static_cast<T*>(p.s) + first;
    int64_t t = 0;
    if (!p.packed && !p.h && !p.v) {
      const int tile = stream ? kStreamTile : kTile;
      for (; t + kUnroll <= p.T; t += kUnroll) {
        const int last = (n - 1) / tile * tile;
        for (int k = 0; k <= last; k += tile) {
          const int j = down ? last - k : k, m = n - j < tile ? n - j : tile;
          T* const out = s_out + t * p.N + j;
          const A* x[kUnroll];
          A* s[kUnroll];
          for (int r = 0; r < kUnroll; ++r) {
            x[r] = walk.x_row(r, t + r, j, m);
            s[r] = target_row(s_tmp[r], out + r * p.N, stream);
          }
          walk.template advance<true, false, kUnroll>(x, at_rest ? rest : v + j, v + j, s, nullptr, j, m, down);
          for (int r = 0; r < kUnroll; ++r) commit_row(out + r * p.N, s[r], stream, m);
        }
        at_rest = false;
      }
    }
    for (; t < p.T; ++t) {
      for (int j = 0; j < n; j += kTile) {
        const int m = n - j < kTile ? n - j : kTile;
        const int64_t at = t * p.N + first + j;
        const A* x = walk.x_row(0, t, j, m);
        A* s = p.packed ? s_tmp[0] : target_row(s_tmp[0], s_out + t * p.N + j, stream);
        A* h = p.h ? static_cast<A*>(p.h) + at : h_tmp;
        walk.template advance<true, true, 1>(&x, at_rest ? rest : v + j, v + j, &s, &h, j, m);
        if (p.packed)
          pack_row(static_cast<uint8_t*>(p.s) + t / 8 * p.N + first + j, s, int(t % 8), m);
        else
          commit_row(s_out + t * p.N + j, s, stream, m);
        if (p.v) store_row(static_cast<A*>(p.v) + at, v + j, m);
      }
      at_rest = false;
    }
    if (stream)
      stream_row(v_last, v, n);
    else if (aside)
      store_row(v_last, v, n);
  }
  if (stream) stream_fence();
  return kOk;
}

template <class T, class A>
int backward(const LifBwd& p, int64_t begin, int64_t end) {
  const bool stream = p.T * p.N * int64_t(sizeof(T)) >= kStreamBytes;
  const bool by_step = p.g_h || p.g_v || p.g_decay || p.g_gain;  // these need a row of every step
  const LifBack<A> back = back_of<A>(p.neuron.hard, p.neuron.rest == 0, p.detach, p.surrogate);
  const int64_t segments = (p.T + kSegment - 1) / kSegment;
  alignas(64) A g_v[kRow], sum_decay[kRow], sum_gain[kRow], v[kTileRow], g[kTileRow], zero[kTileRow];
  alignas(64) A h[kUnroll][kTileRow], gs_tmp[kUnroll][kTileRow], gx_tmp[kUnroll][kTileRow];
  Walk<T, A> walk(p.neuron, p.x, p.x_step);
  const Neuron<A> c = walk.c;
  const bool down = !stream && direction<T>(p.x, p.x_step, p.g_x, p.N) + direction<T>(p.g_s, p.N, p.g_x, p.N) > 0;
  // The potentials at the starts of the segments, and of one segment's blocks after its first; x of one segment: rows of
  // the caller's x may share cache sets.
  const int most_blocks = int((p.T < kSegment ? p.T : kSegment) + kUnroll - 1) / kUnroll;
  A* const segment_start = static_cast<A*>(aligned_alloc(64, sizeof(A) * kRow * size_t(segments + most_blocks * (1 + kUnroll))));
  if (!segment_start) return kOutOfMemory;
  A *const block_start = segment_start + segments * kRow, *const kept_x = block_start + most_blocks * kRow;
  fill_row(zero, A(0), kTileRow);
  if (!p.v_init) fill_row(segment_start, c.rest, kLifChunk);

  const auto row = [&](const void* base, int64_t t, int j) { return static_cast<const A*>(base) + t * p.N + walk.first + j; };
  const auto g_s_row = [&](int r, int64_t t, int j, int m) -> const A* {
    return p.g_s ? state_row(gs_tmp[r], static_cast<const T*>(p.g_s) + t * p.N + walk.first + j, m) : zero;
  };
  const auto g_x_at = [&](int64_t t, int j) { return static_cast<T*>(p.g_x) + t * p.N + walk.first + j; };
  // kUnroll time steps of the chunk; x is left in the rows `keep`, if given.
  const auto block_forth = [&](const A* from, A* to, int64_t t, A* keep) {
    for (int j = 0; j < walk.n; j += kTile) {
      const int m = walk.n - j < kTile ? walk.n - j : kTile;
      const A* x[kUnroll];
      for (int r = 0; r < kUnroll; ++r) {
        if (keep) load_row(keep + r * kRow + j, walk.x + (t + r) * walk.x_step + walk.first + j, m);
        x[r] = keep ? keep + r * kRow + j : walk.x_row(r, t + r, j, m);
      }
      walk.template advance<false, false, kUnroll>(x, from + j, to + j, nullptr, nullptr, j, m);
    }
  };
  const RowOrLine<const A> decay(walk.decay, p.neuron.C == 1), gain(walk.gain, p.neuron.C == 1);
  const auto block_back = [&](RowOrLine<const A> start, int64_t t, const A* kept, RowOrLine<const A> g_to, RowOrLine<A> g_from) {
    const int tile = stream ? kBackStreamTile : kTile;
    for (int j = 0; j < walk.n; j += tile) {
      const int m = walk.n - j < tile ? walk.n - j : tile;
      const A *x[kUnroll], *g_s[kUnroll];
      A* g_x[kUnroll];
      for (int r = 0; r < kUnroll; ++r) {
        x[r] = kept ? kept + r * kRow + j : walk.x_row(r, t + r, j, m);
        g_s[r] = g_s_row(r, t + r, j, m);
        g_x[r] = target_row(gx_tmp[r], g_x_at(t + r, j), stream);
      }
      back.steps(x, start.from(j), g_s, g_to.from(j), g_from.from(j), g_x, decay.from(j), gain.from(j), c, A(p.a), A(p.b), m, down);
      for (int r = 0; r < kUnroll; ++r) commit_row(g_x_at(t + r, j), g_x[r], stream, m);
    }
  };
  const auto steps_back = [&](const A* chunk_start, int64_t t0, int count) {
    for (int j = 0; j < walk.n; j += kTile) {
      const int m = walk.n - j < kTile ? walk.n - j : kTile;
      const A *const start = chunk_start + j, *const decay = walk.decay + j, *const gain = walk.gain + j;
      load_row(v, start, m);
      for (int r = 0; r < count; ++r) {
        const A* x = walk.x_row(0, t0 + r, j, m);
        A* h_row = h[r];
        walk.template advance<false, true, 1>(&x, v, v, nullptr, &h_row, j, m);
      }
      for (int r = count - 1; r >= 0; --r) {
        const int64_t t = t0 + r;
        if (p.g_v) add_row(g_v + j, row(p.g_v, t, j), m);
        A* g_x = target_row(gx_tmp[0], g_x_at(t, j), stream);
        const A* const g_h = p.g_h ? row(p.g_h, t, j) : zero;
        back.step(h[r], g_s_row(0, t, j, m), g_h, g_v + j, g, g_x, decay, gain, c, A(p.a), A(p.b), m);
        commit_row(g_x_at(t, j), g_x, stream, m);
        if (p.g_gain) add_product(sum_gain + j, g, walk.x_row(0, t, j, m), A(0), m);
        if (p.g_decay) {
          if (r > 0) reset_row(v, h[r - 1], p.neuron.hard, c, m);  // v[t-1]
          add_product(sum_decay + j, g, r > 0 ? v : start, c.rest, m);
        }
      }
    }
  };

  // From the last chunk to the first: what forward touched last may still lie in the caches.
  for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
    walk.at(chunk, p.N);
    const int n = walk.n;
    if (p.v_init) load_row(segment_start, static_cast<const A*>(p.v_init) + walk.first, n);
    for (int64_t k = 1; k < segments; ++k) {
      A* const to = segment_start + k * kRow;
      for (int64_t t = (k - 1) * kSegment; t < k * kSegment; t += kUnroll)
        block_forth(t % kSegment == 0 ? to - kRow : to, to, t, nullptr);
    }
    if (p.g_v_last)
      load_row(g_v, row(p.g_v_last, 0, 0), n);
    else if (by_step || p.T % kUnroll)
      fill_row(g_v, A(0), n);
    fill_row(sum_decay, A(0), p.g_decay ? n : 0);
    fill_row(sum_gain, A(0), p.g_gain ? n : 0);

    for (int64_t k = segments - 1; k >= 0; --k) {
      const int64_t t0 = k * kSegment;
      const int count = int(p.T - t0 < kSegment ? p.T - t0 : kSegment), blocks = (count + kUnroll - 1) / kUnroll;
      const auto start = [&](int b) { return b == 0 ? segment_start + k * kRow : block_start + b * kRow; };
      for (int b = 0; b + 1 < blocks; ++b) block_forth(start(b), start(b + 1), t0 + b * kUnroll, kept_x + b * kUnroll * kRow);
      for (int b = blocks - 1; b >= 0; --b) {
        const int64_t t = t0 + b * kUnroll;
        const int left = count - b * kUnroll;
        if (by_step || left < kUnroll)
          steps_back(start(b), t, left < kUnroll ? left : kUnroll);
        else
          block_back({start(b), t == 0 && !p.v_init}, t, b + 1 < blocks ? kept_x + b * kUnroll * kRow : nullptr,
                     t + kUnroll == p.T && !p.g_v_last ? RowOrLine<const A>(zero, true) : RowOrLine<const A>(g_v, false),
                     t == 0 && !p.g_v_init ? RowOrLine<A>(g, true) : RowOrLine<A>(g_v, false));
      }
    }
    if (p.g_decay) store_row(static_cast<A*>(p.g_decay) + walk.first, sum_decay, n);
    if (p.g_gain) store_row(static_cast<A*>(p.g_gain) + walk.first, sum_gain, n);
    if (p.g_v_init) store_row(static_cast<A*>(p.g_v_init) + walk.first, g_v, n);
  }
  free(segment_start);
  if (stream) stream_fence();
  return kOk;
}

template <class A>
int reduce(const LifReduce& p, int64_t begin, int64_t end) {
  constexpr int kLanes = 16;  // independent partial sums: their number, not the vector width, fixes the order
  const A* in = static_cast<const A*>(p.in);
  const int64_t outer = p.N / (p.C * p.inner);
  if (p.inner == 1) {  // channels lie side by side: walk them a cache line at a time
    for (int64_t c = begin; c < end; c += kLanes) {
      const int m = int(end - c < kLanes ? end - c : kLanes);
      double sum[kLanes] = {};
      for (int64_t o = 0; o < outer; ++o)
        for (int i = 0; i < m; ++i) sum[i] += in[o * p.C + c + i];
      for (int i = 0; i < m; ++i) static_cast<A*>(p.out)[c + i] = A(sum[i]);
    }
    return kOk;
  }
  for (int64_t c = begin; c < end; ++c) {
    double sum[kLanes] = {}, total = 0;
    for (int64_t o = 0; o < outer; ++o) {
      const A* row = in + (o * p.C + c) * p.inner;
      int64_t i = 0;
      for (; i + kLanes <= p.inner; i += kLanes)
        for (int k = 0; k < kLanes; ++k) sum[k] += row[i + k];
      for (int k = 0; i < p.inner; ++i, ++k) sum[k] += row[i];
    }
    for (int k = 0; k < kLanes; ++k) total += sum[k];
    static_cast<A*>(p.out)[c] = A(total);
  }
  return kOk;
}

}  // namespace

LifStepBack<float>* lif_step_back(const LifNeuron& p, bool detach, int surrogate, float) {
  return back_of<float>(p.hard, p.rest == 0, detach, surrogate).step;
}
LifStepBack<double>* lif_step_back(const LifNeuron& p, bool detach, int surrogate, double) {
  return back_of<double>(p.hard, p.rest == 0, detach, surrogate).step;
}

int lif_fwd(const LifFwd& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32: return forward<float, float>(p, begin, end);
    case DType::bf16: return forward<bf16, float>(p, begin, end);
    case DType::f16: return forward<f16, float>(p, begin, end);
    default: return forward<double, double>(p, begin, end);
  }
}

int lif_bwd(const LifBwd& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32: return backward<float, float>(p, begin, end);
    case DType::bf16: return backward<bf16, float>(p, begin, end);
    case DType::f16: return backward<f16, float>(p, begin, end);
    default: return backward<double, double>(p, begin, end);
  }
}

int lif_reduce(const LifReduce& p, int64_t begin, int64_t end) {
  return p.dtype == DType::f64 ? reduce<double>(p, begin, end) : reduce<float>(p, begin, end);
}

}  // namespace SPK_ISA

#ifdef SPK_DISPATCH
LifFwdFn* lif_fwd_cpu() {
  static LifFwdFn* const f = SPK_PICK(lif_fwd);
  return f;
}
LifBwdFn* lif_bwd_cpu() {
  static LifBwdFn* const f = SPK_PICK(lif_bwd);
  return f;
}
LifReduceFn* lif_reduce_cpu() {
  static LifReduceFn* const f = SPK_PICK(lif_reduce);
  return f;
}
#endif

}  // namespace spk
