// Rows of half-precision numbers to and from float. The loops over float rows themselves are left to the compiler's
// vectoriser; only what it cannot do (fp16 without hardware types) is written out.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace spk {
namespace SPK_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

inline bf16 to_bf16(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded)};
}

inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // Multiplying by 2^112 rebiases the exponent and normalises subnormals in one exact step; inf and NaN need their own.
  const float scaled = bits_to_float(rest << 13) * bits_to_float(0x77800000u);
  const uint32_t bits = rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : float_to_bits(scaled);
  return bits_to_float(bits | sign);
}

inline f16 to_f16(float f) {  // round to nearest even
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  uint32_t r;
  if (a > 0x7f800000u)
    r = 0x7e00u;
  else if (a >= 0x477ff000u)
    r = 0x7c00u;               // rounds to infinity
  else if (a < 0x38800000u) {  // subnormal: let the addition of 0.5 do the rounding
    r = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u;
  } else {
    r = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(r | sign)};
}

inline void load_row(float* __restrict__ d, const bf16* __restrict__ s, int n) {
  for (int i = 0; i < n; ++i) d[i] = to_float(s[i]);
}
inline void store_row(bf16* __restrict__ d, const float* __restrict__ s, int n) {
  for (int i = 0; i < n; ++i) d[i] = to_bf16(s[i]);
}

inline void load_row(float* __restrict__ d, const f16* __restrict__ s, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(d + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
#elif defined(__aarch64__)
  for (; i + 4 <= n; i += 4) vst1q_f32(d + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&s[i].bits))));
#endif
  for (; i < n; ++i) d[i] = to_float(s[i]);
}
inline void store_row(f16* __restrict__ d, const float* __restrict__ s, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(d + i), _mm256_cvtps_ph(_mm256_loadu_ps(s + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  for (; i + 4 <= n; i += 4) vst1_u16(&d[i].bits, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(s + i))));
#endif
  for (; i < n; ++i) d[i] = to_f16(s[i]);
}

inline void load_row(float* __restrict__ d, const float* __restrict__ s, int n) { memcpy(d, s, n * sizeof(float)); }
inline void load_row(double* __restrict__ d, const double* __restrict__ s, int n) { memcpy(d, s, n * sizeof(double)); }
inline void store_row(float* __restrict__ d, const float* __restrict__ s, int n) { memcpy(d, s, n * sizeof(float)); }
inline void store_row(double* __restrict__ d, const double* __restrict__ s, int n) { memcpy(d, s, n * sizeof(double)); }

// A finished row of an output too large to stay in cache, past the cache: an ordinary store would first read the line.
template <class T>
inline void stream_row(T* __restrict__ d, const T* __restrict__ s, int n) {
#if defined(__AVX512F__)
  constexpr int kStep = 64 / sizeof(T);
  if (reinterpret_cast<uintptr_t>(d) % 64 == 0 && n % kStep == 0) {
    for (int i = 0; i < n; i += kStep) _mm512_stream_si512(reinterpret_cast<__m512i*>(d + i), _mm512_loadu_si512(s + i));
    return;
  }
#elif defined(__AVX2__)
  constexpr int kStep = 32 / sizeof(T);
  if (reinterpret_cast<uintptr_t>(d) % 32 == 0 && n % kStep == 0) {
    for (int i = 0; i < n; i += kStep)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(d + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + i)));
    return;
  }
#endif
  memcpy(d, s, n * sizeof(T));
}
// Streamed stores must be visible before another thread is told of them.
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// A row as the kernels compute with it: in place where the type is already that, else converted into `tmp`.
inline const float* state_row(float*, const float* s, int) { return s; }
inline const double* state_row(double*, const double* s, int) { return s; }
template <class T>
inline const float* state_row(float* tmp, const T* s, int n) {
  load_row(tmp, s, n);
  return tmp;
}
// Where a row is computed, and how it then reaches its place `d`: directly, or by way of `tmp` to convert it (into `out`)
// or to stream it.
inline float* target_row(float* tmp, float* d, bool stream) { return stream ? tmp : d; }
inline double* target_row(double* tmp, double* d, bool stream) { return stream ? tmp : d; }
template <class T>
inline float* target_row(float* tmp, T*, bool) {
  return tmp;
}
inline void commit_row(float* d, const float* row, bool stream, int n) {
  if (stream) stream_row(d, row, n);
}
inline void commit_row(double* d, const double* row, bool stream, int n) {
  if (stream) stream_row(d, row, n);
}
template <class T>
inline void commit_row(T* d, const float* row, bool stream, int n) {
  if (!stream) return store_row(d, row, n);
  constexpr int kBlock = 256;
  alignas(64) T tmp[kBlock];
  for (int i = 0; i < n; i += kBlock) {
    const int m = n - i < kBlock ? n - i : kBlock;
    store_row(tmp, row + i, m);
    stream_row(d + i, tmp, m);
  }
}

}  // namespace SPK_ISA
}  // namespace spk
