// lif for torch: schema, checks, allocation, launch. One host function for CPU and CUDA.
#include "lif/lif.h"

#include "torch/launch.h"
#include "torch/neuron.h"

namespace spk {
namespace {

constexpr int64_t kGrain = 32768;  // element-steps worth a thread

// The checks of _check in spikecore/ops/lif.py, word for word.
DType check_x(const char* op, const Tensor& x) {
  const auto dtype = kernel_dtype(x.scalar_type());
  SPK_CHECK(dtype.has_value(), op, ": x must be float32, bfloat16, float16 or float64, got ", describe(x));
  SPK_CHECK(x.dim() >= 1 && x.size(0) >= 1, op, ": x must be [T, ...] with T >= 1, got ", describe(x));
  SPK_CHECK(!on_gpu(x) || *dtype != DType::f64, op, ": float64 runs on the CPU only, got ", describe(x));
  return *dtype;
}

ScalarType state_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

void check_parameter(const char* op, const char* arg, const OptTensor& p, const Tensor& x, ScalarType state, int64_t channel_dim) {
  if (!p) return;
  std::string want = "a scalar";
  bool ok = p->dim() == 0;
  if (!ok) {
    const int64_t d = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
    SPK_CHECK(d > 0 && d < x.dim(), op, ": channel_dim must name a dimension of x after the first (x has ", x.dim(), "), got ",
              channel_dim);
    want += " or [" + std::to_string(x.size(d)) + "]";
    ok = p->dim() == 1 && p->size(0) == x.size(d);
  }
  SPK_CHECK(ok && p->scalar_type() == state && same_device(*p, x), op, ": ", arg, " must be ", want, ", ", dtype_name(state),
            " on ", device_name(x), ", got ", describe(*p));
}

// Gradients and v_init: shape as given, or one line that says what came.
void check_tensor(const char* op, const char* arg, const OptTensor& t, const Tensor& x, int first, ScalarType dtype) {
  if (!t) return;
  const auto sizes = x.sizes().slice(first);
  bool ok = t->scalar_type() == dtype && same_device(*t, x) && size_t(t->dim()) == sizes.size();
  for (size_t i = 0; ok && i < sizes.size(); ++i) ok = t->size(i) == sizes[i];
  SPK_CHECK(ok, op, ": ", arg, " must be ", dtype_name(dtype), " ", shape_name(sizes), " on ", device_name(x), ", got ",
            describe(*t));
}

const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// decay and gain as dense [C] (or [1]) tensors, and where a neuron's channel is read off its position.
struct Parameters {
  OptTensor decay, gain;
  int64_t C = 1, inner = 1;

  Parameters(const OptTensor& decay_c, const OptTensor& gain_c, const Tensor& x, const Slices& slices, int64_t channel_dim) {
    inner = std::max<int64_t>(slices.N, 1);
    if ((decay_c && decay_c->dim()) || (gain_c && gain_c->dim())) {
      const int64_t d = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
      C = x.size(d);
      // A dimension of size 1 may carry any stride; N then makes every neuron channel 0.
      inner = C > 1 ? slices.strides[d - 1] : std::max<int64_t>(slices.N, 1);
    }
    decay = dense(decay_c);
    gain = dense(gain_c);
  }

