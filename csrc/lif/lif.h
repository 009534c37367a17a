// Parameters of the lif kernels. Rows are time slices of N neurons, dense in memory; all pointers of one call share the
// layout of x. State type: double for f64, else float.
#pragma once
#include "core/dispatch.h"
#include "core/params.h"

namespace spk {

struct LifNeuron {
  double decay, gain;            // where the pointer below is null
  const void *decay_c, *gain_c;  // [C], state type, or null
  int64_t C, inner;              // channel of neuron n: (n / inner) % C
  double threshold, rest, reset_by;
  bool hard, strict;
};

struct LifFwd {
  LifNeuron neuron;
  DType dtype;  // of x and s
  int64_t T, N;
  int64_t x_step;      // elements from x[t] to x[t+1]; every other sequence steps by N
  const void* x;       // [T, N]
  const void* v_init;  // [N] state type, or null: at rest
  void* s;             // [T, N], or bits [ceil(T/8), N] where packed
  void* v_last;        // [N] state type
  void *h, *v;         // [T, N] state type, or null
  bool packed;
};

struct LifBwd {
  LifNeuron neuron;
  DType dtype;  // of x, g_s, g_x
  int64_t T, N;
  int64_t x_step;
  const void *x, *v_init;
  const void* g_s;                   // [T, N], or null: zero
  const void *g_v_last, *g_h, *g_v;  // [N], [T, N], [T, N] state type, or null
  void* g_x;                         // [T, N]
  void *g_decay, *g_gain;            // [N] state type, summed over T only, or null
  void* g_v_init;                    // [N] state type, or null
  bool detach;
  int32_t surrogate;
  double a, b;         // the surrogate's parameters
  float* checkpoints;  // CUDA: [ceil(T / steps) - 1, N] potentials at the starts of later segments, or null
  int32_t steps;       // CUDA: time steps of a segment
};

// out[c] = sum of in[n] over the neurons n of channel c, in double, in an order that only the sizes fix.
struct LifReduce {
  DType dtype;  // f32 or f64
  int64_t N, C, inner;
  const void* in;   // [N]
  void* out;        // [C]
  double* partial;  // CUDA: scratch, [C, lif_reduce_parts(N, C)]
};

constexpr int kLifChunk = 4096;  // neurons that a CPU kernel carries through time at once
static inline int64_t lif_chunks(int64_t N) { return (N + kLifChunk - 1) / kLifChunk; }

using LifFwdFn = int(const LifFwd&, int64_t begin, int64_t end);        // chunks [begin, end)
using LifBwdFn = int(const LifBwd&, int64_t begin, int64_t end);        // chunks [begin, end)
using LifReduceFn = int(const LifReduce&, int64_t begin, int64_t end);  // channels [begin, end)

#define SPK_DECLARE(isa)  \
  namespace isa {         \
  LifFwdFn lif_fwd;       \
  LifBwdFn lif_bwd;       \
  LifReduceFn lif_reduce; \
  }
SPK_EACH_ISA(SPK_DECLARE)
#undef SPK_DECLARE

LifFwdFn* lif_fwd_cpu();
LifBwdFn* lif_bwd_cpu();
LifReduceFn* lif_reduce_cpu();

// CUDA launchers: return a cudaError_t as int. lif_bwd_steps: time steps of a segment at sequence length T.
int lif_fwd_cuda(const LifFwd& p, void* stream);
int lif_bwd_cuda(const LifBwd& p, void* stream);
int lif_bwd_steps(DType dtype, int64_t T);
int lif_reduce_cuda(const LifReduce& p, void* stream);
int64_t lif_reduce_parts(int64_t N, int64_t C);

}  // namespace spk
