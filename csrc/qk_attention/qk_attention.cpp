// qk_attention for torch: schema, checks, allocation, launch. One host function for CPU and CUDA.
#include "qk_attention/qk_attention.h"

#include "torch/launch.h"
#include "torch/neuron.h"

namespace spk {
namespace {

constexpr int64_t kGrain = 32768;  // element-steps worth a thread

enum Mode : int64_t { kToken, kChannel, kSpikeDriven };

ScalarType state_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// The checks of _check in spikecore/ops/qk_attention.py, word for word.
DType check_operands(const char* op, const Tensor& q, const Tensor& k, const OptTensor& v, int64_t mode, int64_t T) {
  const auto dtype =
      T ? (q.scalar_type() == ScalarType::Byte ? std::optional(DType::f32) : std::nullopt) : kernel_dtype(q.scalar_type());
  SPK_CHECK(dtype.has_value(), op, ": q must be ", T ? "uint8 (T was given)" : "float32, bfloat16, float16 or float64", ", got ",
            describe(q));
  SPK_CHECK(q.dim() == 5 && q.size(0) >= 1, op, ": q must be [T, B, H, D, N] with T >= 1, got ", describe(q));
  SPK_CHECK(!T || (8 * (q.size(0) - 1) < T && T <= 8 * q.size(0)), op, ": T must be in ", 8 * (q.size(0) - 1) + 1, " to ",
            8 * q.size(0), " for packed ", describe(q), ", got ", T);
  SPK_CHECK(!on_gpu(q) || *dtype != DType::f64, op, ": float64 runs on the CPU only, got ", describe(q));
  SPK_CHECK(mode >= kToken && mode <= kSpikeDriven && v.has_value() == (mode == kSpikeDriven), op,
            ": mode must be 0 or 1, or 2 with v, got ", mode);
  const auto check = [&](const char* arg, const Tensor& t) {
    bool ok = t.scalar_type() == q.scalar_type() && same_device(t, q) && t.dim() == 5;
    for (int i = 0; ok && i < 5; ++i) ok = t.size(i) == q.size(i);
    SPK_CHECK(ok, op, ": ", arg, " must be ", dtype_name(q.scalar_type()), " ", shape_name(q.sizes()), " on ", device_name(q),
              ", got ", describe(t));
  };
  check("k", k);
  if (v) check("v", *v);
  return *dtype;
}

void check_parameter(const char* op, const char* arg, const OptTensor& p, const Tensor& q, ScalarType state) {
  if (!p) return;
  const bool ok = p->dim() == 0 || (p->dim() == 1 && p->size(0) == q.size(2));
  SPK_CHECK(ok && p->scalar_type() == state && same_device(*p, q), op, ": ", arg, " must be a scalar or [", q.size(2), "], ",
            dtype_name(state), " on ", device_name(q), ", got ", describe(*p));
}

QkNeuron neuron(const char* op, const char* arg, const std::vector<double>& numbers, OptTensor& decay_h, OptTensor& gain_h) {
  if (numbers.empty()) return {};
  const NeuronNumbers n = neuron_numbers(op, arg, numbers);
  const auto dense = [](OptTensor& p) {
    if (p && p->dim() && p->size(0) > 1 && p->stride(0) != 1) p = torch::stable::contiguous(*p);
    return p ? p->const_data_ptr() : nullptr;
  };
  return {n.decay,
          n.gain,
          dense(decay_h),
          dense(gain_h),
          decay_h && decay_h->dim(),
          gain_h && gain_h->dim(),
          n.threshold,
          n.rest,
          n.reset_by,
          n.a,
          n.b,
          n.surrogate,
          n.hard,
          n.strict,
          n.detach};
}

// Which dimension is innermost in memory, D (then H before it: tokens of channels) or N: that of the operand which the
// attention gates, and so of all outputs.
struct Layout {
  std::vector<int64_t> sizes, strides;  // of an output with T slices
  bool channels_last;

