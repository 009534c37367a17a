// spiking_self_attention on the CPU; compiled once per instruction set (core/dispatch.h). A thread takes a head after the
// other and walks its N columns in chunks: first k^T v of every step, then q's chunks through the neuron, time innermost.
// Every sum has an order that only the sizes fix: products are multiplied and added apart, in lanes of 64 bytes.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/simd.h"
#include "core/surrogate.h"
#include "lif/neuron.h"
#include "spiking_self_attention/spiking_self_attention.h"

namespace spk {
namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))
// Accumulators stay in registers only where the loops over them are gone.
#define SPK_UNROLL _Pragma("GCC unroll 16")

template <class A>
struct Lanes {
  static constexpr int count = 64 / sizeof(A);
  typedef A type __attribute__((vector_size(64), may_alias));
};

// Tiles of accumulators that fit the registers; no result depends on them.
#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3, kDotRows = 4, kDotColumns = 4;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 4, kVectors = 1, kDotRows = 2, kDotColumns = 2;
#else
constexpr int kRows = 2, kVectors = 1, kDotRows = 1, kDotColumns = 2;
#endif

constexpr int kPad = 16;                     // rows of a tile are padded with zeros to whole lanes
constexpr int64_t kHeld = 1 << 18;           // numbers of a chunk over all steps that backward holds, about
constexpr int64_t kLeast = 64, kMost = 256;  // columns of a chunk

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

int64_t chunk_of(const AttentionShape& s) {
  const int64_t fit = kHeld / (4 * s.T * s.D) / kPad * kPad, n = fit < kLeast ? kLeast : fit > kMost ? kMost : fit;
  return s.N < n ? s.N : n;
}

// ---- products ------------------------------------------------------------------------------------------------------

// c[r, n] = sum over k of a[r, k] b[k, n], k ascending; a's strides are free, rows of b and c are `ld` apart.
template <int R, int W, class A>
inline void product_tile(const A* a, int64_t row, int64_t column, int64_t K, const A* b, A* c, int64_t ld) {
  using V = typename Lanes<A>::type;
  V sum[R][W] = {};
  for (int64_t k = 0; k < K; ++k) {
    const V* in = reinterpret_cast<const V*>(b + k * ld);
    SPK_UNROLL
    for (int r = 0; r < R; ++r) {
      SPK_UNROLL
      for (int w = 0; w < W; ++w) sum[r][w] += a[r * row + k * column] * in[w];
    }
  }
  SPK_UNROLL
  for (int r = 0; r < R; ++r) {
    SPK_UNROLL
    for (int w = 0; w < W; ++w) reinterpret_cast<V*>(c + r * ld)[w] = sum[r][w];
  }
}

template <int W, class A>
SPK_NOINLINE void product_panel(const A* a, int64_t row, int64_t column, int64_t M, int64_t K, const A* b, A* c, int64_t ld) {
  int64_t r = 0;
  for (; r + kRows <= M; r += kRows) product_tile<kRows, W>(a + r * row, row, column, K, b, c + r * ld, ld);
  for (; r < M; ++r) product_tile<1, W>(a + r * row, row, column, K, b, c + r * ld, ld);
}

template <class A>
void product(const A* a, int64_t row, int64_t column, int64_t M, int64_t K, const A* b, A* c, int64_t ld, int64_t n) {
  constexpr int L = Lanes<A>::count;
  int64_t j = 0;
  for (; j + kVectors * L <= n; j += kVectors * L) product_panel<kVectors>(a, row, column, M, K, b + j, c + j, ld);
  for (; j < n; j += L) product_panel<1>(a, row, column, M, K, b + j, c + j, ld);
}

