// spiking_self_attention on the CPU; compiled once per instruction set (core/dispatch.h). A thread takes a head after the
// other and walks its N columns in chunks: first k^T v of every step, then q's chunks through the neuron, time innermost.
// Operands that are spikes are kept as bits where products of bits are fast, others as tiles of floats.
#include <stdlib.h>
#include <string.h>

#include "spiking_self_attention/rows.h"
#include "spiking_self_attention/spikes.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int64_t kHeld = 1 << 18;                   // numbers of a chunk over all steps that backward holds, about
constexpr int64_t kLeast = 64, kMost = 32 * kWords;  // columns of a chunk

int64_t chunk_of(const AttentionShape& s) {
  const int64_t fit = kHeld / (4 * s.T * s.D) / kPad * kPad, n = fit < kLeast ? kLeast : fit > kMost ? kMost : fit;
  return s.N < n ? s.N : n;
}

// Rows of memory or of a tile; no data: they cannot be taken as they lie.
template <class P>
struct Rows {
  P data;
  int64_t row;
  explicit operator bool() const { return data != nullptr; }
};

// A chunk of a head: where it lies and how it is read and written.
template <class A>
struct Chunk {
  const AttentionShape& p;
  const int64_t size, ld, tile;  // columns; of a row of a tile; numbers of a tile
  int64_t batch, head, first, n;

  explicit Chunk(const AttentionShape& p)
      : p(p), size(chunk_of(p)), ld(padded(size) + (padded(size) / kPad % 2 ? 0 : kPad)), tile(p.D * ld) {}
  void at_head(int64_t i) {
    batch = i / p.H;
    head = i % p.H;
  }
  void at(int64_t column) {
    first = column;
    n = p.N - column < size ? p.N - column : size;
  }
  template <class P>
  int64_t offset(const Sequence<P>& x, int64_t t) const {
    return (p.packed ? t / 8 : t) * x.step + batch * x.batch + head * x.head + first * x.column;
  }
  template <class P>
  bool as_it_lies(const Sequence<P>& x) const {
    return !p.packed && x.column == 1 && p.dtype == (sizeof(A) == 4 ? DType::f32 : DType::f64);
  }
  Rows<const A*> direct(const SequenceIn& x, int64_t t) const {
    return {as_it_lies(x) ? static_cast<const A*>(x.data) + offset(x, t) : nullptr, x.row};
  }
  Rows<A*> direct(const SequenceOut& x, int64_t t) const {
    return {as_it_lies(x) ? static_cast<A*>(x.data) + offset(x, t) : nullptr, x.row};
  }
  // Step t of x as it lies, or by way of the tile d.
  Rows<const A*> rows(A* d, const SequenceIn& x, int64_t t) const {
    const Rows<const A*> there = direct(x, t);
    if (there) return there;
    load(d, x, t);
    return {d, ld};
  }
  // Where step t of x is computed; `put` takes it to memory.
  Rows<A*> target(A* d, const SequenceOut& x, int64_t t) const {
    const Rows<A*> there = direct(x, t);
    return there ? there : Rows<A*>{d, ld};
  }
  void put(const SequenceOut& x, int64_t t, Rows<A*> from) const {
    if (direct(x, t).data != from.data) store(x, t, from.data);
  }

