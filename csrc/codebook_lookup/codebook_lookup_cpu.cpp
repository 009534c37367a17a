// codebook_lookup on the CPU; compiled once per instruction set (core/dispatch.h). Products with all codes are screened
// in float or bfloat16; codes that the rounding errors leave in the race are settled by their scores in double. A row
// keeps its few candidates; nothing of size n K is stored.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#pragma GCC diagnostic push  // GCC 12 takes _mm512_undefined_* in its own headers for a mistake
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "codebook_lookup/codebook_lookup.h"
#include "core/simd.h"
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only

#if defined(__AVX512F__)
#define SPK_BF16 __attribute__((target("avx512bf16")))
#endif

namespace spk {
namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))
#define SPK_INLINE inline __attribute__((always_inline))

constexpr int kPanel = kCodebookPanel, kRows = kCodebookRows, kKept = kCodebookKept;
constexpr int kTogether = 8;  // tiles of rows that meet a panel while it lies in the cache
constexpr float kMax = 3.402823466e+38f;
constexpr int kSums = 32;  // partial sums of a score; part of what the result is

// ---- scores in double: the arbiter. Products of floats are exact in it. ---------------------------------------------

typedef double Doubles __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));

SPK_INLINE Doubles widen(const float* x) {
  Floats8 v;
  memcpy(&v, x, sizeof v);
  return __builtin_convertvector(v, Doubles);
}
SPK_INLINE Doubles widen(const double* x) {
  Doubles v;
  memcpy(&v, x, sizeof v);
  return v;
}