  Layout(const Tensor& like, int64_t T) : sizes(like.sizes().begin(), like.sizes().end()) {
    sizes[0] = T;
    channels_last = like.size(4) > 1 && like.stride(4) != 1 && like.size(3) > 1 && like.stride(3) == 1;
    strides.resize(5);
    int64_t step = 1;  // an empty tensor counts sizes of 0 as 1, as torch does
    for (int d : channels_last ? std::vector{3, 2, 4, 1, 0} : std::vector{4, 3, 2, 1, 0}) {
      strides[d] = step;
      step *= std::max<int64_t>(sizes[d], 1);
    }
  }
  int inner() const { return channels_last ? 3 : 4; }
  int rows() const { return channels_last ? 4 : 3; }

  template <class Pointer>
  QkRows<Pointer> view(const Tensor& t, Pointer data) const {
    return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(rows())};
  }
  // t with its rows dense: itself where they are, else copied (into t).
  QkIn in(OptTensor& t) const {
    if (!t) return {};
    if (t->size(inner()) > 1 && t->stride(inner()) != 1) {
      std::vector<int64_t> like(t->sizes().begin(), t->sizes().end());
      Tensor copy = spk::empty(like, strides, t->scalar_type(), *t);
      torch::stable::copy_(copy, *t);
      t = copy;
    }
    return view(*t, t->const_data_ptr());
  }
  Tensor empty(const Tensor& like) const { return spk::empty(sizes, strides, like.scalar_type(), like); }
  QkOut out(Tensor& t) const { return view(t, t.mutable_data_ptr()); }

