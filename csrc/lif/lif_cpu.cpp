// lif on the CPU; compiled once per instruction set (core/dispatch.h). A chunk of neurons goes through all time steps
// with its potentials in L1; inner loops run over the neurons of a row and are written for the vectoriser.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/simd.h"
#include "core/surrogate.h"
#include "lif/lif.h"
#include "lif/neuron.h"

namespace spk {
namespace SPK_ISA {
namespace {

// Row loops are shared by all element types and variants of the walk around them; inlined, they compile for minutes.
#define SPK_NOINLINE __attribute__((noinline))

constexpr int64_t kStreamBytes = 8 << 20;  // output sequences from this size on bypass the caches
constexpr int kTile = 32;                  // neurons between two bursts of streamed stores: loads go on meanwhile
constexpr int kUnroll = 4;                 // time steps that a row loop carries through registers
constexpr int kSegment = 64;               // time steps whose potentials backward holds at once

// Length of a row of working space: a little over a chunk, to keep the rows out of each other's cache sets.
constexpr int kRow = kLifChunk + 16;

template <class A>
Neuron<A> constants(const LifNeuron& p) {
  const A threshold = A(p.threshold);
  const A above = sizeof(A) == 4 ? A(nextafterf(float(threshold), INFINITY)) : A(nextafter(double(threshold), INFINITY));
  // Nothing lies above infinity, and no potential is >= NaN.
  return {A(p.rest), !p.strict ? threshold : above > threshold ? above : A(NAN), threshold, A(p.reset_by)};
}

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

// R time steps of a row at once: the potentials v pass through registers from one to the next. Null s or h: not wanted.
template <bool HARD, bool AT_ZERO, bool S, bool H, int R, class A>
SPK_NOINLINE void steps(const A* const* x, A* v, A* const* s, A* const* h, const A* decay, const A* gain, const Neuron<A> c,
                        int n) {
  const A* xr[R];
  A *sr[R], *hr[R];
  for (int r = 0; r < R; ++r) {
    xr[r] = x[r];
    if (S) sr[r] = s[r];
    if (H) hr[r] = h[r];
  }
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    A vi = v[i], xi[R];
    const A di = decay[i], gi = gain[i];
    // Loads before stores: rows a multiple of 4 KB apart look like the same address to the store buffer.
    for (int r = 0; r < R; ++r) xi[r] = xr[r][i];
    for (int r = 0; r < R; ++r) {
      const A hi = charge(vi, xi[r], di, gi, AT_ZERO ? A(0) : c.rest);
      if (H) hr[r][i] = hi;
      if (S) sr[r][i] = hi >= c.fire_at ? A(1) : A(0);
      vi = reset(hi, HARD, c);
    }
    v[i] = vi;
  }
}

template <class A>
SPK_NOINLINE void pack_row(uint8_t* __restrict__ bits, const A* __restrict__ s, int bit, int n) {
  const uint8_t one = uint8_t(1u << bit);
  if (bit == 0)
    for (int i = 0; i < n; ++i) bits[i] = s[i] != 0 ? one : 0;
  else
    for (int i = 0; i < n; ++i) bits[i] |= s[i] != 0 ? one : 0;
}

// g_v comes in as the gradient of v[t] and goes out as that of v[t-1]; g is left holding that of h[t].
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
void fill_row(A* d, A value, int n) {
  for (int i = 0; i < n; ++i) d[i] = value;
}
template <class A>
void add_row(A* __restrict__ d, const A* __restrict__ s, int n) {
  for (int i = 0; i < n; ++i) d[i] += s[i];
}
template <class A>
void reset_row(A* __restrict__ v, const A* __restrict__ h, bool hard, const Neuron<A> c, int n) {
  if (hard)
    for (int i = 0; i < n; ++i) v[i] = reset(h[i], true, c);
  else
    for (int i = 0; i < n; ++i) v[i] = reset(h[i], false, c);
}
template <class A>
void add_product(A* __restrict__ d, const A* __restrict__ x, const A* __restrict__ y, A minus, int n) {
  for (int i = 0; i < n; ++i) d[i] += x[i] * (y[i] - minus);
}

template <class A>
using StepBack = void (*)(const A*, const A*, const A*, A*, A*, A*, const A*, const A*, Neuron<A>, A, A, int);

template <bool HARD, bool DETACH, class A>
StepBack<A> step_back_of(int kind) {
  switch (static_cast<Surrogate>(kind)) {
    case Surrogate::atan: return step_back<HARD, DETACH, Surrogate::atan, A>;
    case Surrogate::sigmoid: return step_back<HARD, DETACH, Surrogate::sigmoid, A>;
    case Surrogate::rectangle: return step_back<HARD, DETACH, Surrogate::rectangle, A>;
    case Surrogate::triangle: return step_back<HARD, DETACH, Surrogate::triangle, A>;
    case Surrogate::fast_sigmoid: return step_back<HARD, DETACH, Surrogate::fast_sigmoid, A>;
    case Surrogate::erf: return step_back<HARD, DETACH, Surrogate::erf, A>;
    default: return step_back<HARD, DETACH, Surrogate::leaky_relu, A>;
  }
}
template <class A>
StepBack<A> step_back_of(bool hard, bool detach, int kind) {
  if (hard) return detach ? step_back_of<true, true, A>(kind) : step_back_of<true, false, A>(kind);
  return detach ? step_back_of<false, true, A>(kind) : step_back_of<false, false, A>(kind);
}

// What a chunk of neurons carries through time, and how it advances.
template <class T, class A>
struct Walk {
  alignas(64) A decay[kRow], gain[kRow], x_tmp[kUnroll][kRow];
  A* v;  // [n] the potentials
  const Neuron<A> c;
  const LifNeuron& p;
  const T* x;
  int64_t first, x_step;
  int n;

