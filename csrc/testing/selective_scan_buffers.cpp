// The memory that selective_scan's launches may touch.
#include "testing/shim_buffers.h"

namespace spk {
namespace {

void add(const SelectiveScan& p, const ScanRows& rows, const char* name) {
  shim_buffer(rows.data, (p.B - 1) * rows.batch + (p.C - 1) * rows.row + p.L, size_of(p.dtype), name, true);
}
void add(const SelectiveScan& p, const ScanMatrix& m, const char* name) {
  const int64_t span = (p.B - 1) * m.batch + (p.G - 1) * m.group + (p.S - 1) * m.row + p.L;
  if (p.S > 0) shim_buffer(m.data, span, size_of(p.dtype), name, true);
}
void add(const SelectiveScan& p) {
  add(p, p.u, "u");
  add(p, p.delta, "delta");
  add(p, p.z, "z");
  add(p, p.Bs, "B");
  add(p, p.Cs, "C");
  shim_buffer(p.A, p.C * p.S, 4, "A", true);
  shim_buffer(p.D, p.C, 4, "D", true);
  shim_buffer(p.bias, p.C, 4, "delta_bias", true);
  shim_buffer(p.h_init, p.B * p.C * p.S, 4, "h_init", true);
}

}  // namespace

void shim_buffers(const SelectiveScanFwd& p) {
  add(p.in);
  shim_buffer(p.y, p.in.B * p.in.C * p.in.L, size_of(p.in.dtype), "y", false);
  shim_buffer(p.h_last, p.in.B * p.in.C * p.in.S, 4, "h_last", false);
}

void shim_buffers(const SelectiveScanBwd& p) {
  const SelectiveScan& q = p.in;
  const int64_t BC = q.B * q.C, matrix = q.B * q.G * p.parts * q.S * q.L;
  add(q);
  add(q, p.g_y, "g_y");
  shim_buffer(p.g_h_last, BC * q.S, 4, "g_h_last", true);
  shim_buffer(p.g_u, BC * q.L, size_of(q.dtype), "g_u", false);
  shim_buffer(p.g_delta, BC * q.L, size_of(q.dtype), "g_delta", false);
  shim_buffer(p.g_z, BC * q.L, size_of(q.dtype), "g_z", false);
  shim_buffer(p.g_h_init, BC * q.S, 4, "g_h_init", false);
  shim_buffer(p.g_A, BC * q.S, 8, "g_A", false);
  shim_buffer(p.g_D, BC, 8, "g_D", false);
  shim_buffer(p.g_bias, BC, 8, "g_delta_bias", false);
  shim_buffer(p.g_Bs, matrix, 4, "g_B", false);
  shim_buffer(p.g_Cs, matrix, 4, "g_C", false);
  shim_buffer(p.starts, selective_scan_starts(p), 4, "starts", false);
}

void shim_buffers(const SelectiveScanReduce& p) {
  const int64_t n = p.outer * p.inner;
  shim_buffer(p.in, n * p.parts, size_of(p.from), "in", true);
  shim_buffer(p.out, n, size_of(p.to), "out", false);
}

// The host functions name the CPU's kernels too; no tensor of a shim build reaches them.
SelectiveScanFwdFn* selective_scan_fwd_cpu() { return nullptr; }
SelectiveScanBwdFn* selective_scan_bwd_cpu() { return nullptr; }
SelectiveScanReduceFn* selective_scan_reduce_cpu() { return nullptr; }

}  // namespace spk