  void load(A* d, const SequenceIn& x, int64_t t) const {
    const int64_t at = offset(x, t);
    if (p.packed)
      load_bits(d, ld, static_cast<const uint8_t*>(x.data) + at, int(t % 8), x.row, x.column, p.D, n);
    else
      load_floats(d, x, at);
    pad(d);
  }
  void pad(A* d) const {
    if (n < padded(n))
      for (int64_t r = 0; r < p.D; ++r) memset(d + r * ld + n, 0, size_t(padded(n) - n) * sizeof(A));
  }
  void load_floats(float* d, const SequenceIn& x, int64_t at) const {
    switch (p.dtype) {
      case DType::bf16: return load_rows(d, ld, static_cast<const bf16*>(x.data) + at, x.row, x.column, p.D, n);
      case DType::f16: return load_rows(d, ld, static_cast<const f16*>(x.data) + at, x.row, x.column, p.D, n);
      default: return load_rows(d, ld, static_cast<const float*>(x.data) + at, x.row, x.column, p.D, n);
    }
  }
  void load_floats(double* d, const SequenceIn& x, int64_t at) const {
    load_rows(d, ld, static_cast<const double*>(x.data) + at, x.row, x.column, p.D, n);
  }
  void store(const SequenceOut& x, int64_t t, const A* s) const {
    const int64_t at = offset(x, t);
    if (p.packed)
      store_bits(static_cast<uint8_t*>(x.data) + at, int(t % 8), x.row, x.column, s, ld, p.D, n);
    else
      store_floats(x, at, s);
  }
  void store_floats(const SequenceOut& x, int64_t at, const float* s) const {
    switch (p.dtype) {
      case DType::bf16: return store_rows(static_cast<bf16*>(x.data) + at, x.row, x.column, s, ld, p.D, n);
      case DType::f16: return store_rows(static_cast<f16*>(x.data) + at, x.row, x.column, s, ld, p.D, n);
      default: return store_rows(static_cast<float*>(x.data) + at, x.row, x.column, s, ld, p.D, n);
    }
  }
  void store_floats(const SequenceOut& x, int64_t at, const double* s) const {
    store_rows(static_cast<double*>(x.data) + at, x.row, x.column, s, ld, p.D, n);
  }

  // ---- neurons over the chunk: v, h and the like are tiles

  void rest(A* v, const Cell<A>& cell) const {
    for (int64_t i = 0; i < tile; ++i) v[i] = cell.c.rest;
  }
  template <bool KEEP>
  void step(const Cell<A>& cell, const A* x, A factor, A* v, A* h, Rows<A*> s) const {
    const auto run = !cell.hard         ? step_row<false, true, KEEP, A>
                     : cell.c.rest == 0 ? step_row<true, true, KEEP, A>
                                        : step_row<true, false, KEEP, A>;
    for (int64_t r = 0; r < p.D; ++r) {
      const int64_t i = r * ld;
      run(x + i, factor, v + i, KEEP ? h + i : nullptr, s.data + r * s.row, cell.decay, cell.gain, cell.c, n);
    }
  }
  // Null h: not wanted.
  void step(const Cell<A>& cell, const A* x, A factor, A* v, A* h, Rows<A*> s) const {
    h ? step<true>(cell, x, factor, v, h, s) : step<false>(cell, x, factor, v, h, s);
  }
  void surrogate_of(const Cell<A>& cell, A* sg, const A* h) const {
    const A threshold = cell.c.threshold;
    switch (static_cast<Surrogate>(cell.surrogate)) {
      case Surrogate::atan: return surrogate_row<Surrogate::atan>(sg, h, threshold, cell.a, cell.b, n);
      case Surrogate::sigmoid: return surrogate_row<Surrogate::sigmoid>(sg, h, threshold, cell.a, cell.b, n);
      case Surrogate::rectangle: return surrogate_row<Surrogate::rectangle>(sg, h, threshold, cell.a, cell.b, n);
      case Surrogate::triangle: return surrogate_row<Surrogate::triangle>(sg, h, threshold, cell.a, cell.b, n);
      case Surrogate::fast_sigmoid: return surrogate_row<Surrogate::fast_sigmoid>(sg, h, threshold, cell.a, cell.b, n);
      case Surrogate::erf: return surrogate_row<Surrogate::erf>(sg, h, threshold, cell.a, cell.b, n);
      default: return surrogate_row<Surrogate::leaky_relu>(sg, h, threshold, cell.a, cell.b, n);
    }
  }
  // From the gradient g_s of the spikes to g_x of x. h_before: of step t-1, null at t = 0; null sums, x: not wanted.
  void back(const Cell<A>& cell, const A* h, const A* h_before, Rows<const A*> x, A factor, A* g_v, Rows<const A*> g_s,
            Rows<A*> g_x, A* two_rows, Sum* g_decay, Sum* g_gain) const {
    A *const sg = two_rows, *const g_h = two_rows + ld;
    const auto run = cell.hard ? (cell.detach ? back_row<true, true, A> : back_row<true, false, A>)
                               : (cell.detach ? back_row<false, true, A> : back_row<false, false, A>);
    for (int64_t r = 0; r < p.D; ++r) {
      const int64_t i = r * ld;
      surrogate_of(cell, sg, h + i);
      run(h + i, sg, g_s.data + r * g_s.row, g_v + i, g_h, g_x.data + r * g_x.row, factor, cell.decay, cell.gain, cell.c, n);
      if (g_gain) g_gain->add(g_h, x.data + r * x.row, factor, A(0), n);
      if (g_decay && h_before) {
        reset_row(sg, h_before + i, cell.hard, cell.c, n);
        g_decay->add(g_h, sg, A(1), cell.c.rest, n);
      }
    }
  }
};

