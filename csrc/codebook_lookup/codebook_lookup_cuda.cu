// codebook_lookup on a GPU. Norms first; then tiles of rows against tiles of codes, in float or on tensor cores, each
// thread with the best and the second best of its rows in registers; then, row by row, scores in double of those codes
// that the rounding errors leave in the race (the order of codebook_lookup_cpu.cpp's `sum`), and the chosen vector.
#include <type_traits>

#include "codebook_lookup/codebook_lookup.h"
#include "core/cuda.h"
#include "core/mma.h"

namespace spk {
namespace {

constexpr int kBlock = 256;                          // threads that screen
constexpr int kTile = 128, kDeep = 16, kOwn = 8;     // rows and codes of a tile, numbers of each at once, a thread's share
constexpr int kPitch = kTile + 4;                    // keeps stores of a transposed tile out of each other's banks
constexpr int kSettle = 256, kAtOnce = 4;            // threads of a row, codes that a warp reads at once
constexpr int kBwdCodes = 16, kBwdColumns = 128;     // sums of a block
constexpr int64_t kBlocks = 264, kSplitCodes = 512;  // blocks worth having; least codes of a part
constexpr unsigned kAll = ~0u;
using Float4 = Vec<float, 4>;
using Word4 = Vec<uint32_t, 4>;

// |product in float - product| <= gamma |z| |c|, with room for biases, scales and thresholds in float.
__device__ __forceinline__ float gamma_of(int64_t D) { return float(2 * D + 16) * 0x1p-24f + 0x1p-17f; }

// A score in float, and what it errs by at most. weight: the norm of the code; for cosine 1 over it.
struct Scored {
  float value, error;
};
__device__ __forceinline__ Scored scored(float product, float z_norm, float weight, float gamma, Metric metric, int64_t D) {
  const float tiny = float(D) * 0x1p-124f;
  if (metric == Metric::cosine) return {product * weight, gamma * z_norm + tiny * weight};
  if (metric == Metric::dot) return {product, gamma * z_norm * weight + tiny};
  return {product - 0.5f * weight * weight, gamma * (z_norm + weight) * weight + (float(D) * 0x1p-49f * z_norm * z_norm + tiny)};
}

__device__ __forceinline__ double add_lanes(double v) {
  for (int width = 16; width; width /= 2) v += __shfl_xor_sync(kAll, v, width);
  return v;
}
__device__ __forceinline__ float add_lanes(float v) {
  for (int width = 16; width; width /= 2) v += __shfl_xor_sync(kAll, v, width);
  return v;
}

// A warp owns a vector of x: [n, D]; its norm, rounded up, or NaN. inverse: 1 over the norm, or 0.
template <class T>
__global__ void __launch_bounds__(kSettle)
    codebook_norm_kernel(const T* __restrict__ x, int64_t n, int64_t D, int64_t step, bool inverse, float* norm, int32_t* bad) {
  const int64_t i = (int64_t(blockIdx.x) * kSettle + threadIdx.x) / 32;
  if (i >= n) return;
  double sum = 0;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    const double v = load_float(x[i * step + d]);
    sum += v * v;
  }
  sum = add_lanes(sum);
  if (threadIdx.x % 32) return;
  const bool fine = sum - sum == 0;
  const double length = inverse ? (sum > 0 ? 1 / sqrt(sum) : 0) : sqrt(sum);
  norm[i] = fine ? float(length * (1 + 0x1p-20)) : __int_as_float(0x7fc00000);
  if (!fine) atomicOr(bad, 1);
}

// The best of a row so far.
struct Best {
  float upper, error, second;
  int32_t index;
  __device__ __forceinline__ void meet(float upper_, float error_, int32_t index_) {
    if (upper_ > upper) {
      second = upper;
      upper = upper_, error = error_, index = index_;
    } else {
      second = upper_ > second ? upper_ : second;
    }
  }
  __device__ __forceinline__ void join(const Best& other) {
    meet(other.upper, other.error, other.index);
    second = other.second > second ? other.second : second;
  }
  // That of the lane whose number differs by `flip`.
  __device__ __forceinline__ Best from(int flip) const {
    return {__shfl_xor_sync(kAll, upper, flip), __shfl_xor_sync(kAll, error, flip), __shfl_xor_sync(kAll, second, flip),
            __shfl_xor_sync(kAll, index, flip)};
  }
};

// kTile rows of kDeep numbers on their way into shared memory, where they lie transposed; zeros past the end.
template <class T, int V>
struct Piece {
  static constexpr int kParts = kDeep / V, kCount = kTile * kParts / kBlock;
  Vec<T, V> held[kCount];