  QkShape shape(int64_t T, int64_t mode, bool currents, DType dtype) const {
    return {T, sizes[1], sizes[2], sizes[rows()], sizes[inner()], (mode == kToken) != channels_last, currents, dtype};
  }
};

std::string sizes_of(const Tensor& q) { return shape_name(q.sizes()); }

int64_t grain(const QkShape& s) {
  const int64_t part = s.columns ? s.R * std::min<int64_t>(s.L, kQkTile) : s.L * std::min<int64_t>(s.R, kQkRows);
  return kGrain / (part * s.T);
}

int64_t neurons(const QkShape& s) { return s.T * s.B * s.H * (s.columns ? s.L : s.R); }

Tensor qk_attention_fwd(Tensor q, Tensor k, OptTensor v, OptTensor attn_decay, OptTensor attn_gain, OptTensor qkv_decay,
                        OptTensor qkv_gain, std::vector<double> attn, std::vector<double> qkv, int64_t mode, int64_t T) {
  const char* op = "qk_attention";
  const DType dtype = check_operands(op, q, k, v, mode, T);
  const ScalarType state = state_type(dtype);
  check_parameter(op, "attn.decay", attn_decay, q, state);
  check_parameter(op, "attn.gain", attn_gain, q, state);
  check_parameter(op, "qkv.decay", qkv_decay, q, state);
  check_parameter(op, "qkv.gain", qkv_gain, q, state);
  SPK_CHECK(!T || qkv.empty(), op, ": qkv must be None for packed spikes");

  const bool packed = T != 0, spike_driven = mode == kSpikeDriven;
  OptTensor y = spike_driven ? q : k, s = spike_driven ? k : q;
  const Layout layout(*y, q.size(0));
  Tensor out = layout.empty(q);
  if (out.numel() == 0) return out;
  QkFwd p{layout.shape(packed ? T : q.size(0), mode, !qkv.empty(), dtype),
          neuron(op, "attn", attn, attn_decay, attn_gain),
          neuron(op, "qkv", qkv, qkv_decay, qkv_gain),
          packed,
          layout.in(y),
          layout.in(s),
          layout.in(v),
          layout.out(out),
          nullptr};
#ifdef SPK_CUDA
  if (on_gpu(q)) {
    Tensor potentials = empty1d(neurons(p.shape), ScalarType::Float, q);
    p.potentials = potentials.mutable_data_ptr<float>();
    launch_cuda(qk_fwd_cuda, p, q, op, sizes_of(q));
    return out;
  }
#endif
  launch_cpu(qk_fwd_cpu(), p, p.shape.B * p.shape.H * qk_parts(p.shape), grain(p.shape), op, sizes_of(q));
  return out;
}

template <class A>
void reduce(const QkReduce& p) {
  A* out = static_cast<A*>(p.out);
  const int64_t results = p.per_head ? p.H : 1, heads = p.per_head ? 1 : p.H;
  for (int64_t r = 0; r < results; ++r) {
    double sum = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      const double* row = p.in + (b * p.H + r * heads) * p.parts;
      for (int64_t i = 0; i < heads * p.parts; ++i) sum += row[i];
    }
    out[r] = A(sum);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_attention_bwd(
    Tensor g_out, Tensor q, Tensor k, OptTensor v, OptTensor attn_decay, OptTensor attn_gain, OptTensor qkv_decay,
    OptTensor qkv_gain, std::vector<double> attn, std::vector<double> qkv, int64_t mode, bool need_attn_decay, bool need_attn_gain,
    bool need_qkv_decay, bool need_qkv_gain) {
  const char* op = "qk_attention backward";
  const DType dtype = check_operands(op, q, k, v, mode, 0);
  const ScalarType state = state_type(dtype);
  check_parameter(op, "attn.decay", attn_decay, q, state);
  check_parameter(op, "attn.gain", attn_gain, q, state);
  check_parameter(op, "qkv.decay", qkv_decay, q, state);
  check_parameter(op, "qkv.gain", qkv_gain, q, state);
  bool ok = g_out.scalar_type() == q.scalar_type() && same_device(g_out, q) && g_out.dim() == 5;
  for (int i = 0; ok && i < 5; ++i) ok = g_out.size(i) == q.size(i);
  SPK_CHECK(ok, op, ": g_out must be ", dtype_name(q.scalar_type()), " ", shape_name(q.sizes()), " on ", device_name(q), ", got ",
            describe(g_out));
  const OptTensor parameters[] = {attn_decay, attn_gain, qkv_decay, qkv_gain};
  const bool need[] = {need_attn_decay, need_attn_gain, need_qkv_decay, need_qkv_gain};
  for (int i = 0; i < 4; ++i) SPK_CHECK(parameters[i] || !need[i], op, ": a gradient was asked for a parameter that is no tensor");

  const bool spike_driven = mode == kSpikeDriven;
  OptTensor y = spike_driven ? q : k, s = spike_driven ? k : q, g = g_out;
  const Layout layout(*y, q.size(0));
  Tensor g_q = layout.empty(q), g_k = layout.empty(q), g_v = spike_driven ? layout.empty(q) : empty1d(0, q.scalar_type(), q);
  Tensor g_p[4] = {empty1d(0, state, q), empty1d(0, state, q), empty1d(0, state, q), empty1d(0, state, q)};
  for (int i = 0; i < 4; ++i)
    if (need[i]) g_p[i] = parameters[i]->dim() ? empty1d(parameters[i]->size(0), state, q) : spk::empty({}, {}, state, q);
  const auto result = [&] { return std::make_tuple(g_q, g_k, g_v, g_p[0], g_p[1], g_p[2], g_p[3]); };
  if (q.numel() == 0) {
    for (int i = 0; i < 4; ++i)
      if (need[i]) torch::stable::zero_(g_p[i]);
    return result();
  }

  QkBwd p{layout.shape(q.size(0), mode, !qkv.empty(), dtype),
          neuron(op, "attn", attn, attn_decay, attn_gain),
          neuron(op, "qkv", qkv, qkv_decay, qkv_gain),
          layout.in(y),
          layout.in(s),
          layout.in(v),
          layout.in(g),
          layout.out(spike_driven ? g_q : g_k),
          layout.out(spike_driven ? g_k : g_q),
          spike_driven ? layout.out(g_v) : QkOut{},
          nullptr,
          nullptr,
          nullptr};
  int64_t parts = qk_parts(p.shape);
#ifdef SPK_CUDA
  if (on_gpu(q)) parts = qk_parts_cuda(p.shape);
#endif
  const int64_t B = p.shape.B, H = p.shape.H;
  const bool any = need[0] || need[1] || need[2] || need[3];
  Tensor sums = empty1d(any ? 4 * B * H * parts : 0, ScalarType::Double, q);
  if (any) p.sums = sums.mutable_data_ptr<double>();
  if (any && on_gpu(q)) torch::stable::zero_(sums);  // its kernels use a part of them
  const auto reduction = [&](int i) {
    return QkReduce{B,
                    H,
                    parts,
                    p.sums + i * B * H * parts,
                    g_p[i].mutable_data_ptr(),
                    parameters[i]->dim() != 0,
                    state == ScalarType::Double ? DType::f64 : DType::f32};
  };
#ifdef SPK_CUDA
  if (on_gpu(q)) {
    Tensor potentials = empty1d(2 * neurons(p.shape), ScalarType::Float, q),
           g_attn = empty1d(neurons(p.shape), ScalarType::Float, q);
    p.potentials = potentials.mutable_data_ptr<float>();
    p.g_attn = g_attn.mutable_data_ptr<float>();
    launch_cuda(qk_bwd_cuda, p, q, op, sizes_of(q));
    for (int i = 0; i < 4; ++i)
      if (need[i]) launch_cuda(qk_reduce_cuda, reduction(i), q, op, sizes_of(q));
    return result();
  }
#endif
  launch_cpu(qk_bwd_cpu(), p, B * H * parts, grain(p.shape), op, sizes_of(q));
  for (int i = 0; i < 4; ++i)
    if (need[i]) state == ScalarType::Double ? reduce<double>(reduction(i)) : reduce<float>(reduction(i));
  return result();
}

using torch::stable::detail::StableLibrary;
void implement(StableLibrary& m) {
  m.impl("qk_attention_fwd", TORCH_BOX(&qk_attention_fwd));
  m.impl("qk_attention_bwd", TORCH_BOX(&qk_attention_bwd));
}

}  // namespace

// clang-format off
// mode: 0 token, 1 channel, 2 spike-driven (with v). T: 0, or the time steps of packed spikes. attn, qkv: see neuron();
// qkv is empty where q, k, v are no currents.
STABLE_TORCH_LIBRARY_FRAGMENT(SPK_LIBRARY, m) {
  m.def("qk_attention_fwd(Tensor q, Tensor k, Tensor? v, Tensor? attn_decay, Tensor? attn_gain, Tensor? qkv_decay, "
        "Tensor? qkv_gain, float[] attn, float[] qkv, int mode, int T) -> Tensor");
  m.def("qk_attention_bwd(Tensor g_out, Tensor q, Tensor k, Tensor? v, Tensor? attn_decay, Tensor? attn_gain, "
        "Tensor? qkv_decay, Tensor? qkv_gain, float[] attn, float[] qkv, int mode, bool need_attn_decay, "
        "bool need_attn_gain, bool need_qkv_decay, bool need_qkv_gain) -> (Tensor g_q, Tensor g_k, Tensor g_v, "
        "Tensor g_attn_decay, Tensor g_attn_gain, Tensor g_qkv_decay, Tensor g_qkv_gain)");
}
// clang-format on
STABLE_TORCH_LIBRARY_IMPL(SPK_LIBRARY, CPU, m) { implement(m); }

#ifdef SPK_CUDA
void register_qk_attention_cuda(StableLibrary& m) { implement(m); }
#endif

}  // namespace spk
