// Parameters of the spiking self-attention kernels. A head is one (b, h); its operands are D rows of N columns a step.
#pragma once
#include "core/dispatch.h"
#include "core/params.h"
#include "lif/lif.h"

namespace spk {

// [T, B, H, D, N] anywhere in memory; packed: uint8 [ceil(T / 8), B, H, D, N].
template <class P>
struct Sequence {
  P data;
  int64_t step, batch, head, row, column;  // strides, in elements
};
using SequenceIn = Sequence<const void*>;
using SequenceOut = Sequence<void*>;

// The neuron's channel is the head: C is H, or 1.
struct AttentionNeuron {
  LifNeuron lif;
  bool detach;
  int32_t surrogate;
  double a, b;  // the surrogate's parameters
};

struct AttentionShape {
  DType dtype;  // of q, k, v, out and their gradients, unless packed
  bool packed;
  bool currents;  // q, k, v pass through neurons `qkv` first
  int64_t T, B, H, D, N;
  double scale;
};

struct SpikingSelfAttentionFwd {
  AttentionShape shape;
  AttentionNeuron attn, qkv;
  SequenceIn q, k, v;
  SequenceOut out;
  void* scratch;  // CUDA: spiking_self_attention_fwd_scratch floats
};

struct SpikingSelfAttentionBwd {
  AttentionShape shape;
  AttentionNeuron attn, qkv;
  SequenceIn q, k, v, g_out;
  SequenceOut g_q, g_k, g_v;
  void *g_decay, *g_gain, *g_qkv_decay, *g_qkv_gain;  // [B, H] state type, or null
  void* scratch;                                      // CUDA: spiking_self_attention_bwd_scratch floats
};

using SpikingSelfAttentionFwdFn = int(const SpikingSelfAttentionFwd&, int64_t begin, int64_t end);  // heads [begin, end)
using SpikingSelfAttentionBwdFn = int(const SpikingSelfAttentionBwd&, int64_t begin, int64_t end);

#define SPK_DECLARE(isa)                                \
  namespace isa {                                       \
  SpikingSelfAttentionFwdFn spiking_self_attention_fwd; \
  SpikingSelfAttentionBwdFn spiking_self_attention_bwd; \
  }
SPK_EACH_ISA(SPK_DECLARE)
#undef SPK_DECLARE

SpikingSelfAttentionFwdFn* spiking_self_attention_fwd_cpu();
SpikingSelfAttentionBwdFn* spiking_self_attention_bwd_cpu();

// CUDA launchers: return a cudaError_t as int. From currents, q, k and v hold the bits of their neurons, and backward
// gives float gradients of those spikes. Scratch is counted in floats.
int spiking_self_attention_fwd_cuda(const SpikingSelfAttentionFwd& p, void* stream);
int spiking_self_attention_bwd_cuda(const SpikingSelfAttentionBwd& p, void* stream);
int64_t spiking_self_attention_fwd_scratch(const AttentionShape& s);
int64_t spiking_self_attention_bwd_scratch(const AttentionShape& s);

}  // namespace spk