  __device__ __forceinline__ void fetch(const T* __restrict__ x, int64_t first, int64_t end, int64_t step, int64_t d0, int64_t D) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = threadIdx.x + j * kBlock, row = at / kParts, d = at % kParts * V;
      held[j] = {};
      if (first + row < end && d0 + d < D) held[j] = *reinterpret_cast<const Vec<T, V>*>(x + (first + row) * step + d0 + d);
    }
  }
  __device__ __forceinline__ void put(float* to) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = threadIdx.x + j * kBlock, row = at / kParts, d = at % kParts * V;
#pragma unroll
      for (int i = 0; i < V; ++i) to[(d + i) * kPitch + row] = load_float(held[j].d[i]);
    }
  }
};

// Which of a tile's rows (or codes) is a thread's r-th: two runs of four, so that a warp's reads meet no bank twice.
__device__ __forceinline__ int own(int thread, int r) { return r / 4 * (kTile / 2) + thread * 4 + r % 4; }

// What block (x, y) works on: kTile rows from row0 on, and codes [begin, end), whole tiles but for the last.
struct Part {
  int64_t row0, begin, end;
  __device__ __forceinline__ explicit Part(const CodebookFwd& p) : row0(int64_t(blockIdx.x) * kTile) {
    const int64_t tiles = (p.K + kTile - 1) / kTile, last = tiles * (blockIdx.y + 1) / gridDim.y * kTile;
    begin = tiles * blockIdx.y / gridDim.y * kTile;
    end = last < p.K ? last : p.K;
  }
};

