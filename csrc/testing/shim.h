// Runs CUDA kernel source on the CPU, for tests: blocks one after the other, one fiber per CUDA thread.
// Not modelled: tensor cores, inline PTX, cp.async, cooperative groups, spin waits between blocks, the lock step of a
// warp (code that relies on it is reported as a race) and the last-block-reduces pattern (reported as a race too).
#pragma once
#include <cuda_runtime_api.h>  // dim3, float4, cudaStream_t; __device__ and the like expand to nothing under g++
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __shared__  // only SPK_SHARED and SPK_DYN_SHARED: the shim must own the memory

#define SPK_LAUNCH(K, GRID, BLOCK, SMEM, STREAM, ...)                             \
  ((void)(STREAM), ::shim::hand_over<(K)>((K), GRID, BLOCK, SMEM, __VA_ARGS__) || \
                       (::shim::launch(#K, GRID, BLOCK, SMEM, [=] { K(__VA_ARGS__); }), true))
#define SPK_SHARED(T, NAME, DIMS)   \
  using NAME##_type = T DIMS;       \
  static const char NAME##_tag = 0; \
  NAME##_type& NAME = *static_cast<NAME##_type*>(::shim::static_shared(&NAME##_tag, #NAME, sizeof(NAME##_type)))
#define SPK_DYN_SHARED(T, NAME) T* NAME = static_cast<T*>(::shim::dynamic_shared(#NAME))
#define SPK_LAST_ERROR() 0

#define SHIM_UNCHECKED __attribute__((noinline, no_sanitize("thread", "undefined")))
#define SHIM_INLINE inline __attribute__((always_inline))

namespace shim {

struct Thread {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Thread* current;  // the CUDA thread that runs now

enum class BlockVote { Count, And, Or };

// What each lane of a warp brought to a warp primitive; lanes that never came read as all ones (NaN, -1).
struct WarpValues {
  const uint64_t* value;
  unsigned arrived;
};

void launch_fibers(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void (*body)(void*), void* closure,
                   size_t closure_bytes);
void* static_shared(const void* tag, const char* name, size_t bytes);
void* dynamic_shared(const char* name);
void block_sync(int line);
int block_vote(int line, bool predicate, BlockVote kind);
void warp_sync(unsigned mask);
WarpValues warp_exchange(unsigned mask, uint64_t value);
unsigned lane();
void on_atomic(void* p, size_t bytes);
void fail(const char* message);

// Runs kernels instead of the fibers where it is set; arguments as the kernel takes them, with their sizes.
using Launcher = void(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, int count, const void* const* arguments,
                      const size_t* sizes);
extern Launcher* launcher;

template <auto K>
const char* name_of() {
  return __PRETTY_FUNCTION__;  // with the template arguments' values
}
template <auto K, class... P, class... A>
bool hand_over(void (*)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, const A&... given) {
  if (!launcher) return false;
  const auto call = [&](P... taken) {
    const void* const arguments[] = {&taken...};
    const size_t sizes[] = {sizeof taken...};
    launcher(name_of<K>(), grid, block, dynamic_bytes, sizeof...(P), arguments, sizes);
  };
  call(given...);
  return true;
}

template <class Body>
void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, Body body) {
  launch_fibers(kernel, grid, block, dynamic_bytes, [](void* p) { (*static_cast<Body*>(p))(); }, &body, sizeof body);
}

// `source` < 0: the lane keeps its own value, as CUDA does past the end of a segment.
template <class T>
SHIM_UNCHECKED T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const WarpValues all = warp_exchange(mask, bits);
  if (source < 0) return value;
  if (!(mask >> source & 1)) fail("shuffle reads a lane outside its mask");
  T result;
  std::memcpy(&result, &all.value[source], sizeof(T));
  return result;
}

template <class T, class F>
SHIM_UNCHECKED T reduce(unsigned mask, T value, F combine) {
  const WarpValues all = warp_exchange(mask, uint64_t(value));
  for (unsigned i = 0, own = lane(); i < 32; ++i)
    if (i != own && (all.arrived >> i & 1)) value = combine(value, T(all.value[i]));
  return value;
}

template <class T, class F>
SHIM_UNCHECKED T atomic(T* p, F update) {
  on_atomic(p, sizeof(T));
  const T old = *p;
  *p = update(old);
  return old;
}

}  // namespace shim

#define threadIdx (::shim::current->thread)
#define blockIdx (::shim::current->block)
#define blockDim (::shim::current->block_dim)
#define gridDim (::shim::current->grid_dim)
#define warpSize 32

#define __syncthreads() ::shim::block_sync(__LINE__)
#define __syncthreads_count(P) ::shim::block_vote(__LINE__, P, ::shim::BlockVote::Count)
#define __syncthreads_and(P) ::shim::block_vote(__LINE__, P, ::shim::BlockVote::And)
#define __syncthreads_or(P) ::shim::block_vote(__LINE__, P, ::shim::BlockVote::Or)
inline void __syncwarp(unsigned mask = ~0u) { ::shim::warp_sync(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
#define __trap() ::shim::fail("__trap")

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = int(shim::lane()) / width * width;
  return shim::shuffle(mask, value, first + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const int own = int(shim::lane()), source = own ^ flip;
  return shim::shuffle(mask, value, source < (own / width + 1) * width ? source : -1);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = int(shim::lane());
  return shim::shuffle(mask, value, own % width + int(delta) < width ? own + int(delta) : -1);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = int(shim::lane());
  return shim::shuffle(mask, value, own % width >= int(delta) ? own - int(delta) : -1);
}
SHIM_UNCHECKED inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const shim::WarpValues all = shim::warp_exchange(mask, predicate != 0);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= unsigned((all.arrived >> i & 1) && all.value[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

#define SHIM_REDUCE(NAME, EXPR)                                         \
  template <class T>                                                    \
  T __reduce_##NAME##_sync(unsigned mask, T value) {                    \
    return shim::reduce(mask, value, [](T a, T b) { return T(EXPR); }); \
  }
SHIM_REDUCE(add, a + b)
SHIM_REDUCE(min, std::min(a, b))
SHIM_REDUCE(max, std::max(a, b))
SHIM_REDUCE(and, a& b)
SHIM_REDUCE(or, a | b)
SHIM_REDUCE(xor, a ^ b)

#define SHIM_ATOMIC(NAME, EXPR)                             \
  template <class T>                                        \
  T atomic##NAME(T* p, std::type_identity_t<T> v) {         \
    return shim::atomic(p, [v](T old) { return T(EXPR); }); \
  }
SHIM_ATOMIC(Add, old + v)
SHIM_ATOMIC(Sub, old - v)
SHIM_ATOMIC(Max, std::max(old, v))
SHIM_ATOMIC(Min, std::min(old, v))
SHIM_ATOMIC(And, old& v)
SHIM_ATOMIC(Or, old | v)
SHIM_ATOMIC(Xor, old ^ v)
SHIM_ATOMIC(Exch, (void(old), v))
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return shim::atomic(p, [=](T old) { return old == expected ? v : old; });
}

// Cache hints change no value. Inlined, so that the coalescing count sees one place of access per call.
#define SHIM_LOAD(NAME)            \
  template <class T>               \
  SHIM_INLINE T NAME(const T* p) { \
    return *p;                     \
  }
#define SHIM_STORE(NAME)             \
  template <class T>                 \
  SHIM_INLINE void NAME(T* p, T v) { \
    *p = v;                          \
  }
SHIM_LOAD(__ldg)
SHIM_LOAD(__ldcg)
SHIM_LOAD(__ldca)
SHIM_LOAD(__ldcs)
SHIM_LOAD(__ldcv)
SHIM_STORE(__stcg)
SHIM_STORE(__stcs)
SHIM_STORE(__stwb)
SHIM_STORE(__stwt)

using std::max;
using std::min;
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1) << (31 - i);
  return r;
}
inline unsigned __float_as_uint(float f) { return __builtin_bit_cast(unsigned, f); }
inline float __uint_as_float(unsigned u) { return __builtin_bit_cast(float, u); }
inline int __float_as_int(float f) { return __builtin_bit_cast(int, f); }
inline float __int_as_float(int i) { return __builtin_bit_cast(float, i); }

// The g++ flags forbid contraction, so the plain operators are the _rn ones. Approximations differ from a GPU's by ulps.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a >= 0.f ? std::min(a, 1.f) : 0.f; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float shim_rsqrtf(float a) { return 1.f / sqrtf(a); }
#define rsqrtf shim_rsqrtf  // newer C libraries declare their own

// Of the runtime only what a launcher calls; cudart is not linked.
template <class K>
cudaError_t cudaFuncSetAttribute(K*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t shim_last_error() { return cudaSuccess; }
#define cudaGetLastError shim_last_error
#define cudaPeekAtLastError shim_last_error
#define cudaMemsetAsync(P, VALUE, BYTES, STREAM) ((void)(STREAM), std::memset(P, VALUE, BYTES), cudaSuccess)