// Working space in 64-byte units, all zero: the padding of tiles must not hold NaN.
struct Scratch {
  char* base;
  int64_t used = 0;
  explicit Scratch(int64_t bytes) : base(static_cast<char*>(aligned_alloc(64, size_t(bytes)))) {
    if (base) memset(base, 0, size_t(bytes));
  }
  ~Scratch() { free(base); }
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  template <class T>
  T* take(int64_t numbers) {
    T* const p = reinterpret_cast<T*>(base + used);
    used += rounded(numbers * int64_t(sizeof(T)));
    return p;
  }
};

// Steps of an operand: bits where it is spikes, else tiles.
template <class A>
struct Operand {
  A* tiles;
  bool* spikes;
  uint32_t *over_n, *over_d;
  int64_t tile, n_ld, d_ld, n_size, d_size;

  Operand(const Chunk<A>& c)
      : tile(c.tile), n_ld(padded(c.p.D)), d_ld(c.ld), n_size(kWords * n_ld), d_size((c.p.D + 31) / 32 * d_ld) {}
  int64_t bytes(int64_t steps) const {
    return Scratch::rounded(steps * tile * int64_t(sizeof(A))) + Scratch::rounded(steps) +
           (kBits<A> ? Scratch::rounded(4 * steps * n_size) + Scratch::rounded(4 * steps * d_size) : 0);
  }
  void take(Scratch& s, int64_t steps) {
    tiles = s.take<A>(steps * tile);
    spikes = s.take<bool>(steps);
    over_n = s.take<uint32_t>(kBits<A> ? steps * n_size : 0);
    over_d = s.take<uint32_t>(kBits<A> ? steps * d_size : 0);
  }
  A* at(int64_t step) const { return tiles + step * tile; }
  Bits bits(int64_t step) const { return {over_n + step * n_size, over_d + step * d_size, n_ld, d_ld}; }
};

template <class A, class P>
struct Head {
  const P& p;
  const AttentionShape& s;
  Chunk<A> chunk;
  const int64_t kv_ld, kv_size;

  explicit Head(const P& p) : p(p), s(p.shape), chunk(p.shape), kv_ld(padded(s.D)), kv_size((s.D + 3) / 4 * 4 * kv_ld) {}

