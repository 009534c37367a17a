// The native vector of floats, `floats`, with the few operations that its operators + - * do not cover, and what is built
// of them: 16 x 16 transposition and sums over 16 lanes, in an order that does not depend on the vector's width.
#pragma once
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/params.h"
#include "core/simd.h"

namespace spk {
namespace SPK_ISA {

#if defined(__AVX512F__)
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
constexpr __mmask16 kAll = 0xFFFF;  // the same instructions as the unmasked functions, whose headers g++ 12 warns about
#elif defined(__AVX2__)
typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
#elif defined(__SSE2__) || defined(__aarch64__)
typedef float floats __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(16)));
#else
typedef float floats;
typedef int32_t ints;
#endif

// What a kernel of state type A computes with: a vector of W numbers.
template <class A>
struct Vector;
template <>
struct Vector<float> {
  using type = floats;
  static constexpr int W = sizeof(floats) / sizeof(float);
};
template <>
struct Vector<double> {
  using type = double;
  static constexpr int W = 1;
};

template <class V, class A>
inline V load(const A* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class A>
inline void store(A* p, V v) {
  memcpy(p, &v, sizeof(V));
}

// Past the caches, to an address that is a multiple of the vector's size.
template <class A, class V>
inline void stream(A* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_ps(p, v);
#endif
  store(p, v);
}

// N vectors that go through a formula side by side: while one waits for a result, the others use the units.
template <class V, int N>
struct Pack {
  V v[N];

  template <class A>
  static SPK_HD Pack load(const A* p) {  // N consecutive vectors
    Pack x;
    for (int i = 0; i < N; ++i) memcpy(&x.v[i], p + i * int(sizeof(V) / sizeof(A)), sizeof(V));
    return x;
  }
  template <class A>
  static SPK_HD Pack all(A a) {
    Pack x;
    for (int i = 0; i < N; ++i) x.v[i] = V{} + a;
    return x;
  }
  template <class A>
  SPK_HD void store(A* p) const {
    for (int i = 0; i < N; ++i) memcpy(p + i * int(sizeof(V) / sizeof(A)), &v[i], sizeof(V));
  }
};
#define SPK_PACK(OP)                                                 \
  template <class V, int N>                                          \
  SPK_HD Pack<V, N> operator OP(Pack<V, N> x, const Pack<V, N>& y) { \
    for (int i = 0; i < N; ++i) x.v[i] = x.v[i] OP y.v[i];           \
    return x;                                                        \
  }                                                                  \
  template <class V, int N>                                          \
  SPK_HD Pack<V, N> operator OP(Pack<V, N> x, float y) {             \
    for (int i = 0; i < N; ++i) x.v[i] = x.v[i] OP y;                \
    return x;                                                        \
  }
SPK_PACK(+)
SPK_PACK(-)
SPK_PACK(*)
SPK_PACK(/)
#undef SPK_PACK

// 16 numbers, on every instruction set, so that sums over them add up in one order.
template <class A>
using Lanes = Pack<typename Vector<A>::type, 16 / Vector<A>::W>;

// x where it lies within the bound, or is NaN; else the bound.
#if defined(__AVX512F__)
inline floats max_(floats x, floats low) { return _mm512_maskz_max_ps(kAll, low, x); }
inline floats min_(floats x, floats high) { return _mm512_maskz_min_ps(kAll, high, x); }
#elif defined(__AVX2__)
inline floats max_(floats x, floats low) { return _mm256_max_ps(low, x); }
inline floats min_(floats x, floats high) { return _mm256_min_ps(high, x); }
#elif defined(__SSE2__)
inline floats max_(floats x, floats low) { return _mm_max_ps(low, x); }
inline floats min_(floats x, floats high) { return _mm_min_ps(high, x); }
#else
inline floats max_(floats x, floats low) { return x < low ? low : x; }
inline floats min_(floats x, floats high) { return high < x ? high : x; }
#endif

// Of the blocks of w lanes of a and b in turn, the even ones: a0 b0 a2 b2 ...; the odd ones: a1 b1 a3 b3 ...
template <int w>
inline floats even_blocks(floats a, floats b);
template <int w>
inline floats odd_blocks(floats a, floats b);
#define SPK_BLOCKS(w, EVEN, ODD)                     \
  template <>                                        \
  inline floats even_blocks<w>(floats a, floats b) { \
    return EVEN;                                     \
  }                                                  \
  template <>                                        \
  inline floats odd_blocks<w>(floats a, floats b) {  \
    return ODD;                                      \
  }
#if defined(__AVX512F__)
SPK_BLOCKS(8, _mm512_maskz_shuffle_f32x4(kAll, a, b, 0x44), _mm512_maskz_shuffle_f32x4(kAll, a, b, 0xEE))
SPK_BLOCKS(4, _mm512_mask_shuffle_f32x4(a, 0xF0F0, b, b, 0xA0), _mm512_mask_shuffle_f32x4(b, 0x0F0F, a, a, 0xF5))
SPK_BLOCKS(2, _mm512_maskz_shuffle_ps(kAll, a, b, 0x44), _mm512_maskz_shuffle_ps(kAll, a, b, 0xEE))
SPK_BLOCKS(1, _mm512_mask_moveldup_ps(a, 0xAAAA, b), _mm512_mask_movehdup_ps(b, 0x5555, a))
#elif defined(__AVX2__)
SPK_BLOCKS(4, _mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))
SPK_BLOCKS(2, _mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE))
SPK_BLOCKS(1, _mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xAA), _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xAA))
#elif defined(__SSE2__)
SPK_BLOCKS(2, _mm_movelh_ps(a, b), _mm_movehl_ps(b, a))
SPK_BLOCKS(1, _mm_movelh_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)),
           _mm_movehl_ps(_mm_unpackhi_ps(a, b), _mm_unpacklo_ps(a, b)))
