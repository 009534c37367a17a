// The memory that selective_scan_2d's launches may touch.
#include "testing/shim_buffers.h"

namespace spk {
namespace {

void add(const SelectiveScan2d& p) {
  const int64_t size = size_of(p.dtype), L = p.H * p.W, BK = p.B * p.K;
  shim_buffer(p.x, p.B * p.C * L, size, "x", true);
  shim_buffer(p.delta, BK * p.C * L, size, "delta", true);
  shim_buffer(p.A, p.K * p.C * p.S, 4, "A", true);
  shim_buffer(p.into, BK * p.S * L, size, "B", true);
  shim_buffer(p.out_of, BK * p.S * L, size, "C", true);
  shim_buffer(p.D, p.K * p.C, 4, "D", true);
  shim_buffer(p.bias, p.K * p.C, 4, "delta_bias", true);
}

}  // namespace

void shim_buffers(const SelectiveScan2dFwd& q) {
  const SelectiveScan2d& p = q.scan;
  const int64_t map = p.B * p.C * p.H * p.W;
  add(p);
  shim_buffer(q.y, map, size_of(p.dtype), "y", false);
  if (q.y != q.sum) shim_buffer(q.sum, map, 4, "sum", false);
}

void shim_buffers(const SelectiveScan2dBwd& q) {
  const SelectiveScan2d& p = q.scan;
  const int64_t size = size_of(p.dtype), L = p.H * p.W, map = p.B * p.C * L, groups = (p.C + kGpuGroup - 1) / kGpuGroup;
  add(p);
  shim_buffer(q.g_y, map, size, "g_y", true);
  shim_buffer(q.g_x, map, size, "g_x", false);
  shim_buffer(q.g_delta, map * p.K, size, "g_delta", false);
  shim_buffer(q.g_A, p.B * p.K * p.C * p.S, 4, "g_A", false);
  shim_buffer(q.g_into, p.B * groups * p.K * p.S * L, 4, "g_B", false);
  shim_buffer(q.g_out, p.B * groups * p.K * p.S * L, 4, "g_C", false);
  shim_buffer(q.g_D, p.B * p.K * p.C, 4, "g_D", false);
  shim_buffer(q.g_bias, p.B * p.K * p.C, 4, "g_delta_bias", false);
  if (q.g_x != q.sum) shim_buffer(q.sum, map, 4, "sum", false);
  shim_buffer(q.starts, p.B * p.C * selective_scan_2d_chunks(L) * p.S, 4, "starts", false);
}

// The host functions name the CPU's kernels too; no tensor of a shim build reaches them.
SelectiveScan2dFwdFn* selective_scan_2d_fwd_cpu() { return nullptr; }
SelectiveScan2dBwdFn* selective_scan_2d_bwd_cpu() { return nullptr; }

}  // namespace spk
