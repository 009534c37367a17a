// Parameters of the selective_scan_2d kernels. All tensors are contiguous; L = H * W. State type: double for f64, else
// float.
#pragma once
#include "core/dispatch.h"
#include "core/params.h"

namespace spk {

constexpr int kMaxDirections = 8, kMaxStates = 64;
// Channels whose contributions to g_B and g_C one task adds up: on a CPU, on a GPU.
constexpr int kCpuGroup = 64, kGpuGroup = 16;

struct SelectiveScan2d {
  DType dtype;  // of x, delta, B, C
  int64_t B, C, H, W;
  int32_t K, S;
  int32_t directions[kMaxDirections];
  bool softplus;
  const void* x;       // [B, C, L]
  const void* delta;   // [B, K, C, L]
  const void* A;       // [K, C, S] state type
  const void* into;    // the tensor B: [B, K, S, L]
  const void* out_of;  // the tensor C: [B, K, S, L]
  const void* D;       // [K, C] state type, or null
  const void* bias;    // [K, C] state type, or null
};

struct SelectiveScan2dFwd {
  SelectiveScan2d scan;
  void* y;     // [B, C, L]
  float* sum;  // CUDA: [B, C, L], y while the directions are added up; y itself where that is float32
};

// The sums over batch, and over groups of channels, are left to the caller.
struct SelectiveScan2dBwd {
  SelectiveScan2d scan;
  const void* g_y;       // [B, C, L]
  void* g_x;             // [B, C, L]
  void* g_delta;         // [B, K, C, L]
  void* g_A;             // [B, K, C, S] state type
  void *g_into, *g_out;  // of the tensors B and C: [B, groups, K, S, L] state type
  void *g_D, *g_bias;    // [B, K, C] state type, or null
  float* sum;            // CUDA: [B, C, L], g_x while the directions are added up; g_x itself where that is float32
  float* starts;         // CUDA: [B, C, chunks, S], states before each chunk of the walk
};

using SelectiveScan2dFwdFn = int(const SelectiveScan2dFwd&, int64_t begin, int64_t end);  // of B * blocks of 16 channels
using SelectiveScan2dBwdFn = int(const SelectiveScan2dBwd&, int64_t begin, int64_t end);  // of B * groups

#define SPK_DECLARE(isa)                      \
  namespace isa {                             \
  SelectiveScan2dFwdFn selective_scan_2d_fwd; \
  SelectiveScan2dBwdFn selective_scan_2d_bwd; \
  }
SPK_EACH_ISA(SPK_DECLARE)
#undef SPK_DECLARE

SelectiveScan2dFwdFn* selective_scan_2d_fwd_cpu();
SelectiveScan2dBwdFn* selective_scan_2d_bwd_cpu();

// CUDA launchers: return a cudaError_t as int. chunks: stretches of a walk of L that backward goes through one by one.
int selective_scan_2d_fwd_cuda(const SelectiveScan2dFwd& p, void* stream);
int selective_scan_2d_bwd_cuda(const SelectiveScan2dBwd& p, void* stream);
int64_t selective_scan_2d_chunks(int64_t L);

// The place on a map [H, W] that a walk in direction `code` (spikecore/ops/cross_scan.py) visits at step l.
SPK_HD int32_t walk_place(int code, int32_t l, int32_t H, int32_t W) {
  if (code == 2 || code == 3 || code == 5) l = H * W - 1 - l;
  if (code == 0 || code == 2) return l;
  const int32_t column = l / H, h = l - column * H;
  return h * W + (code >= 4 ? W - 1 - column : column);
}

}  // namespace spk
