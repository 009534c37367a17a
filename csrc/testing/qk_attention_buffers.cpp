// The memory that qk_attention's launches may touch.
#include "testing/shim_buffers.h"

namespace spk {
namespace {

template <class Pointer>
void rows(const QkRows<Pointer>& x, const QkShape& s, int64_t slices, int64_t size, const char* name, bool read_only) {
  const int64_t last = (slices - 1) * x.t + (s.B - 1) * x.b + (s.H - 1) * x.h + (s.R - 1) * x.r + s.L;
  shim_buffer(x.data, last, size, name, read_only);
}

void neuron(const QkNeuron& p, const QkShape& s, const char* decay, const char* gain) {
  shim_buffer(p.decay_h, p.decay_step ? s.H : 1, 4, decay, true);
  shim_buffer(p.gain_h, p.gain_step ? s.H : 1, 4, gain, true);
}

int64_t neurons(const QkShape& s) { return s.T * s.B * s.H * (s.columns ? s.L : s.R); }

}  // namespace

void shim_buffers(const QkFwd& p) {
  const QkShape& s = p.shape;
  const int64_t size = p.packed ? 1 : size_of(s.dtype), slices = p.packed ? (s.T + 7) / 8 : s.T;
  neuron(p.attn, s, "attn.decay", "attn.gain");
  neuron(p.qkv, s, "qkv.decay", "qkv.gain");
  rows(p.y, s, slices, size, "y", true);
  rows(p.s, s, slices, size, "s", true);
  rows(p.w, s, slices, size, "w", true);
  rows(p.out, s, slices, size, "out", false);
  shim_buffer(p.potentials, neurons(s), 4, "potentials", false);
}

void shim_buffers(const QkBwd& p) {
  const QkShape& s = p.shape;
  const int64_t size = size_of(s.dtype);
  neuron(p.attn, s, "attn.decay", "attn.gain");
  neuron(p.qkv, s, "qkv.decay", "qkv.gain");
  rows(p.y, s, s.T, size, "y", true);
  rows(p.s, s, s.T, size, "s", true);
  rows(p.w, s, s.T, size, "w", true);
  rows(p.g_out, s, s.T, size, "g_out", true);
  rows(p.g_y, s, s.T, size, "g_y", false);
  rows(p.g_s, s, s.T, size, "g_s", false);
  rows(p.g_w, s, s.T, size, "g_w", false);
  shim_buffer(p.sums, 4 * s.B * s.H * qk_parts_cuda(s), 8, "sums", false);
  shim_buffer(p.potentials, 2 * neurons(s), 4, "potentials", false);
  shim_buffer(p.g_attn, neurons(s), 4, "g_attn", false);
}

void shim_buffers(const QkReduce& p) {
  shim_buffer(p.in, p.B * p.H * p.parts, 8, "in", true);
  shim_buffer(p.out, p.per_head ? p.H : 1, 4, "out", false);
}

// The host functions name the CPU's kernels too; no tensor of a shim build reaches them.
QkFwdFn* qk_fwd_cpu() { return nullptr; }
QkBwdFn* qk_bwd_cpu() { return nullptr; }

}  // namespace spk