// out[r, c] (+)= sum over n of x[r, n] y[c, n]: lane by lane, then the lanes as a tree.
template <int R, int C, class A>
inline void dot_tile(const A* x, const A* y, int64_t ld, int64_t n, A* out, int64_t out_ld, bool add) {
  using V = typename Lanes<A>::type;
  constexpr int L = Lanes<A>::count;
  V sum[R][C] = {};
  for (int64_t j = 0; j < n; j += L) {
    SPK_UNROLL
    for (int r = 0; r < R; ++r) {
      SPK_UNROLL
      for (int c = 0; c < C; ++c)
        sum[r][c] += *reinterpret_cast<const V*>(x + r * ld + j) * *reinterpret_cast<const V*>(y + c * ld + j);
    }
  }
  alignas(64) A s[R * C * L];
#if defined(__AVX512F__)
  if (R * C == 16 && L == 16) {  // the same tree for 16 sums at once: halves of two vectors meet in one
    typedef int32_t I __attribute__((vector_size(64)));
    const I low[4] = {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                      {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                      {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                      {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}};
    const int place[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};  // of the sum of each vector
    typedef float F __attribute__((vector_size(64), may_alias));
    F m[16];
    SPK_UNROLL
    for (int i = 0; i < 16; ++i) m[i] = (F)sum[i / C][i % C];
    SPK_UNROLL
    for (int level = 0, width = 8; level < 4; ++level, width /= 2) {
      const I high = low[level] + width;
      SPK_UNROLL
      for (int i = 0; i < width; ++i)
        m[i] = __builtin_shuffle(m[2 * i], m[2 * i + 1], low[level]) + __builtin_shuffle(m[2 * i], m[2 * i + 1], high);
    }
    *reinterpret_cast<F*>(s) = m[0];
    for (int i = 0; i < 16; ++i) {
      A& d = out[i / C * out_ld + i % C];
      d = add ? d + s[place[i]] : s[place[i]];
    }
    return;
  }
#endif
  SPK_UNROLL
  for (int r = 0; r < R; ++r) {
    SPK_UNROLL
    for (int c = 0; c < C; ++c) reinterpret_cast<V*>(s)[r * C + c] = sum[r][c];
  }
  for (int i = 0; i < R * C; ++i) {
    A* const lane = s + i * L;
    for (int width = L / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
    A& d = out[i / C * out_ld + i % C];
    d = add ? d + lane[0] : lane[0];
  }
}

template <int R, class A>
SPK_NOINLINE void dot_rows(const A* x, const A* y, int64_t ld, int64_t n, int64_t D, A* out, int64_t out_ld, bool add) {
  int64_t c = 0;
  for (; c + kDotColumns <= D; c += kDotColumns) dot_tile<R, kDotColumns>(x, y + c * ld, ld, n, out + c, out_ld, add);
  for (; c < D; ++c) dot_tile<R, 1>(x, y + c * ld, ld, n, out + c, out_ld, add);
}

template <class A>
void dots(const A* x, const A* y, int64_t ld, int64_t n, int64_t D, A* out, int64_t out_ld, bool add) {
  int64_t r = 0;
  for (; r + kDotRows <= D; r += kDotRows) dot_rows<kDotRows>(x + r * ld, y, ld, n, D, out + r * out_ld, out_ld, add);
  for (; r < D; ++r) dot_rows<1>(x + r * ld, y, ld, n, D, out + r * out_ld, out_ld, add);
}

// ---- products of spikes --------------------------------------------------------------------------------------------

constexpr int kWords = kMost / 64;  // of a row's bits

#if defined(__AVX512F__)
// Counting bits of whole registers is beyond what this object is compiled for.
bool counts_bits() { return __builtin_cpu_supports("avx512vpopcntdq"); }

// Rows of n numbers to bits, word w of row r at bits[r * row_step + w * word_step]; false where one is neither 0 nor 1.
SPK_NOINLINE bool to_bits(uint64_t* bits, int64_t row_step, int64_t word_step, const float* s, int64_t row, int64_t D, int64_t n) {
  const __m512 one = _mm512_set1_ps(1.f), zero = _mm512_setzero_ps();
  __mmask16 spikes = 0xffff;
  for (int64_t r = 0; r < D; ++r, s += row)
    for (int w = 0; w < kWords; ++w) {
      uint64_t word = 0;
      for (int64_t j = w * 64; j < n && j < w * 64 + 64; j += 16) {
        const __mmask16 within = n - j < 16 ? __mmask16((1u << (n - j)) - 1) : __mmask16(0xffff);
        const __m512 x = _mm512_maskz_loadu_ps(within, s + j);
        const __mmask16 fired = _mm512_cmp_ps_mask(x, one, _CMP_EQ_OQ);
        spikes &= fired | _mm512_cmp_ps_mask(x, zero, _CMP_EQ_OQ);
        word |= uint64_t(fired) << (j - w * 64);
      }
      bits[r * row_step + w * word_step] = word;
    }
  return spikes == 0xffff;
}

// out[r, c] (+)= bits that x[r] and y[c] share; x: [D, kWords], y: [kWords, padded D].
__attribute__((target("avx512vpopcntdq"))) SPK_NOINLINE void count_bits(const uint64_t* x, const uint64_t* y, int64_t D, int words,
                                                                        float* out, int64_t ld, bool add) {
  for (int64_t r = 0; r < D; ++r)
    for (int64_t c = 0; c < D; c += 8) {
      __m512i sum = _mm512_setzero_si512();
      for (int w = 0; w < words; ++w) {
        const __m512i both = _mm512_and_si512(_mm512_set1_epi64(int64_t(x[r * kWords + w])), _mm512_loadu_si512(y + w * ld + c));
        sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(both));
      }
      float* const d = out + r * ld + c;
      const __m256 count = _mm512_cvtepi64_ps(sum);
      _mm256_storeu_ps(d, add ? _mm256_add_ps(_mm256_loadu_ps(d), count) : count);
    }
}
#endif

// ---- rows of neurons -----------------------------------------------------------------------------------------------

// The neuron of one head.
template <class A>
struct Cell {
  Neuron<A> c;
  A decay, gain, a, b;
  bool hard, detach;
  int32_t surrogate;

  Cell(const AttentionNeuron& p, int64_t head)
      : decay(pick(p.lif.decay_c, p.lif.decay, p.lif.C, head)),
        gain(pick(p.lif.gain_c, p.lif.gain, p.lif.C, head)),
        a(A(p.a)),
        b(A(p.b)),
        hard(p.lif.hard),
        detach(p.detach),
        surrogate(p.surrogate) {
    const A threshold = A(p.lif.threshold);
    const A above = sizeof(A) == 4 ? A(nextafterf(float(threshold), INFINITY)) : A(nextafter(double(threshold), INFINITY));
    // Nothing lies above infinity, and no potential is >= NaN.
    c = {A(p.lif.rest), !p.lif.strict ? threshold : above > threshold ? above : A(NAN), threshold, A(p.lif.reset_by)};
  }
  static A pick(const void* per_head, double number, int64_t C, int64_t head) {
    return per_head ? static_cast<const A*>(per_head)[C == 1 ? 0 : head] : A(number);
  }
};

// One step of a row on the currents factor * x; s may be x.
template <bool HARD, bool AT_ZERO, class A>
SPK_NOINLINE void step_row(const A* x, A factor, A* v, A* h, A* s, A decay, A gain, const Neuron<A> c, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const A hi = charge(v[i], factor * x[i], decay, gain, AT_ZERO ? A(0) : c.rest);
    h[i] = hi;
    s[i] = hi >= c.fire_at ? A(1) : A(0);
    v[i] = reset(hi, HARD, c);
  }
}

template <Surrogate K, class A>
SPK_NOINLINE void surrogate_row(A* sg, const A* h, A threshold, A a, A b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sg[i] = surrogate<K, A>(h[i] - threshold, a, b);
}

// g_v comes in as the gradient of v[t] and goes out as that of v[t-1]; g_x = factor * that of the current; g_x may be g_s.
template <bool HARD, bool DETACH, class A>
SPK_NOINLINE void back_row(const A* h, const A* sg, const A* g_s, A* g_v, A* g, A* g_x, A factor, A decay, A gain,
                           const Neuron<A> c, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const A gi = step_backward(h[i], g_s[i], g_v[i], A(0), sg[i], HARD, DETACH, c);
    g[i] = gi;
    g_x[i] = factor * (gain * gi);
    g_v[i] = decay * gi;
  }
}

