// The memory that bn_lif's launches may touch.
#include "testing/shim_buffers.h"

namespace spk {
namespace {

int64_t span(const BnShape& s, int64_t step) { return (s.T - 1) * step + s.N; }

void add(const BnNorm& p, const LifNeuron& n) {
  shim_buffer(p.mean, n.C, 4, "mean", true);
  shim_buffer(p.var, n.C, 4, "var", true);
  shim_buffer(p.weight, n.C, 4, "weight", true);
  shim_buffer(p.bias, n.C, 4, "bias", true);
  shim_buffer(n.decay_c, n.C, 4, "decay", true);
  shim_buffer(n.gain_c, n.C, 4, "gain", true);
}

}  // namespace

void shim_buffers(const BnStats& p) {
  const BnShape& s = p.shape;
  shim_buffer(p.x, span(s, p.x_step), size_of(s.dtype), "x", true);
  shim_buffer(p.mean, s.C, 4, "mean", false);
  shim_buffer(p.var, s.C, 4, "var", false);
  shim_buffer(p.sums, 2 * p.parts * bn_places(s, true), 8, "sums", false);
}

void shim_buffers(const BnLifFwd& p) {
  const BnShape& s = p.shape;
  const int64_t size = size_of(s.dtype), TN = s.T * s.N;
  add(p.norm, p.neuron);
  shim_buffer(p.x, span(s, p.x_step), size, "x", true);
  shim_buffer(p.residual, span(s, p.r_step), size, "residual", true);
  shim_buffer(p.v_init, s.N, 4, "v_init", true);
  shim_buffer(p.s, TN, size, "s", false);
  shim_buffer(p.y, TN, size, "y", false);
  shim_buffer(p.constants, 5 * s.C, 4, "constants", false);
}

void shim_buffers(const BnLifBwd& p) {
  const BnShape& s = p.shape;
  const int64_t size = size_of(s.dtype), TN = s.T * s.N;
  add(p.norm, p.neuron);
  shim_buffer(p.x, span(s, p.x_step), size, "x", true);
  shim_buffer(p.residual, span(s, p.r_step), size, "residual", true);
  shim_buffer(p.v_init, s.N, 4, "v_init", true);
  shim_buffer(p.g_s, TN, size, "g_s", true);
  shim_buffer(p.g_y, TN, size, "g_y", true);
  if (p.g != p.g_x) shim_buffer(p.g, TN, size, "g", false);
  shim_buffer(p.g_x, TN, size, "g_x", false);
  shim_buffer(p.g_v_init, s.N, 4, "g_v_init", false);
  shim_buffer(p.g_weight, s.C, 4, "g_weight", false);
  shim_buffer(p.g_bias, s.C, 4, "g_bias", false);
  shim_buffer(p.g_decay, s.C, 4, "g_decay", false);
  shim_buffer(p.g_gain, s.C, 4, "g_gain", false);
  shim_buffer(p.sums, kBnSums * p.parts * bn_places(s, true), 8, "sums", false);
  const int64_t checkpoints = (s.T - 1) / p.steps * s.N;
  if (checkpoints) shim_buffer(p.checkpoints, checkpoints, 4, "checkpoints", false);
  shim_buffer(p.constants, 7 * s.C, 4, "constants", false);
}

// The host functions name the CPU's kernels too; no tensor of a shim build reaches them.
BnStatsFn* bn_stats_cpu() { return nullptr; }
BnStatsFn* bn_stats_finish_cpu() { return nullptr; }
BnLifFwdFn* bn_lif_fwd_cpu() { return nullptr; }
BnLifBwdFn* bn_lif_bwd_cpu() { return nullptr; }
BnLifBwdFn* bn_lif_bwd_finish_cpu() { return nullptr; }
BnLifBwdFn* bn_lif_bwd_x_cpu() { return nullptr; }

}  // namespace spk
