// The memory that spiking_self_attention's launches may touch.
#include "testing/shim_buffers.h"

namespace spk {
namespace {

void add(const AttentionNeuron& p) {
  shim_buffer(p.lif.decay_c, p.lif.C, 4, "decay", true);
  shim_buffer(p.lif.gain_c, p.lif.C, 4, "gain", true);
}

// From the first to the last element; strides are not negative.
template <class P>
void add(const Sequence<P>& x, const AttentionShape& s, int64_t steps, int64_t size, const char* name, bool read_only) {
  const int64_t last = (steps - 1) * x.step + (s.B - 1) * x.batch + (s.H - 1) * x.head + (s.D - 1) * x.row + (s.N - 1) * x.column;
  shim_buffer(x.data, last + 1, size, name, read_only);
}

}  // namespace

void shim_buffers(const SpikingSelfAttentionFwd& p) {
  const AttentionShape& s = p.shape;
  const bool bits = s.packed || s.currents;
  const int64_t bytes = (s.T + 7) / 8, steps = bits ? bytes : s.T, size = bits ? 1 : size_of(s.dtype);
  add(p.attn);
  add(p.q, s, steps, size, "q", true);
  add(p.k, s, steps, size, "k", true);
  add(p.v, s, steps, size, "v", true);
  add(p.out, s, s.packed ? bytes : s.T, s.packed ? 1 : size_of(s.dtype), "out", false);
  shim_buffer(p.scratch, spiking_self_attention_fwd_scratch(s), 4, "scratch", false);
}

void shim_buffers(const SpikingSelfAttentionBwd& p) {
  const AttentionShape& s = p.shape;
  const int64_t size = size_of(s.dtype), steps = s.currents ? (s.T + 7) / 8 : s.T, g_size = s.currents ? 4 : size;
  add(p.attn);
  add(p.q, s, steps, s.currents ? 1 : size, "q", true);
  add(p.k, s, steps, s.currents ? 1 : size, "k", true);
  add(p.v, s, steps, s.currents ? 1 : size, "v", true);
  add(p.g_out, s, s.T, size, "g_out", true);
  add(p.g_q, s, s.T, g_size, "g_q", false);
  add(p.g_k, s, s.T, g_size, "g_k", false);
  add(p.g_v, s, s.T, g_size, "g_v", false);
  shim_buffer(p.g_decay, s.B * s.H, 4, "g_decay", false);
  shim_buffer(p.g_gain, s.B * s.H, 4, "g_gain", false);
  shim_buffer(p.scratch, spiking_self_attention_bwd_scratch(s), 4, "scratch", false);
}

// The host functions name the CPU's kernels too; no tensor of a shim build reaches them.
SpikingSelfAttentionFwdFn* spiking_self_attention_fwd_cpu() { return nullptr; }
SpikingSelfAttentionBwdFn* spiking_self_attention_bwd_cpu() { return nullptr; }

}  // namespace spk
