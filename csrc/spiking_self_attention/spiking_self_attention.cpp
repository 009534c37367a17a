// spiking_self_attention for torch: schema, checks, allocation, launch. One host function for CPU and CUDA.
#include "spiking_self_attention/spiking_self_attention.h"

#include "torch/launch.h"
#include "torch/neuron.h"

namespace spk {
namespace {

constexpr int64_t kGrain = 1 << 18;  // multiplications worth a thread

using Numbers = std::vector<double>;

bool is_float(const Tensor& x) { return kernel_dtype(x.scalar_type()).has_value(); }

// The checks of _check in spikecore/ops/spiking_self_attention.py, word for word. T: 0 for floats, else of packed spikes.
void check_operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, int64_t T, bool currents) {
  if (T == 0) {
    SPK_CHECK(is_float(q), op, ": q must be float32, bfloat16, float16 or float64 (packed spikes need T), got ", describe(q));
    SPK_CHECK(q.dim() == 5 && q.size(0) >= 1, op, ": q must be [T, B, H, D, N] with T >= 1, got ", describe(q));
    SPK_CHECK(!on_gpu(q) || q.scalar_type() != ScalarType::Double, op, ": float64 runs on the CPU only, got ", describe(q));
  } else {
    SPK_CHECK(q.scalar_type() == ScalarType::Byte && q.dim() == 5 && T >= 1 && q.size(0) == (T + 7) / 8, op,
              ": q must be uint8 [ceil(T / 8), B, H, D, N] with T = ", T, ", got ", describe(q));
    SPK_CHECK(!currents, op, ": qkv needs currents, got packed spikes");
  }
  for (const auto& [arg, x] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    bool ok = x->scalar_type() == q.scalar_type() && x->dim() == 5 && same_device(*x, q);
    for (int i = 0; ok && i < 5; ++i) ok = x->size(i) == q.size(i);
    SPK_CHECK(ok, op, ": ", arg, " must be ", dtype_name(q.scalar_type()), " ", shape_name(q.sizes()), " on ", device_name(q),
              ", got ", describe(*x));
  }
}

ScalarType state_type(const Tensor& q) { return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check_parameter(const char* op, const char* arg, const OptTensor& p, const Tensor& q) {
  if (!p) return;
  const int64_t H = q.size(2);
  const bool ok = (p->dim() == 0 || (p->dim() == 1 && p->size(0) == H)) && p->scalar_type() == state_type(q) && same_device(*p, q);
  SPK_CHECK(ok, op, ": ", arg, " must be a scalar or [", H, "], ", dtype_name(state_type(q)), " on ", device_name(q), ", got ",
            describe(*p));
}

// decay and gain as dense [C] tensors, C being H or 1: one number beside a tensor of all heads is written out.
struct Parameters {
  OptTensor decay, gain;
  int64_t C = 1;

  Parameters(const OptTensor& decay_h, const OptTensor& gain_h, const Tensor& q) {
    if ((decay_h && decay_h->dim()) || (gain_h && gain_h->dim())) C = q.size(2);
    decay = dense(decay_h);
    gain = dense(gain_h);
  }
  OptTensor dense(const OptTensor& p) const {
    if (!p || (p->dim() == 1 ? p->size(0) <= 1 || p->stride(0) == 1 : C == 1)) return p;
    Tensor out = empty1d(C, p->scalar_type(), *p);
    torch::stable::copy_(out, *p);
    return out;
  }
};

const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

AttentionNeuron neuron(const char* op, const char* arg, const Numbers& numbers, const Parameters& p) {
  if (numbers.empty()) return {};
  const NeuronNumbers n = neuron_numbers(op, arg, numbers);
  return {{n.decay, n.gain, data(p.decay), data(p.gain), p.C, 1, n.threshold, n.rest, n.reset_by, n.hard, n.strict},
          n.detach,
          n.surrogate,
          n.a,
          n.b};
}

template <class P>
Sequence<P> sequence(P data, const Tensor& x) {
  return {data, x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}
SequenceIn in(const Tensor& x) { return sequence<const void*>(x.const_data_ptr(), x); }
SequenceOut out(Tensor& x) { return sequence<void*>(x.mutable_data_ptr(), x); }

AttentionShape shape_of(const Tensor& q, int64_t T, bool currents, double scale) {
  const bool packed = T > 0;
  return {packed ? DType::f32 : *kernel_dtype(q.scalar_type()),
          packed,
          currents,
          packed ? T : q.size(0),
          q.size(1),
          q.size(2),
          q.size(3),
          q.size(4),
          scale};
}

std::string sizes_of(const AttentionShape& s) {
  std::ostringstream text;
  text << "T=" << s.T << ", B=" << s.B << ", H=" << s.H << ", D=" << s.D << ", N=" << s.N;
  return text.str();
}

int64_t grain(const AttentionShape& s) { return kGrain / std::max<int64_t>(s.T * s.D * s.D * s.N, 1); }

#ifdef SPK_CUDA
// On CUDA the currents pass through the kernels of lif: forward leaves one bit a spike, which the attention reads.
struct Currents {
  const char* op;
  const AttentionShape& s;
  const AttentionNeuron& neuron;
  const int64_t slice, bytes;  // elements of a slice of time; slices of bits

  Currents(const char* op, const AttentionShape& s, const AttentionNeuron& neuron)
      : op(op), s(s), neuron(neuron), slice(s.B * s.H * s.D * s.N), bytes((s.T + 7) / 8) {}

  LifNeuron lif() const {
    LifNeuron p = neuron.lif;
    p.inner = p.C > 1 ? s.D * s.N : slice;
    return p;
  }
  Tensor contiguous(const Tensor& x, int64_t steps, ScalarType dtype) const {
    return empty({steps, s.B, s.H, s.D, s.N}, {slice, s.H * s.D * s.N, s.D * s.N, s.N, 1}, dtype, x);
  }
  Tensor bits(const Tensor& currents) const {
    const Tensor x = torch::stable::contiguous(currents);
    Tensor out = contiguous(x, bytes, ScalarType::Byte), v_last = empty1d(slice, ScalarType::Float, x);
    const LifFwd p{
        lif(),   s.dtype, s.T, slice, slice, x.const_data_ptr(), nullptr, out.mutable_data_ptr(), v_last.mutable_data_ptr(),
        nullptr, nullptr, true};
    launch_cuda(lif_fwd_cuda, p, x, op, sizes_of(s));
    return out;
  }
  // g_x from the gradient of the spikes, both float; per-neuron gradients of the parameters at g_decay, g_gain or null.
  void back(const Tensor& currents, const Tensor& g_s, Tensor& g_x, float* g_decay, float* g_gain) const {
    Tensor x = contiguous(currents, s.T, ScalarType::Float), g = g_x;
    torch::stable::copy_(x, currents);
    const bool direct = s.dtype == DType::f32 && g_x.is_contiguous();
    if (!direct) g = contiguous(currents, s.T, ScalarType::Float);
    LifBwd p{lif(),
             DType::f32,
             s.T,
             slice,
             slice,
             x.const_data_ptr(),
             nullptr,
             g_s.const_data_ptr(),
             nullptr,
             nullptr,
             nullptr,
             g.mutable_data_ptr(),
             g_decay,
             g_gain,
             nullptr,
             neuron.detach,
             neuron.surrogate,
             neuron.a,
             neuron.b,
             nullptr,
             lif_bwd_steps(DType::f32, s.T)};
    Tensor checkpoints = empty1d((s.T - 1) / p.steps * slice, ScalarType::Float, x);
    p.checkpoints = checkpoints.mutable_data_ptr<float>();
    launch_cuda(lif_bwd_cuda, p, x, op, sizes_of(s));
    if (!direct) torch::stable::copy_(g_x, g);
  }
};
#endif

Tensor spiking_self_attention_fwd(Tensor q, Tensor k, Tensor v, OptTensor decay_h, OptTensor gain_h, OptTensor qkv_decay_h,
                                  OptTensor qkv_gain_h, double scale, int64_t T, Numbers attn, Numbers qkv) {
  const char* op = "spiking_self_attention";
  check_operands(op, q, k, v, T, !qkv.empty());
  check_parameter(op, "attn.decay", decay_h, q);
  check_parameter(op, "attn.gain", gain_h, q);
  check_parameter(op, "qkv.decay", qkv_decay_h, q);
  check_parameter(op, "qkv.gain", qkv_gain_h, q);
  const AttentionShape shape = shape_of(q, T, !qkv.empty(), scale);
  const Parameters attn_p(decay_h, gain_h, q), qkv_p(qkv_decay_h, qkv_gain_h, q);
  Tensor s = Slices(q).empty_sequence(q.size(0), q.scalar_type(), q);
  if (q.numel() == 0) return s;
  SpikingSelfAttentionFwd p{shape,  neuron(op, "attn", attn, attn_p), neuron(op, "qkv", qkv, qkv_p), in(q), in(k), in(v), out(s),
                            nullptr};
#ifdef SPK_CUDA
  if (on_gpu(q)) {
    if (shape.currents) {
      const Currents currents(op, shape, p.qkv);
      q = currents.bits(q), k = currents.bits(k), v = currents.bits(v);
      p.q = in(q), p.k = in(k), p.v = in(v);
    }
    Tensor scratch = empty1d(spiking_self_attention_fwd_scratch(shape), ScalarType::Float, q);
    p.scratch = scratch.mutable_data_ptr<float>();
    launch_cuda(spiking_self_attention_fwd_cuda, p, q, op, sizes_of(shape));
    return s;
  }
#endif
  launch_cpu(spiking_self_attention_fwd_cpu(), p, shape.B * shape.H, grain(shape), op, sizes_of(shape));
  return s;
}

// Sum a parameter's gradients, [B, H] or [3, B, H, D, N] with `inner` = D N, over its heads.
Tensor reduce(const Tensor& per_head, const Tensor& parameter, const AttentionShape& s, int64_t inner) {
  const ScalarType state = per_head.scalar_type();
  const bool scalar = parameter.dim() == 0;
  Tensor out = scalar ? empty({}, {}, state, per_head) : empty1d(s.H, state, per_head);
  LifReduce p{state == ScalarType::Double ? DType::f64 : DType::f32,
              per_head.numel(),
              scalar ? 1 : s.H,
              scalar ? per_head.numel() : inner,
              per_head.const_data_ptr(),
              out.mutable_data_ptr(),
              nullptr};
  const char* op = "spiking_self_attention backward";
#ifdef SPK_CUDA
  if (on_gpu(per_head)) {
    Tensor partial = empty1d(p.C * lif_reduce_parts(p.N, p.C), ScalarType::Double, per_head);
    p.partial = partial.mutable_data_ptr<double>();
    launch_cuda(lif_reduce_cuda, p, per_head, op, sizes_of(s));
    return out;
  }
#endif
  launch_cpu(lif_reduce_cpu(), p, p.C, p.C, op, sizes_of(s));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spiking_self_attention_bwd(
    Tensor g_out, Tensor q, Tensor k, Tensor v, OptTensor decay_h, OptTensor gain_h, OptTensor qkv_decay_h, OptTensor qkv_gain_h,
    double scale, Numbers attn, Numbers qkv, bool need_decay, bool need_gain, bool need_qkv_decay, bool need_qkv_gain) {
  const char* op = "spiking_self_attention backward";
  check_operands(op, q, k, v, 0, !qkv.empty());
  check_operands(op, q, g_out, v, 0, !qkv.empty());
  check_parameter(op, "attn.decay", decay_h, q);
  check_parameter(op, "attn.gain", gain_h, q);
  check_parameter(op, "qkv.decay", qkv_decay_h, q);
  check_parameter(op, "qkv.gain", qkv_gain_h, q);
  SPK_CHECK(
      (decay_h || !need_decay) && (gain_h || !need_gain) && (qkv_decay_h || !need_qkv_decay) && (qkv_gain_h || !need_qkv_gain), op,
      ": a gradient was asked for a parameter that is no tensor");
  const AttentionShape shape = shape_of(q, 0, !qkv.empty(), scale);
  const Parameters attn_p(decay_h, gain_h, q), qkv_p(qkv_decay_h, qkv_gain_h, q);
  const ScalarType state = state_type(q);
  const auto like = [&](const Tensor& x) { return Slices(x).empty_sequence(shape.T, x.scalar_type(), x); };
  Tensor g_q = like(q), g_k = like(k), g_v = like(v);
  const OptTensor* const parameters[4] = {&decay_h, &gain_h, &qkv_decay_h, &qkv_gain_h};
  const bool need[4] = {need_decay, need_gain, need_qkv_decay, need_qkv_gain};
  std::vector<Tensor> g;
  for (int i = 0; i < 4; ++i) {
    Tensor per_head = empty1d(need[i] ? shape.B * shape.H : 0, state, q);
    g.push_back(std::move(per_head));
  }
  if (q.numel() == 0) {
    for (int i = 0; i < 4; ++i) {
      if (!need[i]) continue;
      const Tensor& p = **parameters[i];
      g[i] = p.dim() ? empty1d(p.size(0), state, q) : empty({}, {}, state, q);
      torch::stable::zero_(g[i]);
    }
    return {g_q, g_k, g_v, g[0], g[1], g[2], g[3]};
  }
  int64_t inner = 1;  // of the gradients of qkv's parameters
  const auto target = [&](int i) { return need[i] ? g[i].mutable_data_ptr() : nullptr; };
  SpikingSelfAttentionBwd p{shape,
                            neuron(op, "attn", attn, attn_p),
                            neuron(op, "qkv", qkv, qkv_p),
                            in(q),
                            in(k),
                            in(v),
                            in(g_out),
                            out(g_q),
                            out(g_k),
                            out(g_v),
                            target(0),
                            target(1),
                            target(2),
                            target(3),
                            nullptr};
#ifdef SPK_CUDA
  if (on_gpu(q)) {
    const Currents currents(op, shape, p.qkv);
    Tensor x[3] = {q, k, v}, g_x[3] = {g_q, g_k, g_v};
    if (shape.currents) {
      q = currents.bits(q), k = currents.bits(k), v = currents.bits(v);
      p.q = in(q), p.k = in(k), p.v = in(v);
      SequenceOut* const g_s[3] = {&p.g_q, &p.g_k, &p.g_v};
      for (int i = 0; i < 3; ++i) {
        g_x[i] = currents.contiguous(q, shape.T, ScalarType::Float);
        *g_s[i] = out(g_x[i]);
      }
    }
    Tensor scratch = empty1d(spiking_self_attention_bwd_scratch(shape), ScalarType::Float, q);
    p.scratch = scratch.mutable_data_ptr<float>();
    launch_cuda(spiking_self_attention_bwd_cuda, p, q, op, sizes_of(shape));
    if (shape.currents) {
      Tensor* const results[3] = {&g_q, &g_k, &g_v};
      float* per_neuron[2] = {nullptr, nullptr};
      for (int i = 0; i < 2; ++i) {
        if (!need[2 + i]) continue;
        g[2 + i] = empty1d(3 * currents.slice, state, q);
        per_neuron[i] = g[2 + i].mutable_data_ptr<float>();
      }
      for (int i = 0; i < 3; ++i) {
        const auto at = [&](int j) { return per_neuron[j] ? per_neuron[j] + i * currents.slice : nullptr; };
        currents.back(x[i], g_x[i], *results[i], at(0), at(1));
      }
      inner = shape.D * shape.N;
    }
  } else
#endif
    launch_cpu(spiking_self_attention_bwd_cpu(), p, shape.B * shape.H, grain(shape), op, sizes_of(shape));
  for (int i = 0; i < 4; ++i)
    if (need[i]) g[i] = reduce(g[i], **parameters[i], shape, i < 2 ? 1 : inner);
  return {g_q, g_k, g_v, g[0], g[1], g[2], g[3]};
}

using torch::stable::detail::StableLibrary;
void implement(StableLibrary& m) {
  m.impl("spiking_self_attention_fwd", TORCH_BOX(&spiking_self_attention_fwd));
  m.impl("spiking_self_attention_bwd", TORCH_BOX(&spiking_self_attention_bwd));
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(SPK_LIBRARY, m) {
  m.def("spiking_self_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? decay_h, Tensor? gain_h, Tensor? qkv_decay_h, "
        "Tensor? qkv_gain_h, float scale, int T, float[] attn, float[] qkv) -> Tensor");
  m.def("spiking_self_attention_bwd(Tensor g_out, Tensor q, Tensor k, Tensor v, Tensor? decay_h, Tensor? gain_h, "
        "Tensor? qkv_decay_h, Tensor? qkv_gain_h, float scale, float[] attn, float[] qkv, bool need_decay, bool need_gain, "
        "bool need_qkv_decay, bool need_qkv_gain) -> (Tensor g_q, Tensor g_k, Tensor g_v, Tensor g_decay, Tensor g_gain, "
        "Tensor g_qkv_decay, Tensor g_qkv_gain)");
}
// clang-format on
STABLE_TORCH_LIBRARY_IMPL(SPK_LIBRARY, CPU, m) { implement(m); }

#ifdef SPK_CUDA
void register_spiking_self_attention_cuda(StableLibrary& m) { implement(m); }
#endif

}  // namespace spk