  Walk(const LifNeuron& neuron, const void* x, int64_t x_step)
      : v(nullptr), c(constants<A>(neuron)), p(neuron), x(static_cast<const T*>(x)), first(0), x_step(x_step), n(0) {
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
  void rest_or(const void* v_init) {
    if (v_init)
      load_row(v, static_cast<const A*>(v_init) + first, n);
    else
      fill_row(v, c.rest, n);
  }
  const A* x_row(int64_t t) { return state_row(x_tmp[0], x + t * x_step + first, n); }

  // Time steps t ... t + R - 1 of the chunk's m neurons from j on, into the rows of spikes s and potentials h of those.
  template <bool S, bool H, int R>
  void advance(int64_t t, A* const* s, A* const* h, int j, int m) {
    const A* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = state_row(x_tmp[r], x + (t + r) * x_step + first + j, m);
    // Soft reset rests at 0 too.
    const auto run = !p.hard       ? steps<false, true, S, H, R, A>
                     : c.rest == 0 ? steps<true, true, S, H, R, A>
                                   : steps<true, false, S, H, R, A>;
    run(rows, v + j, s, h, decay + j, gain + j, c, m);
  }
};

template <class T, class A>
int forward(const LifFwd& p, int64_t begin, int64_t end) {
  const bool stream = p.T * p.N * int64_t(sizeof(T)) >= kStreamBytes;
  alignas(64) A v_tmp[kRow], s_tmp[kUnroll][kRow], h_tmp[kRow];
  Walk<T, A> walk(p.neuron, p.x, p.x_step);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    walk.at(chunk, p.N);
    const int64_t first = walk.first;
    const int n = walk.n;
    A* const v_last = static_cast<A*>(p.v_last) + first;
    walk.v = target_row(v_tmp, v_last, stream);
    walk.rest_or(p.v_init);
    T* const s_out = static_cast<T*>(p.s) + first;
    int64_t t = 0;
    if (!p.packed && !p.h && !p.v) {
      const int tile = stream ? kTile : n;
      for (; t + kUnroll <= p.T; t += kUnroll) {
        for (int j = 0; j < n; j += tile) {
          const int m = n - j < tile ? n - j : tile;
          T* const out = s_out + t * p.N + j;
          A* s[kUnroll];
          for (int r = 0; r < kUnroll; ++r) s[r] = target_row(s_tmp[r], out + r * p.N, stream);
          walk.template advance<true, false, kUnroll>(t, s, nullptr, j, m);
          for (int r = 0; r < kUnroll; ++r) commit_row(out + r * p.N, s[r], stream, m);
        }
      }
    }
    for (; t < p.T; ++t) {
      A* s = p.packed ? s_tmp[0] : target_row(s_tmp[0], s_out + t * p.N, stream);
      A* h = p.h ? static_cast<A*>(p.h) + t * p.N + first : h_tmp;
      walk.template advance<true, true, 1>(t, &s, &h, 0, n);
      if (p.packed)
        pack_row(static_cast<uint8_t*>(p.s) + t / 8 * p.N + first, s, int(t % 8), n);
      else
        commit_row(s_out + t * p.N, s, stream, n);
      if (p.v) store_row(static_cast<A*>(p.v) + t * p.N + first, walk.v, n);
    }
    commit_row(v_last, walk.v, stream, n);
  }
  if (stream) stream_fence();
  return kOk;
}

template <class T, class A>
int backward(const LifBwd& p, int64_t begin, int64_t end) {
  const bool stream = p.T * p.N * int64_t(sizeof(T)) >= kStreamBytes;
  const auto back = step_back_of<A>(p.neuron.hard, p.detach, p.surrogate);
  const int segments = int((p.T + kSegment - 1) / kSegment), held = int(p.T < kSegment ? p.T : kSegment);
  alignas(64) A v[kRow], g_v[kRow], g[kRow], gs_tmp[kRow], gx_tmp[kRow], zero[kRow], sum_decay[kRow], sum_gain[kRow];
  Walk<T, A> walk(p.neuron, p.x, p.x_step);
  const Neuron<A> c = walk.c;
  // h of one segment, then the potentials at each segment's start.
  A* scratch = static_cast<A*>(aligned_alloc(64, sizeof(A) * kRow * (size_t(held) + segments)));
  if (!scratch) return kOutOfMemory;
  A* const starts = scratch + int64_t(held) * kRow;
  fill_row(zero, A(0), kRow);

  const auto recompute = [&](int64_t t0, int64_t t1) {  // h[t0 ... t1-1] into scratch
    int64_t t = t0;
    for (; t + kUnroll <= t1; t += kUnroll) {
      A* h[kUnroll];
      for (int r = 0; r < kUnroll; ++r) h[r] = scratch + (t + r - t0) * kRow;
      walk.template advance<false, true, kUnroll>(t, nullptr, h, 0, walk.n);
    }
    for (; t < t1; ++t) {
      A* h = scratch + (t - t0) * kRow;
      walk.template advance<false, true, 1>(t, nullptr, &h, 0, walk.n);
    }
  };

  for (int64_t chunk = begin; chunk < end; ++chunk) {
    walk.at(chunk, p.N);
    walk.v = v;
    walk.rest_or(p.v_init);
    const int64_t first = walk.first;
    const int n = walk.n;
    const auto row = [&](const void* base, int64_t t) { return static_cast<const A*>(base) + t * p.N + first; };
    for (int k = 0; k < segments; ++k) {
      load_row(starts + int64_t(k) * kRow, walk.v, n);
      if (k + 1 < segments) recompute(int64_t(k) * kSegment, int64_t(k + 1) * kSegment);
    }
    if (p.g_v_last)
      load_row(g_v, row(p.g_v_last, 0), n);
    else
      fill_row(g_v, A(0), n);
    fill_row(sum_decay, A(0), p.g_decay ? n : 0);
    fill_row(sum_gain, A(0), p.g_gain ? n : 0);

    for (int k = segments - 1; k >= 0; --k) {
      const int64_t t0 = int64_t(k) * kSegment, t1 = t0 + kSegment < p.T ? t0 + kSegment : p.T;
      const A* start = starts + int64_t(k) * kRow;
      load_row(walk.v, start, n);
      recompute(t0, t1);
      for (int64_t t = t1 - 1; t >= t0; --t) {
        const A* h = scratch + (t - t0) * kRow;
        if (p.g_v) add_row(g_v, row(p.g_v, t), n);
        const A* g_s = p.g_s ? state_row(gs_tmp, static_cast<const T*>(p.g_s) + t * p.N + first, n) : zero;
        T* g_x = static_cast<T*>(p.g_x) + t * p.N + first;
        A* g_x_row = target_row(gx_tmp, g_x, stream);
        back(h, g_s, p.g_h ? row(p.g_h, t) : zero, g_v, g, g_x_row, walk.decay, walk.gain, c, A(p.a), A(p.b), n);
        commit_row(g_x, g_x_row, stream, n);
        if (p.g_gain) add_product(sum_gain, g, walk.x_row(t), A(0), n);
        if (p.g_decay) {
          if (t > t0) reset_row(walk.v, h - kRow, p.neuron.hard, c, n);  // v[t-1], from the row before
          add_product(sum_decay, g, t > t0 ? walk.v : start, c.rest, n);
        }
      }
    }
    if (p.g_decay) store_row(static_cast<A*>(p.g_decay) + first, sum_decay, n);
    if (p.g_gain) store_row(static_cast<A*>(p.g_gain) + first, sum_gain, n);
    if (p.g_v_init) store_row(static_cast<A*>(p.g_v_init) + first, g_v, n);
  }
  free(scratch);
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
