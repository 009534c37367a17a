// Sixteen channels side by side in vector registers, and maps laid out place by place for them: [L][16]. Sixteen on every
// instruction set, so that sums over channels add up in one order everywhere.
#pragma once
#include "core/simd.h"
#include "selective_scan/scan.h"

namespace spk {
namespace SPK_ISA {

#if defined(__AVX512F__)
#define SPK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SPK_VECTOR_BYTES 32
#else
#define SPK_VECTOR_BYTES 16
#endif

constexpr int kLanes = 16;

typedef float VecF __attribute__((vector_size(SPK_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(SPK_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(SPK_VECTOR_BYTES)));

template <class A>
struct VecOf {
  using type = VecF;
};
template <>
struct VecOf<double> {
  using type = VecD;
};

template <class A>
struct Lanes {
  using Vec = typename VecOf<A>::type;
  static constexpr int kVecs = kLanes * int(sizeof(A)) / SPK_VECTOR_BYTES;
  Vec v[kVecs];

  static SPK_HD Lanes load(const A* p) {
    Lanes x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static SPK_HD Lanes all(A a) {
    Lanes x;
    for (int i = 0; i < kVecs; ++i) x.v[i] = Vec{} + a;
    return x;
  }
  SPK_HD void store(A* p) const { memcpy(p, this, sizeof *this); }
};

#define SPK_LANES(OP)                                                    \
  template <class A>                                                     \
  SPK_HD Lanes<A> operator OP(Lanes<A> x, const Lanes<A>& y) {           \
    for (int i = 0; i < Lanes<A>::kVecs; ++i) x.v[i] = x.v[i] OP y.v[i]; \
    return x;                                                            \
  }
SPK_LANES(+)
SPK_LANES(*)
#undef SPK_LANES

}  // namespace SPK_ISA

namespace {
template <>
struct Bits<SPK_ISA::VecF> {
  using type = SPK_ISA::VecI;
};
}  // namespace

namespace SPK_ISA {

SPK_HD Lanes<float> decays(const Lanes<float>& dt, const Lanes<float>& rate) {
  Lanes<float> a;
  for (int i = 0; i < a.kVecs; ++i) a.v[i] = decay(dt.v[i], rate.v[i]);
  return a;
}
SPK_HD Lanes<double> decays(const Lanes<double>& dt, const Lanes<double>& rate) {
  Lanes<double> a;
  for (int i = 0; i < a.kVecs; ++i)
    for (unsigned j = 0; j < sizeof(VecD) / sizeof(double); ++j) a.v[i][j] = decay(double(dt.v[i][j]), double(rate.v[i][j]));
  return a;
}

// 16 rows of 16 numbers, turned: by 4 rounds that zip the first half of the rows with the second, in pieces of a vector.
SPK_HD void zip(VecF& low, VecF& high, VecF a, VecF b) {
#if SPK_VECTOR_BYTES == 64
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif SPK_VECTOR_BYTES == 32
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// dst[i * dst_step + j] = src[j * src_step + i], for i, j < 16.
inline void turn16(float* __restrict__ dst, int64_t dst_step, const float* __restrict__ src, int64_t src_step) {
  constexpr int V = SPK_VECTOR_BYTES / 4;
  for (int i = 0; i < kLanes; i += V)
    for (int j = 0; j < kLanes; j += V) {
      VecF a[V], b[V];
      for (int r = 0; r < V; ++r) memcpy(&a[r], src + (j + r) * src_step + i, sizeof(VecF));
#pragma GCC unroll 4
      for (int round = 1; round < V; round *= 2) {
        for (int r = 0; r < V / 2; ++r) zip(b[2 * r], b[2 * r + 1], a[r], a[r + V / 2]);
        for (int r = 0; r < V; ++r) a[r] = b[r];
      }
      for (int r = 0; r < V; ++r) memcpy(dst + (i + r) * dst_step + j, &a[r], sizeof(VecF));
    }
}
inline void turn16(double* __restrict__ dst, int64_t dst_step, const double* __restrict__ src, int64_t src_step) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) dst[i * dst_step + j] = src[j * src_step + i];
}

// sums[r] = the sum of the 16 numbers rows[r][...], for 16 rows.
template <class A>
inline void sum_lanes(A* sums, const A* rows) {
  alignas(64) A turned[kLanes * kLanes];
  turn16(turned, kLanes, rows, kLanes);
  Lanes<A> s[kLanes];
  for (int i = 0; i < kLanes; ++i) s[i] = Lanes<A>::load(turned + i * kLanes);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] = s[i] + s[i + half];
  s[0].store(sums);
}

}  // namespace SPK_ISA
}  // namespace spk