  // Step t of x as step `at` of o; from currents through neurons of potentials v, kept in h unless null.
  void read(const SequenceIn& x, int64_t t, const Cell<A>& cell, A* v, A* h, const Operand<A>& o, int64_t at) const {
    A* const tile = o.at(at);
    if constexpr (kBits<A>) {
      o.spikes[at] = true;
      const int64_t next = t + 1 < s.T ? x.step : x.head - t * x.step;  // mostly
      if (s.currents) {
        const Rows<const A*> from = chunk.rows(tile, x, t);
        return step_bits(o.bits(at), cell.hard, from.data, from.row, next, v, h, chunk.ld, cell.decay, cell.gain, cell.c, s.D,
                         chunk.n);
      }
      if (s.packed && x.column == 1)
        return to_bits(o.bits(at), static_cast<const uint8_t*>(x.data) + chunk.offset(x, t), int(t % 8), x.row, s.D, chunk.n);
      const Rows<const A*> from = chunk.rows(tile, x, t);
      if (to_bits(o.bits(at), from.data, from.row, next, s.D, chunk.n)) return;
    }
    o.spikes[at] = false;
    chunk.load(tile, x, t);
    if (s.currents) chunk.step(cell, tile, A(1), v, h, Rows<A*>{tile, chunk.ld});
  }
  // Step t of x as a tile, after `read`; never from currents, which are all spikes or all tiles.
  const A* whole(const SequenceIn& x, int64_t t, const Operand<A>& o, int64_t at) const {
    if (o.spikes[at]) chunk.load(o.at(at), x, t);
    return o.at(at);
  }
  // Step t of k and v; k_h and v_h: sequences for their potentials, or null.
  void read_pair(const Cell<A>& cell, const Operand<A>& k, const Operand<A>& v, int64_t t, int64_t at, A* k_state, A* v_state,
                 A* k_h, A* v_h) const {
    read(p.k, t, cell, k_state, k_h ? k_h + t * chunk.tile : nullptr, k, at);
    read(p.v, t, cell, v_state, v_h ? v_h + t * chunk.tile : nullptr, v, at);
  }
  // kv[t, d, e] = sum over n of k[d, n] v[e, n], for every t. With `keep`, N is one chunk, whose operands stay as steps of k
  // and v, and their potentials in k_h and v_h unless null.
  void key_values(const Cell<A>& cell, A* kv, const Operand<A>& k, const Operand<A>& v, A* k_state, A* v_state, bool keep = false,
                  A* k_h = nullptr, A* v_h = nullptr) {
    for (int64_t first = 0; first < s.N; first += chunk.size) {
      chunk.at(first);
      chunk.rest(k_state, cell);
      chunk.rest(v_state, cell);
      for (int64_t t = 0; t < s.T; ++t) {
        const int64_t at = keep ? t : 0;
        read_pair(cell, k, v, t, at, k_state, v_state, keep ? k_h : nullptr, keep ? v_h : nullptr);
        A* const out = kv + t * kv_size;
        if constexpr (kBits<A>) {
          if (k.spikes[at] && v.spikes[at]) {
            count_bits(k.bits(at), v.bits(at), s.D, chunk.n, out, kv_ld, first > 0);
            continue;
          }
        }
        dots(whole(p.k, t, k, at), whole(p.v, t, v, at), chunk.ld, padded(chunk.n), s.D, out, kv_ld, first > 0);
      }
    }
  }
  // c[r, n] = sum over i of a[r, i] o[i, n].
  void times(const A* a, int64_t row, int64_t column, const Operand<A>& o, int64_t at, Rows<A*> c) const {
    if constexpr (kBits<A>)
      if (o.spikes[at]) {
        const Bits b = o.bits(at);
        return spike_product(a, row, column, s.D, s.D, b.over_d, b.d_ld, c.data, c.row, chunk.n, false);
      }
    product_by_four(a, row, column, s.D, s.D, static_cast<const A*>(o.at(at)), chunk.ld, c.data, c.row, chunk.n, false);
  }
  // out[r, i] (+)= sum over n of g[r, n] o[i, n]; `turned`: room for o, [chunk.size, kv_ld].
  void outer(const A* g, const Operand<A>& o, int64_t at, A* out, A* turned) const {
    const bool add = chunk.first > 0;
    if constexpr (kBits<A>)
      if (o.spikes[at]) {
        const Bits b = o.bits(at);
        return spike_product(g, chunk.ld, 1, s.D, chunk.n, b.over_n, b.n_ld, out, kv_ld, s.D, add);
      }
    const A* const x = o.at(at);
    for (int64_t r = 0; r < kv_ld; ++r)
      for (int64_t i = 0; i < chunk.n; ++i) turned[i * kv_ld + r] = r < s.D ? x[r * chunk.ld + i] : A(0);
    product_by_four(g, chunk.ld, 1, s.D, chunk.n, static_cast<const A*>(turned), kv_ld, out, kv_ld, s.D, add);
  }
};

