// Parameters of the qk_attention kernels. Token, channel and spike-driven attention in either memory layout are one
// computation on blocks of R rows of L neighbouring elements, a block for each (t, b, h):
//
//   I = sum of s (or s * w) over the rows (columns: an attention neuron for each of the L columns), or over each row
//   a = lif(I),  out = a * y
//
// State type: double for f64, else float.
#pragma once
#include "core/dispatch.h"
#include "core/params.h"

namespace spk {

struct QkNeuron {
  double decay, gain;                      // where the pointer below is null
  const void *decay_h, *gain_h;            // [H] or one element, state type, or null
  int64_t decay_step, gain_step;           // elements from head to head: 1, or 0 where there is one for all
  double threshold, rest, reset_by, a, b;  // a, b: the surrogate's parameters
  int32_t surrogate;
  bool hard, strict, detach;
};

// Strides in elements; those of a row lie side by side.
template <class Pointer>
struct QkRows {
  Pointer data;  // [T, B, H, R, L]
  int64_t t, b, h, r;
};
using QkIn = QkRows<const void*>;
using QkOut = QkRows<void*>;

struct QkShape {
  int64_t T, B, H, R, L;
  bool columns;   // sum over the rows
  bool currents;  // y, s, w pass through neurons of their own first
  DType dtype;    // of all operands
};

struct QkFwd {
  QkShape shape;
  QkNeuron attn, qkv;
  bool packed;   // operands are bits: uint8, ceil(T / 8) slices along t
  QkIn y, s, w;  // w: null where there is one factor
  QkOut out;
  float* potentials;  // CUDA: [T, B, H, columns ? L : R], I
};

struct QkBwd {
  QkShape shape;
  QkNeuron attn, qkv;
  QkIn y, s, w, g_out;
  QkOut g_y, g_s, g_w;
  // Of the learnable parameters, in the order of QkSum, or null: [4, B, H, parts].
  double* sums;
  float* potentials;  // CUDA: [2, T, B, H, columns ? L : R], I and the attention neurons' potentials
  float* g_attn;      // CUDA: [T, B, H, columns ? L : R], gradient of a, then of I
};

enum QkSum { kAttnDecay, kAttnGain, kQkvDecay, kQkvGain };

// out[h] (or one element: over all heads) = sum over B and parts of in, in an order that only the sizes fix.
struct QkReduce {
  int64_t B, H, parts;
  const double* in;  // [B, H, parts]
  void* out;         // [H] or one element, state type
  bool per_head;
  DType dtype;  // f32 or f64
};

constexpr int kQkTile = 256;  // columns that a CPU kernel works on at once
constexpr int kQkRows = 64;   // rows that it works on at once where neurons belong to rows
// Parts of a block (b, h) that are independent of each other.
static inline int64_t qk_parts(const QkShape& s) {
  return s.columns ? (s.L + kQkTile - 1) / kQkTile : (s.R + kQkRows - 1) / kQkRows;
}

using QkFwdFn = int(const QkFwd&, int64_t begin, int64_t end);  // parts [begin, end) of B * H * qk_parts
using QkBwdFn = int(const QkBwd&, int64_t begin, int64_t end);

#define SPK_DECLARE(isa) \
  namespace isa {        \
  QkFwdFn qk_fwd;        \
  QkBwdFn qk_bwd;        \
  }
SPK_EACH_ISA(SPK_DECLARE)
#undef SPK_DECLARE

QkFwdFn* qk_fwd_cpu();
QkBwdFn* qk_bwd_cpu();

// CUDA launchers: return a cudaError_t as int. qk_parts_cuda: parts of a block in `sums` there.
int qk_fwd_cuda(const QkFwd& p, void* stream);
int qk_bwd_cuda(const QkBwd& p, void* stream);
int qk_reduce_cuda(const QkReduce& p, void* stream);
int64_t qk_parts_cuda(const QkShape& s);

}  // namespace spk