#elif defined(__aarch64__)
inline float64x2_t doubles(floats a) { return vreinterpretq_f64_f32(a); }
SPK_BLOCKS(2, vreinterpretq_f32_f64(vtrn1q_f64(doubles(a), doubles(b))), vreinterpretq_f32_f64(vtrn2q_f64(doubles(a), doubles(b))))
SPK_BLOCKS(1, vtrn1q_f32(a, b), vtrn2q_f32(a, b))
#endif
#undef SPK_BLOCKS

template <int w, class V, int N>
inline void transpose_vectors(V (&v)[N]) {
  if constexpr (w >= 1) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & w) continue;
      const V a = v[i], b = v[i + w];
      v[i] = even_blocks<w>(a, b);
      v[i + w] = odd_blocks<w>(a, b);
    }
    transpose_vectors<w / 2>(v);
  }
}

// d(j)[i] = s(i)[j] for i, j < 16: d and s give the addresses of rows. STREAM: to lines of 64 bytes past the caches.
template <class A, bool STREAM = false, class To, class From>
inline void transpose16(To d, From s) {
  using V = typename Vector<A>::type;
  constexpr int W = Vector<A>::W;
  for (int j = 0; j < 16; j += W) {
    for (int i = 0; i < 16; i += W) {
      V v[W];
      for (int k = 0; k < W; ++k) v[k] = load<V>(s(i + k) + j);
      transpose_vectors<W / 2>(v);
      for (int k = 0; k < W; ++k) STREAM ? stream(d(j + k) + i, v[k]) : store(d(j + k) + i, v[k]);
    }
  }
}

template <int w, class V, int N>
inline void sum_vectors(V (&v)[N]) {
  if constexpr (w >= 1) {
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) v[i] = even_blocks<w>(v[i], v[i + w]) + odd_blocks<w>(v[i], v[i + w]);
    sum_vectors<w / 2>(v);
  }
}

// d[j] = sum of s[j][0 ... 15] for j < 16, each by halving: lane i + lane i + 8, then i + 4, i + 2, i + 1.
template <class A>
inline void sum16(A* d, const A* s) {
  using V = typename Vector<A>::type;
  constexpr int W = Vector<A>::W;
  for (int j = 0; j < 16; j += W) {
    V v[W];
    for (int k = 0; k < W; ++k) {
      V part[16 / W];
      for (int i = 0; i < 16 / W; ++i) part[i] = load<V>(s + (j + k) * 16 + i * W);
      for (int n = 8 / W; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) part[i] = part[i] + part[i + n];
      v[k] = part[0];
    }
    sum_vectors<W / 2>(v);
    store(d + j, v[0]);
  }
}

}  // namespace SPK_ISA
}  // namespace spk