template <class A>
int forward(const SpikingSelfAttentionFwd& p, int64_t begin, int64_t end) {
  Head<A, SpikingSelfAttentionFwd> head(p);
  Chunk<A>& chunk = head.chunk;
  const AttentionShape& s = p.shape;
  Operand<A> one(chunk), two(chunk);
  Scratch scratch(one.bytes(1) + two.bytes(1) + Scratch::rounded(s.T * head.kv_size * sizeof(A)) +
                  2 * Scratch::rounded(chunk.tile * sizeof(A)));
  if (!scratch.base) return kOutOfMemory;
  one.take(scratch, 1), two.take(scratch, 1);
  A *const kv = scratch.take<A>(s.T * head.kv_size), *const state1 = scratch.take<A>(chunk.tile),
           *const state2 = scratch.take<A>(chunk.tile), *const y = two.tiles;
  for (int64_t i = begin; i < end; ++i) {
    chunk.at_head(i);
    const Cell<A> attn(p.attn, chunk.head), qkv(p.qkv, chunk.head);
    head.key_values(qkv, kv, one, two, state1, state2);
    for (int64_t first = 0; first < s.N; first += chunk.size) {
      chunk.at(first);
      chunk.rest(state1, qkv);
      chunk.rest(state2, attn);
      for (int64_t t = 0; t < s.T; ++t) {
        head.read(p.q, t, qkv, state1, nullptr, one, 0);
        head.times(kv + t * head.kv_size, 1, head.kv_ld, one, 0, {y, chunk.ld});
        const Rows<A*> out = chunk.target(y, p.out, t);
        chunk.step(attn, y, A(s.scale), state2, nullptr, out);
        chunk.put(p.out, t, out);
      }
    }
  }
  return kOk;
}