// Sum of term(z[d], c[d]) over d: kSums partial sums (d mod kSums), halved until one is left. The order every backend has.
template <class A, class F>
SPK_INLINE double sum(const A* z, const A* c, int64_t D, F term) {
  Doubles s[kSums / 8] = {};
  int64_t d = 0;
  for (; d + kSums <= D; d += kSums)
    for (int i = 0; i < kSums / 8; ++i) s[i] += term(widen(z + d + 8 * i), widen(c + d + 8 * i));
  double t[kSums];
  memcpy(t, s, sizeof t);
  for (int i = 0; d + i < D; ++i) {
    const Doubles a = {double(z[d + i])}, b = {double(c[d + i])};
    t[i] += term(a, b)[0];
  }
  for (int width = kSums / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
}

template <class A>
SPK_NOINLINE double dot(const A* z, const A* c, int64_t D) {
  return sum(z, c, D, [](const Doubles& a, const Doubles& b) __attribute__((always_inline)) { return a * b; });
}
template <class A>
SPK_NOINLINE double distance(const A* z, const A* c, int64_t D) {
  return sum(z, c, D, [](const Doubles& a, const Doubles& b) __attribute__((always_inline)) { return (a - b) * (a - b); });
}

template <class A>
double score(Metric metric, const A* z, const A* c, int64_t D) {
  if (metric == Metric::l2) return -distance(z, c, D);
  const double product = dot(z, c, D);
  if (metric == Metric::dot) return product;
  const double norm = dot(c, c, D);
  return norm == 0 ? 0 : product / sqrt(norm);
}

// ---- vectors as floats ----------------------------------------------------------------------------------------------

// Vector i of [.., D] with this step, as floats: in place, or converted into tmp [D].
const float* vector(float* tmp, const void* base, DType dtype, int64_t i, int64_t step, int64_t D) {
  switch (dtype) {
    case DType::bf16: return state_row(tmp, static_cast<const bf16*>(base) + i * step, int(D));
    case DType::f16: return state_row(tmp, static_cast<const f16*>(base) + i * step, int(D));
    default: return static_cast<const float*>(base) + i * step;
  }
}

struct Work {        // of one call
  float *z, *c;      // [D] a row, a code
  float* packed;     // kTogether tiles of rows
  uint32_t* staged;  // [kPanel][pitch] packed vectors before they become columns
  int64_t pitch;     // a little over D: no two of them on the same cache sets
  char* memory;
  static int64_t rounded(int64_t n) { return (n + 31) / 16 * 16; }
  explicit Work(int64_t D, int64_t packed_floats) : pitch(rounded(D)) {
    if (pitch % 256 == 0) pitch += 16;
    memory = static_cast<char*>(aligned_alloc(64, size_t((2 + kPanel) * pitch + rounded(packed_floats)) * 4));
    z = reinterpret_cast<float*>(memory);
    c = z + pitch;
    staged = reinterpret_cast<uint32_t*>(c + pitch);
    packed = c + (1 + kPanel) * pitch;
  }
  ~Work() { free(memory); }
  Work(const Work&) = delete;
};

// ---- packing --------------------------------------------------------------------------------------------------------

struct Packed {
  double norm, residual;  // of the vector, and of what the packed one lacks
};

SPK_NOINLINE Packed pack_float(float* out, const float* x, double scale, int64_t D) {
  if (scale == 1) {
    memcpy(out, x, size_t(D) * sizeof(float));
    return {sqrt(dot(x, x, D)), 0};
  }
  double norm = 0, residual = 0;
  for (int64_t d = 0; d < D; ++d) {
    const double want = x[d] * scale;
    out[d] = float(want);
    norm += want * want;
    residual += (want - out[d]) * (want - out[d]);
  }
  return {sqrt(norm), sqrt(residual)};
}

#if defined(SPK_BF16)
// Flushes subnormals, as the product does, so that the residual knows of it.
SPK_BF16 SPK_NOINLINE Packed pack_bf16(uint32_t* out, const float* x, double scale, int64_t D) {
  __m512d norm = _mm512_setzero_pd(), residual = norm;
  const __m512d by = _mm512_set1_pd(scale);
  for (int64_t d = 0; d < D; d += 16) {
    const __mmask16 live = D - d < 16 ? __mmask16((1u << (D - d)) - 1) : __mmask16(0xffff);
    const __m512 v = _mm512_maskz_loadu_ps(live, x + d);
    __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    if (scale != 1) lo = _mm512_mul_pd(lo, by), hi = _mm512_mul_pd(hi, by);
    const __m512 scaled = scale == 1 ? v : _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(lo)), _mm512_cvtpd_ps(hi), 1);
    const __m256bh half = _mm512_cvtneps_pbh(scaled);
    __m256i bits;
    memcpy(&bits, &half, sizeof bits);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d / 2), bits);
    const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    norm = _mm512_fmadd_pd(hi, hi, _mm512_fmadd_pd(lo, lo, norm));
    lo = _mm512_sub_pd(lo, _mm512_cvtps_pd(_mm512_castps512_ps256(back)));
    hi = _mm512_sub_pd(hi, _mm512_cvtps_pd(_mm512_extractf32x8_ps(back, 1)));
    residual = _mm512_fmadd_pd(hi, hi, _mm512_fmadd_pd(lo, lo, residual));
  }
  return {sqrt(_mm512_reduce_add_pd(norm)), sqrt(_mm512_reduce_add_pd(residual))};
}
#endif

// x as vector j of those staged: floats, or pairs of bfloat16.
Packed stage(bool half, int j, const float* x, double scale, int64_t D, Work& work) {
  uint32_t* out = work.staged + j * work.pitch;
#if defined(SPK_BF16)
  if (half) return pack_bf16(out, x, scale, D);
#endif
  (void)half;
  return pack_float(reinterpret_cast<float*>(out), x, scale, D);
}

void stage_zeros(int j, int64_t D, Work& work) { memset(work.staged + j * work.pitch, 0, size_t(D) * 4); }

// The staged vectors as columns: out [count][COLUMNS].
template <int COLUMNS>
SPK_NOINLINE void columns(float* out, int64_t count, const Work& work) {
  constexpr int kBlock = 16;
  uint32_t* to = reinterpret_cast<uint32_t*>(out);
  for (int64_t d = 0; d < count; d += kBlock) {
    const int m = count - d < kBlock ? int(count - d) : kBlock;
    for (int j = 0; j < COLUMNS; ++j) {
      const uint32_t* from = work.staged + j * work.pitch + d;
      for (int i = 0; i < m; ++i) to[(d + i) * COLUMNS + j] = from[i];
    }
  }
}

int64_t words(const CodebookScan& p) { return p.bf16 ? (p.f.D + 1) / 2 : p.f.D; }  // of a packed vector