// A sum over a head, in double: the lanes of a row, these as a tree, row after row.
struct Sum {
  static constexpr int kLanes = 16;
  double total = 0;

  template <class A>
  void add(const A* g, const A* x, A factor, A minus, int64_t n) {
    double lanes[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const int m = int(n - i < kLanes ? n - i : kLanes);
      for (int j = 0; j < m; ++j) lanes[j] += double(g[i + j]) * double(factor * x[i + j] - minus);
    }
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    total += lanes[0];
  }
  template <class A>
  void store(void* out, int64_t head) const {
    if (out) static_cast<A*>(out)[head] = A(total);
  }
};

template <class A>
void reset_row(A* v, const A* h, bool hard, const Neuron<A> c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) v[i] = reset(h[i], hard, c);
}

// ---- rows of memory ------------------------------------------------------------------------------------------------

inline float number(float x) { return x; }
inline double number(double x) { return x; }
inline float number(bf16 x) { return to_float(x); }
inline float number(f16 x) { return to_float(x); }
inline void put(float* d, float x) { *d = x; }
inline void put(double* d, double x) { *d = x; }
inline void put(bf16* d, float x) { *d = to_bf16(x); }
inline void put(f16* d, float x) { *d = to_f16(x); }

template <class T, class A>
SPK_NOINLINE void load_rows(A* d, int64_t ld, const T* s, int64_t row, int64_t column, int64_t D, int64_t n) {
  for (int64_t r = 0; r < D; ++r, d += ld, s += row)
    if (column == 1)
      load_row(d, s, int(n));
    else
      for (int64_t i = 0; i < n; ++i) d[i] = number(s[i * column]);
}
template <class T, class A>
SPK_NOINLINE void store_rows(T* d, int64_t row, int64_t column, const A* s, int64_t ld, int64_t D, int64_t n) {
  for (int64_t r = 0; r < D; ++r, d += row, s += ld)
    if (column == 1)
      store_row(d, s, int(n));
    else
      for (int64_t i = 0; i < n; ++i) put(d + i * column, s[i]);
}
template <class A>
SPK_NOINLINE void load_bits(A* d, int64_t ld, const uint8_t* s, int bit, int64_t row, int64_t column, int64_t D, int64_t n) {
  for (int64_t r = 0; r < D; ++r, d += ld, s += row)
    for (int64_t i = 0; i < n; ++i) d[i] = A(s[i * column] >> bit & 1);
}
template <class A>
SPK_NOINLINE void store_bits(uint8_t* d, int bit, int64_t row, int64_t column, const A* s, int64_t ld, int64_t D, int64_t n) {
  for (int64_t r = 0; r < D; ++r, d += row, s += ld)
    for (int64_t i = 0; i < n; ++i) d[i * column] = uint8_t((bit ? d[i * column] : 0) | (s[i] != 0 ? 1 << bit : 0));
}

