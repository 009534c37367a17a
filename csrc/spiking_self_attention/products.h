// Products of tiles of floats. Every sum has an order that only the sizes fix: products are multiplied and added apart.
#pragma once
#include <stdint.h>
#include <string.h>

namespace spk {
namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))
// Accumulators stay in registers only where the loops over them are gone.
#define SPK_UNROLL _Pragma("GCC unroll 16")

// The machine's vector: wider ones are taken apart badly.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <class A>
struct Lanes {
  static constexpr int count = kVectorBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef A anywhere __attribute__((vector_size(kVectorBytes), may_alias, aligned(sizeof(A))));
};

constexpr int kPad = 16;  // rows of a tile are padded with zeros to whole lanes
inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Tiles of accumulators that fit the registers; no result depends on them.
#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3, kDotRows = 4, kDotColumns = 4, kFourRows = 4, kFourVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2, kDotRows = kVectorBytes / 16, kDotColumns = 2, kFourRows = 2, kFourVectors = 2;
#endif

// c[r, n] = sum over k of a[r, k] b[k, n], k ascending, or FOUR products at a time and then their sums; a's strides are
// free. Of c, n columns are written, or added to.
template <bool FOUR, int R, int W, class A>
inline void product_tile(const A* a, int64_t row, int64_t column, int64_t K, const A* b, int64_t b_ld, A* c, int64_t ld, int64_t n,
                         bool add) {
  using V = typename Lanes<A>::type;
  using Anywhere = typename Lanes<A>::anywhere;
  V sum[R][W] = {};
  for (int64_t k = 0; k < K;) {
    V four[R][W] = {};
    const int64_t end = FOUR && k + 4 < K ? k + 4 : FOUR ? K : k + 1;
    for (; k < end; ++k) {
      const V* in = reinterpret_cast<const V*>(b + k * b_ld);
      SPK_UNROLL
      for (int r = 0; r < R; ++r) {
        SPK_UNROLL
        for (int w = 0; w < W; ++w) (FOUR ? four : sum)[r][w] += a[r * row + k * column] * in[w];
      }
    }
    if (FOUR) {
      SPK_UNROLL
      for (int r = 0; r < R; ++r) {
        SPK_UNROLL
        for (int w = 0; w < W; ++w) sum[r][w] += four[r][w];
      }
    }
  }
  SPK_UNROLL
  for (int r = 0; r < R; ++r) {
    SPK_UNROLL
    for (int w = 0; w < W; ++w) {
      A* const to = c + r * ld + w * Lanes<A>::count;
      if (W > 1 || n >= Lanes<A>::count) {
        Anywhere* const d = reinterpret_cast<Anywhere*>(to);
        *d = add ? *d + sum[r][w] : sum[r][w];
      } else if (add) {
        for (int i = 0; i < n; ++i) to[i] += sum[r][w][i];
      } else {
        memcpy(to, &sum[r][w], size_t(n) * sizeof(A));
      }
    }
  }
}

// W > 1: n >= W whole vectors.
template <bool FOUR, int W, class A>
SPK_NOINLINE void product_panel(const A* a, int64_t row, int64_t column, int64_t M, int64_t K, const A* b, int64_t b_ld, A* c,
                                int64_t ld, int64_t n, bool add) {
  constexpr int R = FOUR ? kFourRows : kRows;
  int64_t r = 0;
  for (; r + R <= M; r += R) product_tile<FOUR, R, W>(a + r * row, row, column, K, b, b_ld, c + r * ld, ld, n, add);
  for (; r < M; ++r) product_tile<FOUR, 1, W>(a + r * row, row, column, K, b, b_ld, c + r * ld, ld, n, add);
}

template <bool FOUR, class A>
void product(const A* a, int64_t row, int64_t column, int64_t M, int64_t K, const A* b, int64_t b_ld, A* c, int64_t ld, int64_t n,
             bool add) {
  constexpr int L = Lanes<A>::count, W = FOUR ? kFourVectors : kVectors;
  int64_t j = 0;
  for (; j + W * L <= n; j += W * L) product_panel<FOUR, W>(a, row, column, M, K, b + j, b_ld, c + j, ld, n - j, add);
  for (; j < n; j += L) product_panel<FOUR, 1>(a, row, column, M, K, b + j, b_ld, c + j, ld, n - j, add);
}

constexpr int64_t kSpikesAtOnce = 256;  // of which a product with spikes makes one sum

// product, with the sums in the order of spike_product (spikes.h): the same bits where b holds spikes.
template <class A>
void product_by_four(const A* a, int64_t row, int64_t column, int64_t M, int64_t K, const A* b, int64_t b_ld, A* c, int64_t ld,
                     int64_t n, bool add) {
  for (int64_t k = 0; k < K; k += kSpikesAtOnce, add = true)
    product<true>(a + k * column, row, column, M, K - k < kSpikesAtOnce ? K - k : kSpikesAtOnce, b + k * b_ld, b_ld, c, ld, n, add);
}

// out[r, c] (+)= sum over n of x[r, n] y[c, n]: 64 bytes of lanes, one by one, then these as a tree.
template <int R, int C, class A>
inline void dot_tile(const A* x, const A* y, int64_t ld, int64_t n, A* out, int64_t out_ld, bool add) {
  using V = typename Lanes<A>::type;
  constexpr int L = 64 / sizeof(A), parts = 64 / kVectorBytes;
  V sum[R][C][parts] = {};
  for (int64_t j = 0; j < n; j += L) {
    SPK_UNROLL
    for (int i = 0; i < parts; ++i) {
      const int64_t at = j + i * Lanes<A>::count;
      SPK_UNROLL
      for (int r = 0; r < R; ++r) {
        SPK_UNROLL
        for (int c = 0; c < C; ++c)
          sum[r][c][i] += *reinterpret_cast<const V*>(x + r * ld + at) * *reinterpret_cast<const V*>(y + c * ld + at);
      }
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
    for (int i = 0; i < 16; ++i) m[i] = (F)sum[i / C][i % C][0];
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
    for (int c = 0; c < C; ++c) {
      SPK_UNROLL
      for (int i = 0; i < parts; ++i) reinterpret_cast<V*>(s)[(r * C + c) * parts + i] = sum[r][c][i];
    }
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

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
