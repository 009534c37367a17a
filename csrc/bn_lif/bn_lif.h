// Parameters of the bn_lif kernels. Rows are time slices of N neurons, dense in memory, in the layout of x; neuron n is of
// channel (n / inner) % C. State type: double for f64, else float.
#pragma once
#include "core/dispatch.h"
#include "core/params.h"
#include "lif/lif.h"

namespace spk {

struct BnShape {
  DType dtype;  // of x, residual, s, y and their gradients
  int64_t T, N, C, inner;
};

struct BnNorm {
  void *mean, *var;           // [C] state type; var: biased
  const void *weight, *bias;  // [C] state type, or null: 1 and 0
  double eps;
};

// mean and var of x. T may be 1 where all slices are the same memory.
struct BnStats {
  BnShape shape;
  int64_t x_step;
  const void* x;  // [T, N]
  void *mean, *var;
  double* sums;  // [2, parts, bn_places]: of x - k and its square, k the channel's first number
  int64_t parts;
  bool again;  // CPU: k is the mean found before: float64's second pass
};

struct BnLifFwd {
  BnShape shape;
  BnNorm norm;
  LifNeuron neuron;  // its C and inner are those of the shape
  int64_t x_step, r_step;
  const void *x, *residual;  // [T, N]; residual may be null
  const void* v_init;        // [N] state type, or null: at rest
  void *s, *y;               // [T, N]; y: norm + residual, or null
  bool take_stats;           // CPU, maps: mean and var are still to be computed
  float* constants;          // CUDA: scratch, [5, C]
};

// The sums that the gradients of a channel are made of, in this order: of g (gradient of the current), of g * (x - mean),
// and where decay or gain is learnt those of its gradient.
enum BnSum { kBnG, kBnGX, kBnDecay, kBnGain, kBnSums };

struct BnLifBwd {
  BnShape shape;
  BnNorm norm;
  LifNeuron neuron;
  int64_t x_step, r_step;
  const void *x, *residual, *v_init;
  const void *g_s, *g_y;  // [T, N], or null: zero
  void* g;                // [T, N]: g, or null: not wanted. Where statistics are of x, g_residual or g_x itself
  void* g_x;              // [T, N]
  void* g_v_init;         // [N] state type, or null
  void *g_weight, *g_bias, *g_decay, *g_gain;  // [C] state type; the last two or null
  bool batch;                                  // the statistics are those of x
  bool detach;
  int32_t surrogate;
  double a, b;
  double* sums;  // [kBnSums, parts, bn_places]; CPU, maps: not used
  int64_t parts;
  float* checkpoints;  // CUDA: [ceil(T / steps) - 1, N] potentials at the starts of later segments, or null
  int32_t steps;       // CUDA: time steps of a segment
  float* constants;    // CUDA: scratch, [7, C]
};

// Whether neighbours in memory are mostly of one channel. On the CPU such a layout is worked on channel by channel, and
// statistics and gradients need no second way to memory; the other (channels-last) by groups of whole periods C * inner.
static inline bool bn_maps(const BnShape& s, bool cuda = false) { return s.inner >= (cuda ? 32 : 16); }

// Sums of a channel that a part leaves: CUDA leaves one for every place of a period.
static inline int64_t bn_places(const BnShape& s, bool cuda) { return cuda && !bn_maps(s, cuda) ? s.C * s.inner : s.C; }

constexpr int kBnTile = 1024;   // neurons that a CPU kernel works on at once, at most
constexpr int kBnPart = 16384;  // neurons of a group of periods, at least
// Channels of a unit (maps), or periods of one.
static inline int64_t bn_unit(const BnShape& s) {
  const int64_t size = bn_maps(s) ? kBnTile / s.inner : kBnPart / (s.C * s.inner);
  return size < 1 ? 1 : size;
}
static inline int64_t bn_units(const BnShape& s) {
  const int64_t of = bn_maps(s) ? s.C : s.N / (s.C * s.inner), unit = bn_unit(s);
  return (of + unit - 1) / unit;
}

using BnStatsFn = int(const BnStats&, int64_t begin, int64_t end);    // units [begin, end); periods only
using BnLifFwdFn = int(const BnLifFwd&, int64_t begin, int64_t end);  // units [begin, end)
using BnLifBwdFn = int(const BnLifBwd&, int64_t begin, int64_t end);  // units [begin, end)

// *_finish: from the parts' sums to the results, channels [begin, end). bn_lif_bwd_x: g_x from g and these results.
#define SPK_DECLARE(isa)        \
  namespace isa {               \
  BnStatsFn bn_stats;           \
  BnStatsFn bn_stats_finish;    \
  BnLifFwdFn bn_lif_fwd;        \
  BnLifBwdFn bn_lif_bwd;        \
  BnLifBwdFn bn_lif_bwd_finish; \
  BnLifBwdFn bn_lif_bwd_x;      \
  }
SPK_EACH_ISA(SPK_DECLARE)
#undef SPK_DECLARE

BnStatsFn* bn_stats_cpu();
BnStatsFn* bn_stats_finish_cpu();
BnLifFwdFn* bn_lif_fwd_cpu();
BnLifBwdFn* bn_lif_bwd_cpu();
BnLifBwdFn* bn_lif_bwd_finish_cpu();
BnLifBwdFn* bn_lif_bwd_x_cpu();

// CUDA launchers: return a cudaError_t as int. bn_parts_cuda: parts of a channel; bn_lif_bwd_steps: time steps of a segment.
int bn_stats_cuda(const BnStats& p, void* stream);
int bn_lif_fwd_cuda(const BnLifFwd& p, void* stream);
int bn_lif_bwd_cuda(const BnLifBwd& p, void* stream);
int64_t bn_parts_cuda(const BnShape& s);
int bn_lif_bwd_steps(int64_t T);

}  // namespace spk