float up(double x) { return float(x * (1 + 0x1p-20)); }

void pack_panel(const CodebookScan& p, int64_t i, Work& work) {
  const CodebookFwd& f = p.f;
  CodebookPanel& panel = p.panels[i];
  float* out = static_cast<float*>(p.packed) + i * words(p) * kPanel;
  double weight = 0, residual = 0;
  panel.bad = 0;
  for (int j = 0; j < kPanel; ++j) {
    const int64_t k = i * kPanel + j;
    panel.bias[j] = -INFINITY;
    if (k >= p.count) {
      stage_zeros(j, f.D, work);
      continue;
    }
    const float* c = vector(work.c, f.codes, f.c_dtype, p.first + k, f.D, f.D);
    double scale = 1;
    if (f.metric == Metric::cosine) {
      const double square = dot(c, c, f.D);
      scale = square > 0 ? 1 / sqrt(square) : 0;
    }
    const Packed got = stage(p.bf16, j, c, scale, f.D, work);
    if (!isfinite(got.norm) || !isfinite(scale)) {
      ++panel.bad;
      stage_zeros(j, f.D, work);
      continue;
    }
    panel.bias[j] = f.metric == Metric::l2 ? float(-0.5 * got.norm * got.norm) : 0.f;
    weight = got.norm > weight ? got.norm : weight;
    residual = got.residual > residual ? got.residual : residual;
  }
  columns<kPanel>(out, words(p), work);
  panel.weight = up(weight);
  panel.residual = up(residual);
  panel.slack = f.metric == Metric::l2 ? up(0x1p-20 * weight * weight) : 0.f;
}

// ---- the product of a tile of rows with a panel ----------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 12, kTileVectors = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 6, kTileVectors = 4;
#else
constexpr int kLanes = 4, kTileRows = 6, kTileVectors = 2;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * 4)));

SPK_INLINE Lanes load(const float* p) {
  Lanes v;
  memcpy(&v, p, sizeof v);
  return v;
}
SPK_INLINE Lanes multiply_add(float a, Lanes b, Lanes c) {
  const Lanes all = a - Lanes{};  // folds to a broadcast; a sum would not, for -0
#if defined(__AVX512F__)
  return (Lanes)_mm512_fmadd_ps((__m512)all, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Lanes)_mm256_fmadd_ps((__m256)all, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)all, (float32x4_t)b);
#else
  return all * b + c;
#endif
}