// Block (x, y) owns kTile rows and part y of the codes, a thread kOwn rows and kOwn codes of each tile: walks the tiles of
// codes, and in each the vectors by kDeep numbers, of which the next come in meanwhile; keeps the best and the second
// best of its rows in registers.
template <class T, class C, int V>
__global__ void __launch_bounds__(kBlock, 1) codebook_screen_kernel(const CodebookFwd p) {
  constexpr int kHalf = kDeep * kPitch;  // floats of a buffer
  SPK_SHARED(Float4, rows, [2 * kHalf / 4]);
  SPK_SHARED(Float4, codes, [2 * kHalf / 4]);
  const T* __restrict__ z = static_cast<const T*>(p.z);      // [n, D]
  const C* __restrict__ c = static_cast<const C*>(p.codes);  // [K, D]
  const auto [row0, begin, end] = Part(p);
  const int mine = threadIdx.x / 16, theirs = threadIdx.x % 16;
  const float gamma = gamma_of(p.D), inf = __int_as_float(0x7f800000);
  Piece<T, V> next_rows;
  Piece<C, V> next_codes;
  const auto fetch = [&](int64_t code0, int64_t d0) {
    next_rows.fetch(z, row0, p.n, p.z_step, d0, p.D);
    next_codes.fetch(c, code0, end, p.D, d0, p.D);
  };
  const auto put = [&](int buffer) {
    next_rows.put(rows[0].d + buffer * kHalf);
    next_codes.put(codes[0].d + buffer * kHalf);
  };
  Best best[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) best[r] = {-inf, 0.f, -inf, -1};
  int buffer = 0;
  if (begin < end) {
    fetch(begin, 0);
    put(0);
    __syncthreads();
  }
  for (int64_t code0 = begin; code0 < end; code0 += kTile) {
    float sum[kOwn][kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r)
#pragma unroll
      for (int k = 0; k < kOwn; ++k) sum[r][k] = 0.f;
    for (int64_t d0 = 0; d0 < p.D; d0 += kDeep) {
      const bool deeper = d0 + kDeep < p.D, more = deeper || code0 + kTile < end;
      if (more) fetch(deeper ? code0 : code0 + kTile, deeper ? d0 + kDeep : 0);
      const Float4* const a_at = rows + buffer * (kHalf / 4) + mine;
      const Float4* const b_at = codes + buffer * (kHalf / 4) + theirs;
#pragma unroll 8
      for (int d = 0; d < kDeep; ++d) {
        const Float4 a[2] = {a_at[d * (kPitch / 4)], a_at[d * (kPitch / 4) + kTile / 8]};
        const Float4 b[2] = {b_at[d * (kPitch / 4)], b_at[d * (kPitch / 4) + kTile / 8]};
#pragma unroll
        for (int r = 0; r < kOwn; ++r)
#pragma unroll
          for (int k = 0; k < kOwn; ++k) sum[r][k] = __fmaf_rn(a[r / 4].d[r % 4], b[k / 4].d[k % 4], sum[r][k]);
      }
      buffer ^= 1;
      if (more) put(buffer);
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int64_t code = code0 + own(theirs, k);
      const float weight = code < end ? p.c_norm[code] : inf - inf;
      if (weight != weight) continue;
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const int64_t row = row0 + own(mine, r);
        const Scored s = scored(sum[r][k], row < p.n ? p.z_norm[row] : 0.f, weight, gamma, p.metric, p.D);
        const float upper = s.value + s.error;
        best[r].meet(upper == upper ? upper : inf, s.error, int32_t(code));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    Best& b = best[r];
    for (int width = 1; width < 16; width *= 2) b.join(b.from(width));
    const int64_t row = row0 + own(mine, r);
    if (theirs == 0 && row < p.n) p.found[blockIdx.y * p.n + row] = {b.upper, b.upper - 2 * b.error, b.second, b.index};
  }
}

// The same of rows and codes in half precision, on tensor cores. Of a tile, a warp owns 64 rows and 32 codes: 4 by 4
// products of 16 by 8, a thread 8 rows and 8 codes. Numbers pass as pairs in words.
template <class T>
__global__ void __launch_bounds__(kBlock, 1) codebook_mma_kernel(const CodebookFwd p) {
  constexpr int kMmaDeep = 32, kMmaPitch = kMmaDeep + 8;  // the 8 lead rows past each other's banks
  constexpr int kParts = kMmaDeep / 8, kCount = kTile * kParts / kBlock, kHalf = kTile * kMmaPitch / 8, kWarps = 4;
  SPK_SHARED(Word4, rows, [2 * kHalf]);
  SPK_SHARED(Word4, codes, [2 * kHalf]);
  const T* __restrict__ z = static_cast<const T*>(p.z);      // [n, D]
  const T* __restrict__ c = static_cast<const T*>(p.codes);  // [K, D]
  const auto [row0, begin, end] = Part(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int mine = warp / kWarps * 64 + g, theirs = warp % kWarps * 32;  // first row; first code of the warp
  const float gamma = gamma_of(p.D), inf = __int_as_float(0x7f800000);
  Word4 held[2][kCount];
  const auto fetch = [&](int64_t code0, int64_t d0) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = threadIdx.x + j * kBlock, row = at / kParts;
      const int64_t d = d0 + at % kParts * 8;
      held[0][j] = held[1][j] = {};
      if (row0 + row < p.n && d < p.D) held[0][j] = *reinterpret_cast<const Word4*>(z + (row0 + row) * p.z_step + d);
      if (code0 + row < end && d < p.D) held[1][j] = *reinterpret_cast<const Word4*>(c + (code0 + row) * p.D + d);
    }
  };
  const auto put = [&](int buffer) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = threadIdx.x + j * kBlock, to = buffer * kHalf + at / kParts * (kMmaPitch / 8) + at % kParts;
      rows[to] = held[0][j];
      codes[to] = held[1][j];
    }
  };
  Best best[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) best[r] = {-inf, 0.f, -inf, -1};
  int buffer = 0;
  if (begin < end) {
    fetch(begin, 0);
    put(0);
    __syncthreads();
  }
  for (int64_t code0 = begin; code0 < end; code0 += kTile) {
    float sum[4][4][4];
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][k][i] = 0.f;
    for (int64_t d0 = 0; d0 < p.D; d0 += kMmaDeep) {
      const bool deeper = d0 + kMmaDeep < p.D, more = deeper || code0 + kTile < end;
      if (more) fetch(deeper ? code0 : code0 + kTile, deeper ? d0 + kMmaDeep : 0);
      const uint32_t* const a_at = rows[buffer * kHalf].d + mine * (kMmaPitch / 2) + t;
      const uint32_t* const b_at = codes[buffer * kHalf].d + (theirs + g) * (kMmaPitch / 2) + t;
#pragma unroll
      for (int d = 0; d < kMmaDeep / 2; d += 8) {
        uint32_t a[4][4], b[4][2];
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = a_at[(m * 16 + i % 2 * 8) * (kMmaPitch / 2) + d + i / 2 * 4];
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int i = 0; i < 2; ++i) b[k][i] = b_at[k * 8 * (kMmaPitch / 2) + d + i * 4];
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int k = 0; k < 4; ++k) mma_16816<T>(sum[m][k], a[m], b[k]);
      }
      buffer ^= 1;
      if (more) put(buffer);
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int64_t code = code0 + theirs + k / 2 * 8 + t * 2 + k % 2;
      const float weight = code < end ? p.c_norm[code] : inf - inf;
      if (weight != weight) continue;
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const int64_t row = row0 + mine + r * 8;
        const Scored s =
            scored(sum[r / 2][k / 2][r % 2 * 2 + k % 2], row < p.n ? p.z_norm[row] : 0.f, weight, gamma, p.metric, p.D);
        const float upper = s.value + s.error;
        best[r].meet(upper == upper ? upper : inf, s.error, int32_t(code));
      }
    }
  }
  Best* const of_warps = reinterpret_cast<Best*>(rows);  // [kWarps, kTile]; the last barrier left it free
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    for (int width = 1; width < 4; width *= 2) best[r].join(best[r].from(width));
    if (t == 0) of_warps[warp % kWarps * kTile + mine + r * 8] = best[r];
  }
  __syncthreads();
  const int64_t row = row0 + threadIdx.x;
  if (threadIdx.x >= kTile || row >= p.n) return;
  Best b = of_warps[threadIdx.x];
  for (int w = 1; w < kWarps; ++w) b.join(of_warps[w * kTile + threadIdx.x]);
  p.found[blockIdx.y * p.n + row] = {b.upper, b.upper - 2 * b.error, b.second, b.index};
}