  // One number for all channels beside a per-channel tensor is written out, so that kernels know one form.
  OptTensor dense(const OptTensor& p) const {
    if (!p || (p->dim() == 1 ? p->size(0) <= 1 || p->stride(0) == 1 : C == 1)) return p;
    Tensor out = empty1d(C, p->scalar_type(), *p);
    torch::stable::copy_(out, *p);
    return out;
  }
};

LifNeuron neuron(const Parameters& q, const NeuronNumbers& n) {
  return {n.decay, n.gain, data(q.decay), data(q.gain), q.C, q.inner, n.threshold, n.rest, n.reset_by, n.hard, n.strict};
}

std::string sizes_of(const Slices& s) { return "T=" + std::to_string(s.T) + ", N=" + std::to_string(s.N); }

std::tuple<Tensor, Tensor, Tensor, Tensor> lif_fwd(Tensor x, OptTensor decay_c, OptTensor gain_c, OptTensor v_init,
                                                   std::vector<double> numbers, int64_t channel_dim, bool return_h, bool return_v,
                                                   bool packed) {
  const NeuronNumbers n = neuron_numbers("lif", "neuron", numbers);
  const DType dtype = check_x("lif", x);
  const ScalarType state = state_type(dtype);
  check_parameter("lif", "decay", decay_c, x, state, channel_dim);
  check_parameter("lif", "gain", gain_c, x, state, channel_dim);
  check_tensor("lif", "v_init", v_init, x, 1, state);

  if (!Slices(x).dense) x = torch::stable::contiguous(x);
  const Slices slices(x);
  if (v_init) v_init = slices.laid_out(*v_init, 0);
  const Parameters q(decay_c, gain_c, x, slices, channel_dim);
  Tensor s =
      packed ? slices.empty_sequence((slices.T + 7) / 8, ScalarType::Byte, x) : slices.empty_sequence(slices.T, x.scalar_type(), x);
  Tensor v_last = slices.empty_slice(state, x);
  Tensor h = return_h ? slices.empty_sequence(slices.T, state, x) : empty1d(0, state, x);
  Tensor v = return_v ? slices.empty_sequence(slices.T, state, x) : empty1d(0, state, x);
  auto out = std::make_tuple(s, v_last, h, v);
  if (slices.N == 0) return out;

  const LifFwd p{neuron(q, n),
                 dtype,
                 slices.T,
                 slices.N,
                 slices.step,
                 x.const_data_ptr(),
                 data(v_init),
                 s.mutable_data_ptr(),
                 v_last.mutable_data_ptr(),
                 return_h ? h.mutable_data_ptr() : nullptr,
                 return_v ? v.mutable_data_ptr() : nullptr,
                 packed};
#ifdef SPK_CUDA
  if (on_gpu(x)) {
    launch_cuda(lif_fwd_cuda, p, x, "lif", sizes_of(slices));
    return out;
  }
#endif
  launch_cpu(lif_fwd_cpu(), p, lif_chunks(slices.N), kGrain / (kLifChunk * slices.T), "lif", sizes_of(slices));
  return out;
}

// Sum the per-neuron gradients of a parameter over its channels.
Tensor reduce(const Tensor& per_neuron, const Tensor& parameter, const Slices& slices, const Parameters& q) {
  const ScalarType state = per_neuron.scalar_type();
  const bool scalar = parameter.dim() == 0;
  const int64_t C = scalar ? 1 : q.C, inner = scalar ? slices.N : q.inner;
  Tensor out = scalar ? empty({}, {}, state, per_neuron) : empty1d(C, state, per_neuron);
  LifReduce p{state == ScalarType::Double ? DType::f64 : DType::f32,
              slices.N,
              C,
              inner,
              per_neuron.const_data_ptr(),
              out.mutable_data_ptr(),
              nullptr};
#ifdef SPK_CUDA
  if (on_gpu(per_neuron)) {
    Tensor partial = empty1d(C * lif_reduce_parts(slices.N, C), ScalarType::Double, per_neuron);
    p.partial = partial.mutable_data_ptr<double>();
    launch_cuda(lif_reduce_cuda, p, per_neuron, "lif backward", sizes_of(slices));
    return out;
  }
#endif
  launch_cpu(lif_reduce_cpu(), p, C, kGrain * C / std::max<int64_t>(slices.N, 1), "lif backward", sizes_of(slices));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lif_bwd(OptTensor g_s, OptTensor g_v_last, OptTensor g_h, OptTensor g_v, Tensor x,
                                                   OptTensor decay_c, OptTensor gain_c, OptTensor v_init,
                                                   std::vector<double> numbers, int64_t channel_dim, bool need_decay,
                                                   bool need_gain, bool need_v_init) {
  const char* op = "lif backward";
  const NeuronNumbers n = neuron_numbers(op, "neuron", numbers);
  const DType dtype = check_x(op, x);
  const ScalarType state = state_type(dtype);
  check_parameter(op, "decay", decay_c, x, state, channel_dim);
  check_parameter(op, "gain", gain_c, x, state, channel_dim);
  check_tensor(op, "v_init", v_init, x, 1, state);
  check_tensor(op, "g_s", g_s, x, 0, x.scalar_type());
  check_tensor(op, "g_v_last", g_v_last, x, 1, state);
  check_tensor(op, "g_h", g_h, x, 0, state);
  check_tensor(op, "g_v", g_v, x, 0, state);
  SPK_CHECK((decay_c || !need_decay) && (gain_c || !need_gain), op, ": a gradient was asked for a parameter that is no tensor");

  if (!Slices(x).dense) x = torch::stable::contiguous(x);
  const Slices slices(x);
  if (v_init) v_init = slices.laid_out(*v_init, 0);
  if (g_v_last) g_v_last = slices.laid_out(*g_v_last, 0);
  if (g_s) g_s = slices.laid_out(*g_s, 1);
  if (g_h) g_h = slices.laid_out(*g_h, 1);
  if (g_v) g_v = slices.laid_out(*g_v, 1);
  const Parameters q(decay_c, gain_c, x, slices, channel_dim);
  Tensor g_x = slices.empty_sequence(slices.T, x.scalar_type(), x);
  const auto per_neuron = [&](bool need) { return need ? slices.empty_slice(state, x) : empty1d(0, state, x); };
  Tensor g_decay = per_neuron(need_decay), g_gain = per_neuron(need_gain), g_v_init = per_neuron(need_v_init);
  if (slices.N == 0) {
    const auto zeros = [&](bool need, const OptTensor& like) {
      if (!need) return empty1d(0, state, x);
      Tensor z = like->dim() ? empty1d(like->size(0), state, x) : empty({}, {}, state, x);
      torch::stable::zero_(z);
      return z;
    };
    return std::make_tuple(g_x, zeros(need_decay, decay_c), zeros(need_gain, gain_c), g_v_init);
  }

  const auto target = [](bool need, Tensor& t) { return need ? t.mutable_data_ptr() : nullptr; };
  LifBwd p{neuron(q, n),
           dtype,
           slices.T,
           slices.N,
           slices.step,
           x.const_data_ptr(),
           data(v_init),
           data(g_s),
           data(g_v_last),
           data(g_h),
           data(g_v),
           g_x.mutable_data_ptr(),
           target(need_decay, g_decay),
           target(need_gain, g_gain),
           target(need_v_init, g_v_init),
           n.detach,
           n.surrogate,
           n.a,
           n.b,
           nullptr,
           0};
#ifdef SPK_CUDA
  if (on_gpu(x)) {
    p.steps = lif_bwd_steps(dtype, slices.T);
    Tensor checkpoints = empty1d((slices.T - 1) / p.steps * slices.N, ScalarType::Float, x);
    p.checkpoints = checkpoints.mutable_data_ptr<float>();
    launch_cuda(lif_bwd_cuda, p, x, op, sizes_of(slices));
  } else
#endif
    launch_cpu(lif_bwd_cpu(), p, lif_chunks(slices.N), kGrain / (kLifChunk * slices.T), op, sizes_of(slices));
  return std::make_tuple(g_x, need_decay ? reduce(g_decay, *decay_c, slices, q) : g_decay,
                         need_gain ? reduce(g_gain, *gain_c, slices, q) : g_gain, g_v_init);
}

using torch::stable::detail::StableLibrary;
void implement(StableLibrary& m) {
  m.impl("lif_fwd", TORCH_BOX(&lif_fwd));
  m.impl("lif_bwd", TORCH_BOX(&lif_bwd));
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(SPK_LIBRARY, m) {
  m.def("lif_fwd(Tensor x, Tensor? decay_c, Tensor? gain_c, Tensor? v_init, float[] neuron, int channel_dim, bool return_h, "
        "bool return_v, bool packed) -> (Tensor s, Tensor v_last, Tensor h, Tensor v)");
  m.def("lif_bwd(Tensor? g_s, Tensor? g_v_last, Tensor? g_h, Tensor? g_v, Tensor x, Tensor? decay_c, Tensor? gain_c, "
        "Tensor? v_init, float[] neuron, int channel_dim, bool need_decay, bool need_gain, bool need_v_init) "
        "-> (Tensor g_x, Tensor g_decay, Tensor g_gain, Tensor g_v_init)");
}
// clang-format on
STABLE_TORCH_LIBRARY_IMPL(SPK_LIBRARY, CPU, m) { implement(m); }

#ifdef SPK_CUDA
void register_lif_cuda(StableLibrary& m) { implement(m); }
#endif

}  // namespace spk