// ---- one head ------------------------------------------------------------------------------------------------------

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
  void load(A* d, const SequenceIn& x, int64_t t) const {
    const int64_t at = offset(x, t);
    if (p.packed)
      load_bits(d, ld, static_cast<const uint8_t*>(x.data) + at, int(t % 8), x.row, x.column, p.D, n);
    else
      load_floats(d, x, at);
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

  // ---- neurons over the chunk: v, h, s and the like are tiles

  void rest(A* v, const Cell<A>& cell) const {
    for (int64_t i = 0; i < tile; ++i) v[i] = cell.c.rest;
  }
  // Null h: not wanted.
  void step(const Cell<A>& cell, const A* x, A factor, A* v, A* h, A* s, A* row) const {
    const auto run = !cell.hard ? step_row<false, true, A> : cell.c.rest == 0 ? step_row<true, true, A> : step_row<true, false, A>;
    for (int64_t r = 0; r < p.D; ++r) {
      const int64_t i = r * ld;
      run(x + i, factor, v + i, h ? h + i : row, s + i, cell.decay, cell.gain, cell.c, n);
    }
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
  // g: gradient of the spikes in, of x out. h_before: of step t-1, null at t = 0; null sums and x: not wanted.
  void back(const Cell<A>& cell, const A* h, const A* h_before, const A* x, A factor, A* g_v, A* g, A* rows, Sum* g_decay,
            Sum* g_gain) const {
    A *const sg = rows, *const g_h = rows + ld;
    const auto run = cell.hard ? (cell.detach ? back_row<true, true, A> : back_row<true, false, A>)
                               : (cell.detach ? back_row<false, true, A> : back_row<false, false, A>);
    for (int64_t r = 0; r < p.D; ++r) {
      const int64_t i = r * ld;
      surrogate_of(cell, sg, h + i);
      run(h + i, sg, g + i, g_v + i, g_h, g + i, factor, cell.decay, cell.gain, cell.c, n);
      if (g_gain) g_gain->add(g_h, x + i, factor, A(0), n);
      if (g_decay && h_before) {
        reset_row(sg, h_before + i, cell.hard, cell.c, n);
        g_decay->add(g_h, sg, A(1), cell.c.rest, n);
      }
    }
  }
};

// Working space in 64-byte units, all zero: the padding of tiles must not hold NaN.
template <class A>
struct Scratch {
  A* base;
  A* next;
  explicit Scratch(int64_t numbers) {
    const size_t bytes = (size_t(numbers) * sizeof(A) + 63) / 64 * 64;
    base = next = static_cast<A*>(aligned_alloc(64, bytes));
    if (base) memset(base, 0, bytes);
  }
  ~Scratch() { free(base); }
  A* take(int64_t numbers) {
    A* p = next;
    next += numbers;
    return p;
  }
};

template <class A, class P>
struct Head {
  const P& p;
  const AttentionShape& s;
  Chunk<A> chunk;
  const int64_t kv_ld, kv_size;
  uint64_t* bits = nullptr;  // [D, kWords] of k and [kWords, kv_ld] of v

  explicit Head(const P& p) : p(p), s(p.shape), chunk(p.shape), kv_ld(padded(s.D)), kv_size(s.D * kv_ld) {}

  // What the scratch space of `bits` takes, in numbers.
  int64_t bits_size() const { return 2 * kWords * (s.D + kv_ld); }
  // Spikes of step t of an operand into s; from currents also its potentials v, and h unless null.
  void spikes(const SequenceIn& x, int64_t t, const Cell<A>& cell, A* v, A* h, A* out, A* row) const {
    chunk.load(out, x, t);
    if (s.currents) chunk.step(cell, out, A(1), v, h, out, row);
  }
  // kv[t, d, e] = sum over n of k[d, n] v[e, n], for every t.
  void key_value(const Cell<A>& cell, A* kv, A* k, A* v, A* k_state, A* v_state, A* row) {
    for (int64_t first = 0; first < s.N; first += chunk.size) {
      chunk.at(first);
      if (s.currents) {
        chunk.rest(k_state, cell);
        chunk.rest(v_state, cell);
      }
      for (int64_t t = 0; t < s.T; ++t) {
        A* const out = kv + t * kv_size;
        if (count(t, cell, out, k, v, k_state, v_state, row, first > 0)) continue;
        if (!s.currents) {
          chunk.load(k, p.k, t);
          chunk.load(v, p.v, t);
        }
        dots(k, v, chunk.ld, padded(chunk.n), s.D, out, kv_ld, first > 0);
      }
    }
  }
  // The same by bits, where k and v hold spikes; from currents their tiles do, afterwards, whatever this returns.
  bool count(int64_t t, const Cell<A>& cell, A* kv, A* k, A* v, A* k_state, A* v_state, A* row, bool add) const {
    if (s.currents) {
      spikes(p.k, t, cell, k_state, nullptr, k, row);
      spikes(p.v, t, cell, v_state, nullptr, v, row);
    }
    return count_spikes(t, kv, k, v, add);
  }
  bool count_spikes(int64_t, double*, double*, double*, bool) const { return false; }
  bool count_spikes(int64_t t, float* kv, float* k, float* v, bool add) const {
#if defined(__AVX512F__)
    if (!bits || !counts_bits()) return false;
    uint64_t *const k_bits = bits, *const v_bits = bits + s.D * kWords;
    return read_bits(k_bits, kWords, 1, p.k, t, k) && read_bits(v_bits, 1, kv_ld, p.v, t, v) &&
           (count_bits(k_bits, v_bits, s.D, int((chunk.n + 63) / 64), kv, kv_ld, add), true);
#else
    (void)t, (void)kv, (void)k, (void)v, (void)add;
    return false;
#endif
  }
#if defined(__AVX512F__)
  bool read_bits(uint64_t* out, int64_t row_step, int64_t word_step, const SequenceIn& x, int64_t t, float* tile) const {
    const bool direct = !s.currents && !s.packed && s.dtype == DType::f32 && x.column == 1;
    if (!direct && !s.currents) chunk.load(tile, x, t);
    const float* const from = direct ? static_cast<const float*>(x.data) + chunk.offset(x, t) : tile;
    return to_bits(out, row_step, word_step, from, direct ? x.row : chunk.ld, s.D, chunk.n);
  }
#endif
  // y[e, n] = sum over d of kv[d, e] q[d, n].
  void query(const A* kv, const A* q, A* y) const { product(kv, 1, kv_ld, s.D, s.D, q, y, chunk.ld, padded(chunk.n)); }
};

template <class A>
int forward(const SpikingSelfAttentionFwd& p, int64_t begin, int64_t end) {
  Head<A, SpikingSelfAttentionFwd> head(p);
  Chunk<A>& chunk = head.chunk;
  const AttentionShape& s = p.shape;
  Scratch<A> scratch(head.bits_size() + s.T * head.kv_size + 4 * chunk.tile + chunk.ld);
  if (!scratch.base) return kOutOfMemory;
  A *const kv = scratch.take(s.T * head.kv_size), *const one = scratch.take(chunk.tile), *const two = scratch.take(chunk.tile),
           *const state1 = scratch.take(chunk.tile), *const state2 = scratch.take(chunk.tile), *const row = scratch.take(chunk.ld);
  head.bits = reinterpret_cast<uint64_t*>(scratch.take(head.bits_size()));
  for (int64_t i = begin; i < end; ++i) {
    chunk.at_head(i);
    const Cell<A> attn(p.attn, chunk.head), qkv(p.qkv, chunk.head);
    head.key_value(qkv, kv, one, two, state1, state2, row);
    for (int64_t first = 0; first < s.N; first += chunk.size) {
      chunk.at(first);
      chunk.rest(state1, qkv);
      chunk.rest(state2, attn);
      for (int64_t t = 0; t < s.T; ++t) {
        head.spikes(p.q, t, qkv, state1, nullptr, one, row);
        head.query(kv + t * head.kv_size, one, two);
        chunk.step(attn, two, A(s.scale), state2, nullptr, two, row);
        chunk.store(p.out, t, two);
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
  const int64_t tile = chunk.tile, sequence = s.T * tile;
  Scratch<A> scratch(head.bits_size() + 2 * s.T * head.kv_size + 4 * sequence + 4 * tile + 2 * chunk.ld);
  if (!scratch.base) return kOutOfMemory;
  A *const kv = scratch.take(s.T * head.kv_size), *const g_kv = scratch.take(s.T * head.kv_size);
  // Two operands over time and the potentials of two neurons; gradients, or two states while time goes forward.
  A *const one = scratch.take(sequence), *const two = scratch.take(sequence), *const h_one = scratch.take(sequence),
           *const h_two = scratch.take(sequence), *const g_one = scratch.take(tile), *const g_two = scratch.take(tile),
           *const state1 = scratch.take(tile), *const state2 = scratch.take(tile), *const rows = scratch.take(2 * chunk.ld);
  head.bits = reinterpret_cast<uint64_t*>(scratch.take(head.bits_size()));
  const bool qkv_gain = s.currents && p.g_qkv_gain, qkv_decay = s.currents && p.g_qkv_decay;

  for (int64_t i = begin; i < end; ++i) {
    chunk.at_head(i);
    const Cell<A> attn(p.attn, chunk.head), qkv(p.qkv, chunk.head);
    Sum g_decay, g_gain, g_qkv_decay, g_qkv_gain;
    // From the gradient of an operand's spikes in g to that of the operand; h: its potentials, g_v: of its potential.
    const auto finish = [&](const SequenceIn& x, const SequenceOut& g_x, int64_t t, const A* h, A* g_v, A* g, A* current) {
      if (s.currents) {
        if (qkv_gain) chunk.load(current, x, t);
        chunk.back(qkv, h + t * tile, t ? h + (t - 1) * tile : nullptr, current, A(1), g_v, g, rows,
                   qkv_decay ? &g_qkv_decay : nullptr, qkv_gain ? &g_qkv_gain : nullptr);
      }
      chunk.store(g_x, t, g);
    };

    head.key_value(qkv, kv, one, two, state1, state2, rows);
    for (int64_t first = 0; first < s.N; first += chunk.size) {
      chunk.at(first);
      chunk.rest(state1, qkv);
      chunk.rest(state2, attn);
      for (int64_t t = 0; t < s.T; ++t) {
        A *const q = one + t * tile, *const y = two + t * tile;
        head.spikes(p.q, t, qkv, state1, h_two + t * tile, q, rows);
        head.query(kv + t * head.kv_size, q, y);
        chunk.step(attn, y, A(s.scale), state2, h_one + t * tile, g_one, rows);
      }
      memset(state1, 0, size_t(tile) * sizeof(A));
      memset(state2, 0, size_t(tile) * sizeof(A));
      for (int64_t t = s.T - 1; t >= 0; --t) {
        A *const q = one + t * tile, *const y = two + t * tile;
        chunk.load(g_one, p.g_out, t);
        chunk.back(attn, h_one + t * tile, t ? h_one + (t - 1) * tile : nullptr, y, A(s.scale), state2, g_one, rows,
                   p.g_decay ? &g_decay : nullptr, p.g_gain ? &g_gain : nullptr);
        dots(q, g_one, chunk.ld, padded(chunk.n), s.D, g_kv + t * head.kv_size, head.kv_ld, first > 0);
        product(kv + t * head.kv_size, head.kv_ld, 1, s.D, s.D, g_one, g_two, chunk.ld, padded(chunk.n));
        finish(p.q, p.g_q, t, h_two, state1, g_two, y);
      }
    }
    for (int64_t first = 0; first < s.N; first += chunk.size) {
      chunk.at(first);
      if (s.currents) {
        chunk.rest(state1, qkv);
        chunk.rest(state2, qkv);
      }
      for (int64_t t = 0; t < s.T; ++t) {
        head.spikes(p.k, t, qkv, state1, h_one + t * tile, one + t * tile, rows);
        head.spikes(p.v, t, qkv, state2, h_two + t * tile, two + t * tile, rows);
      }
      memset(state1, 0, size_t(tile) * sizeof(A));
      memset(state2, 0, size_t(tile) * sizeof(A));
      for (int64_t t = s.T - 1; t >= 0; --t) {
        A *const k = one + t * tile, *const v = two + t * tile, *const g = g_kv + t * head.kv_size;
        product(g, head.kv_ld, 1, s.D, s.D, v, g_one, chunk.ld, padded(chunk.n));
        product(g, 1, head.kv_ld, s.D, s.D, k, g_two, chunk.ld, padded(chunk.n));
        finish(p.k, p.g_k, t, h_one, state1, g_one, k);
        finish(p.v, p.g_v, t, h_two, state2, g_two, v);
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