// The score of a code by a warp, in the order of the CPU's.
template <class T, class C>
__device__ __forceinline__ double score(const T* z, const C* c, Metric metric, int64_t D) {
  double sum = 0, square = 0;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    const double a = load_float(z[d]), b = load_float(c[d]);
    if (metric == Metric::l2)
      sum += (a - b) * (a - b);
    else
      sum += a * b;
    if (metric == Metric::cosine) square += b * b;
  }
  sum = add_lanes(sum);
  if (metric == Metric::l2) return -sum;
  if (metric == Metric::dot) return sum;
  square = add_lanes(square);
  return square == 0 ? 0 : sum / sqrt(square);
}

// A block owns a row. Where screening left more than one code in the race, its warps share the codes: products in
// float again, and the scores of those that reach the bound.
template <class T, class C>
__global__ void __launch_bounds__(kSettle) codebook_settle_kernel(const CodebookFwd p) {
  SPK_SHARED(double, scores, [kSettle / 32]);
  SPK_SHARED(int64_t, indices, [kSettle / 32]);
  const int64_t i = blockIdx.x, D = p.D;
  const T* __restrict__ z = static_cast<const T*>(p.z) + i * p.z_step;  // [D]
  const C* __restrict__ codes = static_cast<const C*>(p.codes);         // [K, D]
  const float norm = p.z_norm[i], inf = __int_as_float(0x7f800000);
  CodebookFound f = p.found[i];
  for (int64_t s = 1; s < p.splits; ++s) {
    const CodebookFound other = p.found[s * p.n + i];
    const bool better = other.upper > f.upper;
    const float loser = better ? f.upper : other.upper;
    float second = f.second > other.second ? f.second : other.second;
    second = loser > second ? loser : second;
    if (better) f = other;
    f.second = second;
  }
  int64_t k = norm == norm ? f.index : -1;
  const bool sure = f.lower > f.second && f.lower - f.lower == 0;
  if (k >= 0 && !sure) {
    // In float the lower end may have lost a rounding.
    const float floor = f.lower - f.lower == 0 ? f.lower - fabsf(f.lower) * 0x1p-22f : -inf, gamma = gamma_of(D);
    const int warp = threadIdx.x / 32;
    double best = -inf;
    int64_t at = -1;
    for (int64_t j0 = warp * kAtOnce; j0 < p.K; j0 += kSettle / 32 * kAtOnce) {
      float sum[kAtOnce] = {};
      const C* c[kAtOnce];
#pragma unroll
      for (int m = 0; m < kAtOnce; ++m) c[m] = codes + (j0 + m < p.K ? j0 + m : j0) * D;
#pragma unroll 4
      for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
        const float a = load_float(z[d]);
#pragma unroll
        for (int m = 0; m < kAtOnce; ++m) sum[m] = __fmaf_rn(a, load_float(c[m][d]), sum[m]);
      }
#pragma unroll
      for (int m = 0; m < kAtOnce; ++m) {
        const float product = add_lanes(sum[m]), weight = j0 + m < p.K ? p.c_norm[j0 + m] : inf - inf;
        if (weight != weight) continue;
        const Scored s = scored(product, norm, weight, gamma, p.metric, D);
        if (s.value + s.error < floor) continue;
        const double exact = score(z, c[m], p.metric, D);
        if (exact > best && exact - exact == 0) best = exact, at = j0 + m;
      }
    }
    if (threadIdx.x % 32 == 0) {
      scores[warp] = best;
      indices[warp] = at;
    }
    __syncthreads();
    k = indices[0];
    best = scores[0];
    for (int w = 1; w < kSettle / 32; ++w)
      if (scores[w] > best || (scores[w] == best && indices[w] < k)) best = scores[w], k = indices[w];
  }
  if (threadIdx.x == 0) p.indices[i * p.i_step] = k;
  T* values = static_cast<T*>(p.values) + i * p.v_step;  // [D]
  for (int64_t d = threadIdx.x; d < D; d += kSettle)
    values[d] = store_float<T>(k < 0 ? __int_as_float(0x7fc00000) : load_float(codes[k * D + d]));
}

