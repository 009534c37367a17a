// The memory that lif's launches may touch.
#include "testing/shim_buffers.h"

namespace spk {
namespace {

int64_t span(int64_t T, int64_t N, int64_t step) { return (T - 1) * step + N; }

void add(const LifNeuron& p) {
  shim_buffer(p.decay_c, p.C, 4, "decay", true);
  shim_buffer(p.gain_c, p.C, 4, "gain", true);
}

}  // namespace

void shim_buffers(const LifFwd& p) {
  const int64_t size = size_of(p.dtype), TN = p.T * p.N;
  add(p.neuron);
  shim_buffer(p.x, span(p.T, p.N, p.x_step), size, "x", true);
  shim_buffer(p.v_init, p.N, 4, "v_init", true);
  shim_buffer(p.s, p.packed ? (p.T + 7) / 8 * p.N : TN, p.packed ? 1 : size, "s", false);
  shim_buffer(p.v_last, p.N, 4, "v_last", false);
  shim_buffer(p.h, TN, 4, "h", false);
  shim_buffer(p.v, TN, 4, "v", false);
}

void shim_buffers(const LifBwd& p) {
  const int64_t size = size_of(p.dtype), TN = p.T * p.N;
  add(p.neuron);
  shim_buffer(p.x, span(p.T, p.N, p.x_step), size, "x", true);
  shim_buffer(p.v_init, p.N, 4, "v_init", true);
  shim_buffer(p.g_s, TN, size, "g_s", true);
  shim_buffer(p.g_v_last, p.N, 4, "g_v_last", true);
  shim_buffer(p.g_h, TN, 4, "g_h", true);
  shim_buffer(p.g_v, TN, 4, "g_v", true);
  shim_buffer(p.g_x, TN, size, "g_x", false);
  shim_buffer(p.g_decay, p.N, 4, "g_decay", false);
  shim_buffer(p.g_gain, p.N, 4, "g_gain", false);
  shim_buffer(p.g_v_init, p.N, 4, "g_v_init", false);
  const int64_t checkpoints = (p.T - 1) / p.steps * p.N;
  if (checkpoints) shim_buffer(p.checkpoints, checkpoints, 4, "checkpoints", false);
}

void shim_buffers(const LifReduce& p) {
  shim_buffer(p.in, p.N, 4, "in", true);
  shim_buffer(p.out, p.C, 4, "out", false);
  shim_buffer(p.partial, p.C * lif_reduce_parts(p.N, p.C), 8, "partial", false);
}

// The host functions name the CPU's kernels too; no tensor of a shim build reaches them.
LifFwdFn* lif_fwd_cpu() { return nullptr; }
LifBwdFn* lif_bwd_cpu() { return nullptr; }
LifReduceFn* lif_reduce_cpu() { return nullptr; }

}  // namespace spk