// z: [D][kRows], c: [D][kPanel]: kTileRows rows by kTileVectors vectors of codes, in registers.
SPK_NOINLINE void product_part(float* __restrict__ out, const float* __restrict__ z, const float* __restrict__ c, int64_t D) {
  Lanes sum[kTileRows][kTileVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = Lanes{};
  for (int64_t d = 0; d < D; ++d, z += kRows, c += kPanel) {
    Lanes b[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) b[v] = load(c + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = multiply_add(z[r], b[v], sum[r][v]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) memcpy(out + r * kPanel + v * kLanes, &sum[r][v], sizeof(Lanes));
}

void product(float* out, const float* z, const float* c, int64_t D) {
  for (int r = 0; r < kRows; r += kTileRows)
    for (int k = 0; k < kPanel; k += kLanes * kTileVectors) product_part(out + r * kPanel + k, z + r, c + k, D);
}

#if defined(SPK_BF16)
SPK_INLINE SPK_BF16 __m512bh pairs(__m512i x) {
  __m512bh y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// z: [D / 2][kRows] pairs, c: [D / 2][kPanel] pairs.
SPK_BF16 SPK_NOINLINE void product_bf16(float* out, const int32_t* z, const int32_t* c, int64_t D) {
  static_assert(kRows == 12 && kPanel == 32, "24 sums in registers");
  __m512 sum[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t d = 0; d < D; d += 2, z += kRows, c += kPanel) {
    const __m512bh b0 = pairs(_mm512_loadu_si512(c)), b1 = pairs(_mm512_loadu_si512(c + 16));
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512bh a = pairs(_mm512_set1_epi32(z[r]));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, b0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], a, b1);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    _mm512_store_ps(out + r * kPanel, sum[r][0]);
    _mm512_store_ps(out + r * kPanel + 16, sum[r][1]);
  }
}
#endif

// ---- who stays in the race ------------------------------------------------------------------------------------------

// A product errs by at most a * panel.weight + b * panel.residual + panel.slack + c.
struct Bounds {
  float a[kRows], b[kRows], c[kRows];
};

// With |z| and what packing took from it. Sums of 2 D roundings err by gamma times the product of the norms; what
// thresholds and biases lose in float is of the size of a few more. c: what underflows, and what l2's double loses.
void bound(Bounds& e, int r, const Packed& z, Metric metric, int64_t D) {
  const double gamma = (2 * double(D) + 16) * 0x1p-24 + 0x1p-19, packed = z.norm + z.residual;
  e.a[r] = up(z.residual + gamma * packed);
  e.b[r] = up(packed * (1 + gamma));
  e.c[r] = up(double(D) * (0x1p-124 + (metric == Metric::l2 ? 0x1p-50 * z.norm * z.norm : 0)));
}

// Bit j: score j is not below the threshold, or not a number.
SPK_INLINE uint32_t not_below(const float* score, const float* bias, float threshold) {
#if defined(__AVX512F__)
  const __m512 t = _mm512_set1_ps(threshold);
  const __mmask16 lo = _mm512_cmp_ps_mask(_mm512_add_ps(_mm512_loadu_ps(score), _mm512_loadu_ps(bias)), t, _CMP_NLT_UQ);
  const __mmask16 hi = _mm512_cmp_ps_mask(_mm512_add_ps(_mm512_loadu_ps(score + 16), _mm512_loadu_ps(bias + 16)), t, _CMP_NLT_UQ);
  return uint32_t(lo) | uint32_t(hi) << 16;
#elif defined(__AVX2__)
  const __m256 t = _mm256_set1_ps(threshold);
  uint32_t bits = 0;
  for (int j = 0; j < kPanel; j += 8) {
    const __m256 v = _mm256_add_ps(_mm256_loadu_ps(score + j), _mm256_loadu_ps(bias + j));
    bits |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(v, t, _CMP_NLT_UQ))) << j;
  }
  return bits;
#else
  int any = 0;
  for (int j = 0; j < kPanel; ++j) any |= !(score[j] + bias[j] < threshold);
  uint32_t bits = 0;
  if (any)
    for (int j = 0; j < kPanel; ++j) bits |= uint32_t(!(score[j] + bias[j] < threshold)) << j;
  return bits;
#endif
}

const float* row_of(const CodebookFwd& f, int64_t i, Work& work) { return vector(work.z, f.z, f.dtype, i, f.z_step, f.D); }

// Leaves the best of the candidates, the first of equals; -1: none has a finite score.
SPK_NOINLINE int settle(CodebookRow& row, const CodebookFwd& f, int64_t i, Work& work) {
  const float* z = row_of(f, i, work);
  double best = -INFINITY;
  int at = -1;
  for (int j = 0; j < row.count; ++j) {
    const double s = score(f.metric, z, vector(work.c, f.codes, f.c_dtype, row.index[j], f.D, f.D), f.D);
    if (s > best && isfinite(s)) best = s, at = j;
  }
  row.exact += row.count;
  row.count = at >= 0;
  if (at >= 0) row.index[0] = row.index[at], row.upper[0] = row.upper[at];
  return at >= 0 ? row.index[0] : -1;
}

void drop(CodebookRow& row) {
  int kept = 0;
  for (int j = 0; j < row.count; ++j)
    if (!(row.upper[j] < row.lower)) row.index[kept] = row.index[j], row.upper[kept++] = row.upper[j];
  row.count = kept;
}

// `bits`: the codes first + j of a panel that may beat row i's bound; their products err by at most `error`.
SPK_NOINLINE void keep(uint32_t bits, const float* score, const float* bias, float error, int64_t first, CodebookRow& row,
                       const CodebookFwd& f, int64_t i, Work& work) {
  for (uint32_t left = bits; left; left &= left - 1) {
    const int j = __builtin_ctz(left);
    const float lower = score[j] + bias[j] - error;
    if (lower > row.lower && lower <= kMax) row.lower = lower;
  }
  for (uint32_t left = bits; left; left &= left - 1) {
    const int j = __builtin_ctz(left);
    const float upper = score[j] + bias[j] + error;
    if (upper < row.lower) continue;
    if (row.count == kKept) drop(row);
    if (row.count == kKept) settle(row, f, i, work);
    row.index[row.count] = int32_t(first + j);
    row.upper[row.count++] = upper;
  }
}