template <class A>
int backward(const SpikingSelfAttentionBwd& p, int64_t begin, int64_t end) {
  Head<A, SpikingSelfAttentionBwd> head(p);
  Chunk<A>& chunk = head.chunk;
  const AttentionShape& s = p.shape;
  const int64_t tile = chunk.tile, sequence = s.T * tile, ld = head.kv_ld;
  // Where N is one chunk, k and v are read once.
  const bool keep = chunk.size == s.N, keep_h = keep && s.currents;
  Operand<A> q(chunk), k(chunk), v(chunk);
  Scratch scratch(3 * q.bytes(s.T) + 2 * Scratch::rounded(s.T * head.kv_size * sizeof(A)) +
                  (keep_h ? 5 : 3) * Scratch::rounded(sequence * sizeof(A)) + 4 * Scratch::rounded(tile * sizeof(A)) +
                  Scratch::rounded(2 * chunk.ld * sizeof(A)) + Scratch::rounded(chunk.size * ld * sizeof(A)));
  if (!scratch.base) return kOutOfMemory;
  q.take(scratch, s.T), k.take(scratch, s.T), v.take(scratch, s.T);
  A *const kv = scratch.take<A>(s.T * head.kv_size), *const g_kv = scratch.take<A>(s.T * head.kv_size);
  // k^T v q over time, the potentials of neurons; gradients, or two states while time goes forward.
  A *const ys = scratch.take<A>(sequence), *const h_y = scratch.take<A>(sequence), *const h_q = scratch.take<A>(sequence),
           *const h_k = keep_h ? scratch.take<A>(sequence) : h_y, *const h_v = keep_h ? scratch.take<A>(sequence) : h_q,
           *const g_one = scratch.take<A>(tile), *const g_two = scratch.take<A>(tile), *const state1 = scratch.take<A>(tile),
           *const state2 = scratch.take<A>(tile), *const rows = scratch.take<A>(2 * chunk.ld),
           *const turned = scratch.take<A>(chunk.size * ld);
  const bool qkv_gain = s.currents && p.g_qkv_gain, qkv_decay = s.currents && p.g_qkv_decay;

  for (int64_t i = begin; i < end; ++i) {
    chunk.at_head(i);
    const Cell<A> attn(p.attn, chunk.head), qkv(p.qkv, chunk.head);
    Sum g_decay, g_gain, g_qkv_decay, g_qkv_gain;
    // From the gradient g of an operand's spikes to that of the operand; h: its potentials, g_v: of its potential; `current`
    // is a tile to use.
    const auto finish = [&](const SequenceIn& x, const SequenceOut& g_x, int64_t t, const A* h, A* g_v, Rows<A*> g, A* current) {
      if (!s.currents) return chunk.put(g_x, t, g);
      const Rows<const A*> from = qkv_gain ? chunk.rows(current, x, t) : Rows<const A*>{current, chunk.ld};
      const Rows<A*> to = chunk.target(g.data, g_x, t);
      chunk.back(qkv, h + t * tile, t ? h + (t - 1) * tile : nullptr, from, A(1), g_v, {g.data, g.row}, to, rows,
                 qkv_decay ? &g_qkv_decay : nullptr, qkv_gain ? &g_qkv_gain : nullptr);
      chunk.put(g_x, t, to);
    };
    // Where a product goes that `finish` takes.
    const auto place = [&](A* g, const SequenceOut& g_x, int64_t t) {
      return !s.currents ? chunk.target(g, g_x, t) : Rows<A*>{g, chunk.ld};
    };

    head.key_values(qkv, kv, k, v, state1, state2, keep, h_k, h_v);
    for (int64_t first = 0; first < s.N; first += chunk.size) {
      chunk.at(first);
      chunk.rest(state1, qkv);
      chunk.rest(state2, attn);
      for (int64_t t = 0; t < s.T; ++t) {
        A* const y = ys + t * tile;
        head.read(p.q, t, qkv, state1, h_q + t * tile, q, t);
        head.times(kv + t * head.kv_size, 1, ld, q, t, {y, chunk.ld});
        chunk.step(attn, y, A(s.scale), state2, h_y + t * tile, {g_one, chunk.ld});
      }
      memset(state1, 0, size_t(tile) * sizeof(A));
      memset(state2, 0, size_t(tile) * sizeof(A));
      for (int64_t t = s.T - 1; t >= 0; --t) {
        A* const y = ys + t * tile;
        chunk.back(attn, h_y + t * tile, t ? h_y + (t - 1) * tile : nullptr, {y, chunk.ld}, A(s.scale), state2,
                   chunk.rows(g_one, p.g_out, t), {g_one, chunk.ld}, rows, p.g_decay ? &g_decay : nullptr,
                   p.g_gain ? &g_gain : nullptr);
        head.outer(g_one, q, t, g_kv + t * head.kv_size, turned);  // [e, d]
        const Rows<A*> g_q = place(g_two, p.g_q, t);
        product<false>(kv + t * head.kv_size, ld, 1, s.D, s.D, static_cast<const A*>(g_one), chunk.ld, g_q.data, g_q.row, chunk.n,
                       false);
        finish(p.q, p.g_q, t, h_q, state1, g_q, y);
      }
    }
    for (int64_t first = 0; first < s.N; first += chunk.size) {
      chunk.at(first);
      if (!keep) {
        chunk.rest(state1, qkv);
        chunk.rest(state2, qkv);
        for (int64_t t = 0; t < s.T; ++t) head.read_pair(qkv, k, v, t, t, state1, state2, h_k, h_v);
      }
      memset(state1, 0, size_t(tile) * sizeof(A));
      memset(state2, 0, size_t(tile) * sizeof(A));
      for (int64_t t = s.T - 1; t >= 0; --t) {
        const A* const g = g_kv + t * head.kv_size;
        const Rows<A*> g_k = place(g_one, p.g_k, t), g_v = place(g_two, p.g_v, t);
        head.times(g, 1, ld, v, t, g_k);
        head.times(g, ld, 1, k, t, g_v);
        finish(p.k, p.g_k, t, h_k, state1, g_k, k.at(t));
        finish(p.v, p.g_v, t, h_v, state2, g_v, v.at(t));
      }
    }
    g_decay.store<A>(p.g_decay, i);
    g_gain.store<A>(p.g_gain, i);
    g_qkv_decay.store<A>(p.g_qkv_decay, i);
    g_qkv_gain.store<A>(p.g_qkv_gain, i);
  }
  return kOk;
}

}  // namespace

int spiking_self_attention_fwd(const SpikingSelfAttentionFwd& p, int64_t begin, int64_t end) {
  return p.shape.dtype == DType::f64 ? forward<double>(p, begin, end) : forward<float>(p, begin, end);
}

int spiking_self_attention_bwd(const SpikingSelfAttentionBwd& p, int64_t begin, int64_t end) {
  return p.shape.dtype == DType::f64 ? backward<double>(p, begin, end) : backward<float>(p, begin, end);
}

}  // namespace SPK_ISA

#ifdef SPK_DISPATCH
SpikingSelfAttentionFwdFn* spiking_self_attention_fwd_cpu() {
  static SpikingSelfAttentionFwdFn* const f = SPK_PICK(spiking_self_attention_fwd);
  return f;
}
SpikingSelfAttentionBwdFn* spiking_self_attention_bwd_cpu() {
  static SpikingSelfAttentionBwdFn* const f = SPK_PICK(spiking_self_attention_bwd);
  return f;
}
#endif

}  // namespace spk