// Block (x, y) owns kBwdCodes codes and kBwdColumns of their numbers, a thread one column: walks the rows in their order
// and keeps those of its codes, so that every sum has one order.
template <class T, class C>
__global__ void __launch_bounds__(kBwdColumns) codebook_bwd_kernel(const CodebookBwd p) {
  SPK_SHARED(float, sums, [kBwdCodes][kBwdColumns]);
  SPK_SHARED(int64_t, rows, [kBwdColumns]);
  SPK_SHARED(int, owners, [kBwdColumns]);
  SPK_SHARED(int, counts, [kBwdColumns / 32]);
  const T* __restrict__ g = static_cast<const T*>(p.g);  // [n, D]
  const int64_t code0 = int64_t(blockIdx.x) * kBwdCodes, d = int64_t(blockIdx.y) * kBwdColumns + threadIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kBwdCodes; ++k) sums[k][threadIdx.x] = 0;
  for (int64_t i0 = 0; i0 < p.n; i0 += kBwdColumns) {
    const int64_t i = i0 + threadIdx.x, k = i < p.n ? p.indices[i * p.i_step] - code0 : -1;
    const bool ours = k >= 0 && k < kBwdCodes;
    const unsigned votes = __ballot_sync(kAll, ours);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int place = __popc(votes & ((1u << lane) - 1)), found = 0;
#pragma unroll
    for (int w = 0; w < kBwdColumns / 32; ++w) {
      if (w < warp) place += counts[w];
      found += counts[w];
    }
    if (ours) {
      rows[place] = i;
      owners[place] = int(k);
    }
    __syncthreads();
    if (d < p.D)
      for (int j = 0; j < found; ++j) sums[owners[j]][threadIdx.x] += load_float(g[rows[j] * p.g_step + d]);
  }
  if (d >= p.D) return;
  for (int k = 0; k < kBwdCodes && code0 + k < p.K; ++k)
    static_cast<C*>(p.g_codes)[(code0 + k) * p.D + d] = store_float<C>(sums[k][threadIdx.x]);
}