void check(const CodebookScan& p, int64_t panel, int64_t row, int rows, const float* scores, const Bounds& e, Work& work) {
  const CodebookPanel& c = p.panels[panel];
  const int64_t left = p.count - panel * kPanel;
  const uint32_t live = left >= kPanel ? ~0u : (1u << left) - 1;
  for (int r = 0; r < rows; ++r) {
    CodebookRow& state = p.rows[row + r];
    const float error = e.a[r] * c.weight + e.b[r] * c.residual + (c.slack + e.c[r]);
    const uint32_t bits = not_below(scores + r * kPanel, c.bias, state.lower - error) & live;
    if (__builtin_expect(bits != 0, 0))
      keep(bits, scores + r * kPanel, c.bias, error, p.first + panel * kPanel, state, p.f, row + r, work);
  }
}

void pack_rows(const CodebookScan& p, int64_t row, int rows, float* out, Bounds& e, Work& work) {
  for (int r = 0; r < kRows; ++r) {
    Packed z{0, 0};
    bool fine = false;
    if (r < rows) {
      z = stage(p.bf16, r, row_of(p.f, row + r, work), 1, p.f.D, work);
      fine = isfinite(z.norm);
      if (p.first == 0) p.rows[row + r] = {fine ? -INFINITY : INFINITY, 0, 0, {}, {}};
    }
    if (!fine) {
      stage_zeros(r, p.f.D, work);
      z = {0, 0};
    }
    bound(e, r, z, p.f.metric, p.f.D);
  }
  columns<kRows>(out, words(p), work);
}

template <class T>
void gather(T* out, const float* c, int64_t D) {
  store_row(out, c, int(D));
}

template <class T>
void fill_nan(T* out, int64_t D) {
  const float nan = NAN;
  for (int64_t d = 0; d < D; ++d) store_row(out + d, &nan, 1);
}

template <class T>
void write(const CodebookFwd& f, int64_t i, int64_t k, Work& work) {
  f.indices[i * f.i_step] = k;
  T* out = static_cast<T*>(f.values) + i * f.v_step;
  if (k < 0)
    fill_nan(out, f.D);
  else
    gather(out, vector(work.c, f.codes, f.c_dtype, k, f.D, f.D), f.D);
}

// float64, for gradcheck: every score in double.
void settle_double(const CodebookFwd& f, int64_t i) {
  const double *z = static_cast<const double*>(f.z) + i * f.z_step, *codes = static_cast<const double*>(f.codes);
  double best = -INFINITY;
  int64_t at = -1;
  for (int64_t k = 0; k < f.K; ++k) {
    const double s = score(f.metric, z, codes + k * f.D, f.D);
    if (s > best && isfinite(s)) best = s, at = k;
  }
  f.indices[i * f.i_step] = at;
  double* out = static_cast<double*>(f.values) + i * f.v_step;
  for (int64_t d = 0; d < f.D; ++d) out[d] = at < 0 ? NAN : codes[at * f.D + d];
}

template <class T, class C, class A>
void add_rows(const CodebookBwd& p, int64_t begin, int64_t end) {
  constexpr int kChunk = 512;
  alignas(64) A acc[kChunk], tmp[kChunk];
  for (int64_t k = begin; k < end; ++k)
    for (int64_t d = 0; d < p.D; d += kChunk) {
      const int m = p.D - d < kChunk ? int(p.D - d) : kChunk;
      for (int j = 0; j < m; ++j) acc[j] = 0;
      for (int64_t i = p.starts[k]; i < p.starts[k + 1]; ++i) {
        const A* g = state_row(tmp, static_cast<const T*>(p.g) + p.order[i] * p.g_step + d, m);
        for (int j = 0; j < m; ++j) acc[j] += g[j];
      }
      store_row(static_cast<C*>(p.g_codes) + k * p.D + d, acc, m);
    }
}

