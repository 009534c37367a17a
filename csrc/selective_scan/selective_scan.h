// Parameters of the selective scan's kernels. Strides are in elements; every sequence is dense along L. State type:
// double for f64, else float. The matrices are called Bs and Cs, for B and C are sizes.
#pragma once
#include "core/dispatch.h"
#include "core/params.h"

namespace spk {

struct ScanRows {  // [B, C, L]
  const void* data;
  int64_t batch, row;
};

struct ScanMatrix {  // [B, G, S, L]
  const void* data;
  int64_t batch, group, row;
};

struct SelectiveScan {
  DType dtype;  // of u, delta, z, Bs, Cs, their gradients and y
  int64_t B, C, L, G, S;
  bool softplus;
  ScanRows u, delta, z;  // z.data may be null
  ScanMatrix Bs, Cs;
  const void* A;       // [C, S] state type
  const void* D;       // [C] state type, or null
  const void* bias;    // [C] state type, or null
  const void* h_init;  // [B, C, S] state type, or null: zero
};

struct SelectiveScanFwd {
  SelectiveScan in;
  void* y;       // [B, C, L]
  void* h_last;  // [B, C, S] state type
};

struct SelectiveScanBwd {
  SelectiveScan in;
  ScanRows g_y;                // data may be null: zero
  const void* g_h_last;        // [B, C, S] state type, or null: zero
  void *g_u, *g_delta, *g_z;   // [B, C, L]; g_z null where there is no z
  void* g_h_init;              // [B, C, S] state type, or null
  double *g_A, *g_D, *g_bias;  // [B, C, S], [B, C], [B, C]: to be summed over B; the last two may be null
  void *g_Bs, *g_Cs;           // [B, G, parts, S, L] state type: to be summed over the parts
  int64_t parts;               // of a group: part j has the blocks of channels from j * blocks / parts on
  float* starts;               // CUDA: scratch for the states at the starts of stretches
};

// out[o, i] = sum over p of in[o, p, i], in that order.
struct SelectiveScanReduce {
  DType from, to;  // f32 or f64; any
  int64_t outer, parts, inner;
  const void* in;
  void* out;
};

constexpr int kScanLanes = 16;  // channels of a group that go through the sequence side by side
static SPK_HD int64_t scan_blocks(const SelectiveScan& p) { return (p.C / p.G + kScanLanes - 1) / kScanLanes; }

// Into how many parts a group's channels go in backward: enough to keep a machine busy, and few enough for the partial
// sums of g_Bs and g_Cs to stay within four times the size of u. It depends on sizes alone, so results do not depend on
// the number of threads.
static inline int64_t scan_parts_at_most(const SelectiveScan& p, int64_t parts) {
  const int64_t fit = 2 * (p.C / p.G) / (p.S > 0 ? p.S : 1), blocks = scan_blocks(p);
  parts = parts < fit ? parts : fit;
  parts = parts < blocks ? parts : blocks;
  return parts > 1 ? parts : 1;
}
static inline int64_t scan_parts_cpu(const SelectiveScan& p) {
  constexpr int64_t kWanted = 32;
  return scan_parts_at_most(p, (kWanted + p.B * p.G - 1) / (p.B * p.G));
}
// The fewest with which a GPU that works on kSlots of them at once is done about as soon as it can be.
static inline int64_t scan_parts_gpu(const SelectiveScan& p) {
  constexpr int64_t kSlots = 264;  // two blocks on each of an H100's 132 multiprocessors
  const auto rounds = [&](int64_t parts) {
    return (p.B * p.G * parts + kSlots - 1) / kSlots * ((scan_blocks(p) + parts - 1) / parts);
  };
  const int64_t most = scan_parts_at_most(p, kSlots);
  int64_t least = rounds(1), parts = 1;
  for (int64_t n = 2; n <= most; ++n) least = rounds(n) < least ? rounds(n) : least;
  while (rounds(parts) * 8 > least * 9) ++parts;
  return parts;
}

using SelectiveScanFwdFn = int(const SelectiveScanFwd&, int64_t begin, int64_t end);        // [B, G, blocks] items
using SelectiveScanBwdFn = int(const SelectiveScanBwd&, int64_t begin, int64_t end);        // [B, G, parts] items
using SelectiveScanReduceFn = int(const SelectiveScanReduce&, int64_t begin, int64_t end);  // [outer, inner] elements

#define SPK_DECLARE(isa)                       \
  namespace isa {                              \
  SelectiveScanFwdFn selective_scan_fwd;       \
  SelectiveScanBwdFn selective_scan_bwd;       \
  SelectiveScanReduceFn selective_scan_reduce; \
  }
SPK_EACH_ISA(SPK_DECLARE)
#undef SPK_DECLARE

SelectiveScanFwdFn* selective_scan_fwd_cpu();
SelectiveScanBwdFn* selective_scan_bwd_cpu();
SelectiveScanReduceFn* selective_scan_reduce_cpu();

// CUDA launchers: return a cudaError_t as int.
int selective_scan_fwd_cuda(const SelectiveScanFwd& p, void* stream);
int selective_scan_bwd_cuda(const SelectiveScanBwd& p, void* stream);
int64_t selective_scan_starts(const SelectiveScanBwd& p);  // how many `starts` the launcher needs
int selective_scan_reduce_cuda(const SelectiveScanReduce& p, void* stream);

}  // namespace spk