unsigned blocks(int64_t count, int64_t each) { return unsigned((count + each - 1) / each); }

template <class T>
void norms(const void* x, int64_t n, int64_t D, int64_t step, bool inverse, float* norm, int32_t* bad, void* stream) {
  (void)stream;
  SPK_LAUNCH((codebook_norm_kernel<T>), dim3(blocks(n, kSettle / 32)), dim3(kSettle), 0, stream, static_cast<const T*>(x), n, D,
             step, inverse, norm, bad);
}

template <class T, class C>
int forward(const CodebookFwd& p, void* stream) {
  constexpr int V = 16 / (sizeof(T) > sizeof(C) ? sizeof(T) : sizeof(C));
  const bool vector = p.D % V == 0 && p.z_step % V == 0 && reinterpret_cast<uintptr_t>(p.z) % (V * sizeof(T)) == 0 &&
                      reinterpret_cast<uintptr_t>(p.codes) % (V * sizeof(C)) == 0;
  norms<T>(p.z, p.n, p.D, p.z_step, false, p.z_norm, p.bad_z, stream);
  norms<C>(p.codes, p.K, p.D, p.D, p.metric == Metric::cosine, p.c_norm, p.bad_c, stream);
  const dim3 grid(blocks(p.n, kTile), unsigned(p.splits));
  if constexpr (std::is_same_v<T, C> && sizeof(T) == 2) {
    if (vector)
      SPK_LAUNCH((codebook_mma_kernel<T>), grid, dim3(kBlock), 0, stream, p);
    else
      SPK_LAUNCH((codebook_screen_kernel<T, C, 1>), grid, dim3(kBlock), 0, stream, p);
  } else {
    if (vector)
      SPK_LAUNCH((codebook_screen_kernel<T, C, V>), grid, dim3(kBlock), 0, stream, p);
    else
      SPK_LAUNCH((codebook_screen_kernel<T, C, 1>), grid, dim3(kBlock), 0, stream, p);
  }
  SPK_LAUNCH((codebook_settle_kernel<T, C>), dim3(unsigned(p.n)), dim3(kSettle), 0, stream, p);
  return SPK_LAST_ERROR();
}

template <class T, class C>
int backward(const CodebookBwd& p, void* stream) {
  (void)stream;
  SPK_LAUNCH((codebook_bwd_kernel<T, C>), dim3(blocks(p.K, kBwdCodes), blocks(p.D, kBwdColumns)), dim3(kBwdColumns), 0, stream, p);
  return SPK_LAST_ERROR();
}

}  // namespace

int64_t codebook_splits(int64_t n, int64_t K) {
  const int64_t wanted = kBlocks / ((n + kTile - 1) / kTile), most = K / kSplitCodes, splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits;
}

int codebook_lookup_fwd_cuda(const CodebookFwd& p, void* stream) {
  const bool wide = p.c_dtype == DType::f32;
  switch (p.dtype) {
    case DType::f32: return forward<float, float>(p, stream);
    case DType::bf16: return wide ? forward<__nv_bfloat16, float>(p, stream) : forward<__nv_bfloat16, __nv_bfloat16>(p, stream);
    default: return wide ? forward<__half, float>(p, stream) : forward<__half, __half>(p, stream);
  }
}

int codebook_lookup_bwd_cuda(const CodebookBwd& p, void* stream) {
  const bool wide = p.c_dtype == DType::f32;
  switch (p.dtype) {
    case DType::f32: return backward<float, float>(p, stream);
    case DType::bf16: return wide ? backward<__nv_bfloat16, float>(p, stream) : backward<__nv_bfloat16, __nv_bfloat16>(p, stream);
    default: return wide ? backward<__half, float>(p, stream) : backward<__half, __half>(p, stream);
  }
}

}  // namespace spk