template <class T>
void add_rows(const CodebookBwd& p, int64_t begin, int64_t end) {
  if (p.c_dtype == DType::f32)
    add_rows<T, float, float>(p, begin, end);
  else
    add_rows<T, T, float>(p, begin, end);
}

}  // namespace

bool codebook_has_bf16() {
#if defined(SPK_BF16)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

int codebook_pack(const CodebookScan& p, int64_t begin, int64_t end) {
  Work work(p.f.D, 0);
  if (!work.memory) return kOutOfMemory;
  for (int64_t i = begin; i < end; ++i) pack_panel(p, i, work);
  return kOk;
}

int codebook_screen(const CodebookScan& p, int64_t begin, int64_t end) {
  const int64_t D = p.f.D, size = words(p) * kRows, panels = (p.count + kPanel - 1) / kPanel;
  Work work(D, kTogether * size);
  if (!work.memory) return kOutOfMemory;
  alignas(64) float scores[kRows * kPanel];
  Bounds errors[kTogether];
  for (int64_t tile = begin; tile < end; tile += kTogether) {
    const int tiles = end - tile < kTogether ? int(end - tile) : kTogether;
    const auto rows = [&](int t) {
      const int64_t left = p.f.n - (tile + t) * kRows;
      return left < kRows ? int(left) : kRows;
    };
    for (int t = 0; t < tiles; ++t) pack_rows(p, (tile + t) * kRows, rows(t), work.packed + t * size, errors[t], work);
    for (int64_t i = 0; i < panels; ++i) {
      const float* codes = static_cast<const float*>(p.packed) + i * words(p) * kPanel;
      for (int t = 0; t < tiles; ++t) {
#if defined(SPK_BF16)
        if (p.bf16)
          product_bf16(scores, reinterpret_cast<const int32_t*>(work.packed + t * size), reinterpret_cast<const int32_t*>(codes),
                       D);
        else
#endif
          product(scores, work.packed + t * size, codes, D);
        check(p, i, (tile + t) * kRows, rows(t), scores, errors[t], work);
      }
    }
  }
  return kOk;
}

int codebook_settle(const CodebookScan& p, int64_t begin, int64_t end) {
  const CodebookFwd& f = p.f;
  if (f.dtype == DType::f64) {
    for (int64_t i = begin; i < end; ++i) settle_double(f, i);
    return kOk;
  }
  Work work(f.D, 0);
  if (!work.memory) return kOutOfMemory;
  for (int64_t i = begin; i < end; ++i) {
    CodebookRow& row = p.rows[i];
    int64_t k = -1;
    if (row.lower < INFINITY) {
      drop(row);
      // A finite bound is that of some candidate, so a single one is it.
      k = row.count == 1 && row.lower > -INFINITY ? row.index[0] : settle(row, f, i, work);
    }
    switch (f.dtype) {
      case DType::bf16: write<bf16>(f, i, k, work); break;
      case DType::f16: write<f16>(f, i, k, work); break;
      default: write<float>(f, i, k, work);
    }
  }
  return kOk;
}

int codebook_bwd(const CodebookBwd& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32: add_rows<float>(p, begin, end); break;
    case DType::bf16: add_rows<bf16>(p, begin, end); break;
    case DType::f16: add_rows<f16>(p, begin, end); break;
    default: add_rows<double, double, double>(p, begin, end);
  }
  return kOk;
}

}  // namespace SPK_ISA

#ifdef SPK_DISPATCH
bool codebook_has_bf16_cpu() {
  static const bool has = SPK_PICK(codebook_has_bf16)();
  return has;
}
CodebookScanFn* codebook_pack_cpu() {
  static CodebookScanFn* const f = SPK_PICK(codebook_pack);
  return f;
}
CodebookScanFn* codebook_screen_cpu() {
  static CodebookScanFn* const f = SPK_PICK(codebook_screen);
  return f;
}
CodebookScanFn* codebook_settle_cpu() {
  static CodebookScanFn* const f = SPK_PICK(codebook_settle);
  return f;
}
CodebookBwdFn* codebook_bwd_cpu() {
  static CodebookBwdFn* const f = SPK_PICK(codebook_bwd);
  return f;
}
#endif

}  // namespace spk
