// The operators of libraries built with SPK_SHIM: host function and launcher as they are, kernels on the shim. Not shipped.
#include <functional>
#include <string>

#include "testing/checks.h"
#include "testing/shim_buffers.h"

extern "C" {
void shim_reset(unsigned seed, int coalescing);
void shim_register(void* data, size_t bytes, const char* name, int read_only, int granule);
const char* shim_error();
// Order of threads and blocks of the next launches: 0 natural, 1 reversed, else random.
static unsigned shim_order = 0;
void shim_set_order(unsigned seed) { shim_order = seed; }
}

namespace spk {
namespace {

void add(const void* data, int64_t count, int64_t size, const char* name, bool read_only) {
  if (data) shim_register(const_cast<void*>(data), size_t(count * size), name, read_only, int(size));
}

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::f64 ? 8 : 2; }
int64_t span(int64_t T, int64_t N, int64_t step) { return (T - 1) * step + N; }

void add(const LifNeuron& p) {
  add(p.decay_c, p.C, 4, "decay", true);
  add(p.gain_c, p.C, 4, "gain", true);
}

}  // namespace

std::string run_on_shim(const std::function<int()>& launch) {
  shim_reset(shim_order, 0);
  const int code = launch();
  return *shim_error() ? shim_error() : code ? "launcher returned " + std::to_string(code) : "";
}

void shim_buffers(const LifFwd& p) {
  const int64_t size = size_of(p.dtype), TN = p.T * p.N;
  add(p.neuron);
  add(p.x, span(p.T, p.N, p.x_step), size, "x", true);
  add(p.v_init, p.N, 4, "v_init", true);
  add(p.s, p.packed ? (p.T + 7) / 8 * p.N : TN, p.packed ? 1 : size, "s", false);
  add(p.v_last, p.N, 4, "v_last", false);
  add(p.h, TN, 4, "h", false);
  add(p.v, TN, 4, "v", false);
}

void shim_buffers(const LifBwd& p) {
  const int64_t size = size_of(p.dtype), TN = p.T * p.N;
  add(p.neuron);
  add(p.x, span(p.T, p.N, p.x_step), size, "x", true);
  add(p.v_init, p.N, 4, "v_init", true);
  add(p.g_s, TN, size, "g_s", true);
  add(p.g_v_last, p.N, 4, "g_v_last", true);
  add(p.g_h, TN, 4, "g_h", true);
  add(p.g_v, TN, 4, "g_v", true);
  add(p.g_x, TN, size, "g_x", false);
  add(p.g_decay, p.N, 4, "g_decay", false);
  add(p.g_gain, p.N, 4, "g_gain", false);
  add(p.g_v_init, p.N, 4, "g_v_init", false);
  const int64_t checkpoints = (p.T - 1) / p.steps * p.N;
  if (checkpoints) add(p.checkpoints, checkpoints, 4, "checkpoints", false);
}

void shim_buffers(const LifReduce& p) {
  add(p.in, p.N, 4, "in", true);
  add(p.out, p.C, 4, "out", false);
  add(p.partial, p.C * lif_reduce_parts(p.N, p.C), 8, "partial", false);
}

// The host functions name the CPU's kernels too; no tensor of a shim build reaches them.
LifFwdFn* lif_fwd_cpu() { return nullptr; }
LifBwdFn* lif_bwd_cpu() { return nullptr; }
LifReduceFn* lif_reduce_cpu() { return nullptr; }

}  // namespace spk
