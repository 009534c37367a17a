// bn_lif for torch: schema, checks, allocation, launch. One host function for CPU and CUDA.
#include "bn_lif/bn_lif.h"

#include "torch/launch.h"
#include "torch/neuron.h"

namespace spk {
namespace {

constexpr int64_t kGrain = 32768;  // element-steps worth a thread

// The checks of _check in spikecore/ops/bn_lif.py, word for word.
DType check_x(const char* op, const Tensor& x, int64_t channel_dim) {
  const auto dtype = kernel_dtype(x.scalar_type());
  SPK_CHECK(dtype.has_value(), op, ": x must be float32, bfloat16, float16 or float64, got ", describe(x));
  SPK_CHECK(x.dim() >= 1 && x.size(0) >= 1, op, ": x must be [T, ...] with T >= 1, got ", describe(x));
  SPK_CHECK(!on_gpu(x) || *dtype != DType::f64, op, ": float64 runs on the CPU only, got ", describe(x));
  const int64_t d = channel_dim < 0 ? channel_dim + x.dim() : channel_dim;
  SPK_CHECK(d > 0 && d < x.dim(), op, ": channel_dim must name a dimension of x after the first (x has ", x.dim(), "), got ",
            channel_dim);
  return *dtype;
}

ScalarType state_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

void check_channels(const char* op, const char* arg, const OptTensor& p, const Tensor& x, ScalarType state, int64_t C,
                    bool scalar) {
  if (!p) return;
  const bool ok = (scalar && p->dim() == 0) || (p->dim() == 1 && p->size(0) == C);
  SPK_CHECK(ok && p->scalar_type() == state && same_device(*p, x), op, ": ", arg, " must be ", scalar ? "a scalar or " : "", "[", C,
            "], ", dtype_name(state), " on ", device_name(x), ", got ", describe(*p));
}

// Of the shape of x, without its first dimensions.
void check_like(const char* op, const char* arg, const OptTensor& t, const Tensor& x, int first, ScalarType dtype) {
  if (!t) return;
  const auto sizes = x.sizes().slice(first);
  bool ok = t->scalar_type() == dtype && same_device(*t, x) && size_t(t->dim()) == sizes.size();
  for (size_t i = 0; ok && i < sizes.size(); ++i) ok = t->size(i) == sizes[i];
  SPK_CHECK(ok, op, ": ", arg, " must be ", dtype_name(dtype), " ", shape_name(sizes), " on ", device_name(x), ", got ",
            describe(*t));
}

// What forward and backward take alike: checked, dense, laid out as x.
struct Call {
  const char* op;
  Tensor x;
  DType dtype;
  ScalarType state;
  int64_t C;
  OptTensor residual, weight, bias, mean, var, decay, gain, v_init;
  NeuronNumbers n;
  Slices slices;
  BnShape shape;

  Call(const char* op, const Tensor& x_, const OptTensor& residual_, const OptTensor& weight, const OptTensor& bias,
       const OptTensor& mean, const OptTensor& var, const OptTensor& decay, const OptTensor& gain, const OptTensor& v_init_,
       const std::vector<double>& numbers, int64_t channel_dim)
      : op(op),
        x(x_),
        dtype(check_x(op, x, channel_dim)),
        state(state_type(dtype)),
        C(x.size(dim(channel_dim))),
        residual(residual_),
        weight(weight),
        bias(bias),
        mean(mean),
        var(var),
        decay(decay),
        gain(gain),
        v_init(v_init_),
        n(neuron_numbers(op, "neuron", numbers)),
        slices((check(), Slices(x).dense ? x : x = torch::stable::contiguous(x))) {
    for (OptTensor* p : {&this->weight, &this->bias, &this->mean, &this->var, &this->decay, &this->gain}) make_dense(*p);
    if (v_init) v_init = slices.laid_out(*v_init, 0);
    if (residual && !Same(*residual)) residual = slices.laid_out(*residual, 1);
    // A dimension of size 1 may carry any stride.
    const int64_t inner = C > 1 ? slices.strides[dim(channel_dim) - 1] : slices.N;
    shape = {dtype, slices.T, slices.N, C, std::max<int64_t>(inner, 1)};
  }
  int64_t dim(int64_t d) const { return d < 0 ? d + x.dim() : d; }

  void check() const {
    check_channels(op, "decay", decay, x, state, C, true);
    check_channels(op, "gain", gain, x, state, C, true);
    check_like(op, "v_init", v_init, x, 1, state);
    check_like(op, "residual", residual, x, 0, x.scalar_type());
    check_channels(op, "weight", weight, x, state, C, false);
    check_channels(op, "bias", bias, x, state, C, false);
    check_channels(op, "running_mean", mean, x, state, C, false);
    check_channels(op, "running_var", var, x, state, C, false);
    SPK_CHECK(mean.has_value() == var.has_value(), op, ": running_mean and running_var must be given together");
  }
  // Slices as those of x; the steps from one to the next may differ.
  bool Same(const Tensor& t) const {
    bool same = true;
    for (size_t i = 0; i < slices.sizes.size(); ++i) same = same && (slices.sizes[i] == 1 || t.stride(i + 1) == slices.strides[i]);
    return same;
  }
  // [C] side by side; one number for all channels is written out, so that kernels know one form.
  void make_dense(OptTensor& p) const {
    if (!p || (p->dim() == 1 && (C <= 1 || p->stride(0) == 1))) return;
    Tensor out = channels();
    torch::stable::copy_(out, *p);
    p = out;
  }
  Tensor channels() const { return empty1d(C, state, x); }
  Tensor sequence() const { return slices.empty_sequence(slices.T, x.scalar_type(), x); }
  Tensor none(ScalarType type) const { return empty1d(0, type, x); }
  bool empty() const { return slices.N == 0; }

  LifNeuron neuron() const {
    return {n.decay, n.gain, data(decay), data(gain), shape.C, shape.inner, n.threshold, n.rest, n.reset_by, n.hard, n.strict};
  }
  static const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }
  BnNorm norm(double eps) const {
    const auto of = [](const OptTensor& t) { return t ? const_cast<void*>(t->const_data_ptr()) : nullptr; };
    return {of(mean), of(var), data(weight), data(bias), eps};
  }
  int64_t step(const Tensor& t) const { return slices.T > 1 ? t.stride(0) : 0; }
  std::string sizes() const {
    return "T=" + std::to_string(shape.T) + ", N=" + std::to_string(shape.N) + ", C=" + std::to_string(shape.C);
  }
  int64_t grain(int64_t units) const { return kGrain * units / std::max<int64_t>(shape.T * shape.N, 1); }
};

void* target(const Tensor& t) { return t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr; }

int64_t parts_of(const Call& call, const BnShape& shape) {
#ifdef SPK_CUDA
  if (on_gpu(call.x)) return bn_parts_cuda(shape);
#endif
  return bn_units(shape);
}

void take_stats(Call& call) {
  BnStats p{call.shape, call.step(call.x), call.x.const_data_ptr(), target(*call.mean), target(*call.var), nullptr, 0, false};
  if (p.x_step == 0) p.shape.T = 1;
  p.parts = parts_of(call, p.shape);
  Tensor sums = empty1d(2 * p.parts * bn_places(p.shape, on_gpu(call.x)), ScalarType::Double, call.x);
  p.sums = sums.mutable_data_ptr<double>();
#ifdef SPK_CUDA
  if (on_gpu(call.x)) return launch_cuda(bn_stats_cuda, p, call.x, call.op, call.sizes());
#endif
  for (int pass = 0; pass < (call.dtype == DType::f64 ? 2 : 1); ++pass) {
    p.again = pass > 0;
    launch_cpu(bn_stats_cpu(), p, p.parts, call.grain(p.parts), call.op, call.sizes());
    launch_cpu(bn_stats_finish_cpu(), p, p.shape.C, kGrain / p.parts, call.op, call.sizes());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_lif_fwd(Tensor x, OptTensor residual, OptTensor weight, OptTensor bias,
                                                      OptTensor running_mean, OptTensor running_var, OptTensor decay_c,
                                                      OptTensor gain_c, OptTensor v_init, std::vector<double> numbers,
                                                      int64_t channel_dim, double eps, bool return_sum) {
  Call call("bn_lif", x, residual, weight, bias, running_mean, running_var, decay_c, gain_c, v_init, numbers, channel_dim);
  const bool training = !running_mean;
  Tensor s = call.sequence(), y = return_sum ? call.sequence() : call.none(x.scalar_type());
  Tensor mean = training ? call.channels() : call.none(call.state), var = training ? call.channels() : call.none(call.state);
  auto out = std::make_tuple(s, y, mean, var);
  if (training) {
    call.mean = mean;
    call.var = var;
  }
  if (call.empty()) {
    if (training) {
      torch::stable::zero_(mean);
      torch::stable::zero_(var);
    }
    return out;
  }
  const bool maps_on_cpu = !on_gpu(call.x) && bn_maps(call.shape);
  if (training && !maps_on_cpu) take_stats(call);
  BnLifFwd p{call.shape,
             call.norm(eps),
             call.neuron(),
             call.step(call.x),
             call.residual ? call.step(*call.residual) : 0,
             call.x.const_data_ptr(),
             Call::data(call.residual),
             Call::data(call.v_init),
             target(s),
             target(y),
             training && maps_on_cpu,
             nullptr};
#ifdef SPK_CUDA
  if (on_gpu(call.x)) {
    Tensor constants = empty1d(5 * call.C, ScalarType::Float, x);
    p.constants = constants.mutable_data_ptr<float>();
    launch_cuda(bn_lif_fwd_cuda, p, call.x, call.op, call.sizes());
    return out;
  }
#endif
  const int64_t units = bn_units(p.shape);
  launch_cpu(bn_lif_fwd_cpu(), p, units, call.grain(units), call.op, call.sizes());
  return out;
}

// A parameter's gradient from that of each channel.
Tensor of_parameter(const Call& call, const Tensor& per_channel, const OptTensor& parameter, bool need) {
  if (!need || parameter->dim()) return per_channel;
  Tensor out = empty({}, {}, call.state, call.x);
  if (call.C == 0) return torch::stable::zero_(out);
  LifReduce p{call.dtype == DType::f64 ? DType::f64 : DType::f32,
              call.C,
              1,
              call.C,
              per_channel.const_data_ptr(),
              out.mutable_data_ptr(),
              nullptr};
#ifdef SPK_CUDA
  if (on_gpu(call.x)) {
    Tensor partial = empty1d(lif_reduce_parts(p.N, 1), ScalarType::Double, call.x);
    p.partial = partial.mutable_data_ptr<double>();
    launch_cuda(lif_reduce_cuda, p, call.x, call.op, call.sizes());
    return out;
  }
#endif
  launch_cpu(lif_reduce_cpu(), p, 1, 1, call.op, call.sizes());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_lif_bwd(
    OptTensor g_s, OptTensor g_y, Tensor x, OptTensor residual, OptTensor weight, OptTensor bias, Tensor mean, Tensor var,
    OptTensor decay_c, OptTensor gain_c, OptTensor v_init, std::vector<double> numbers, int64_t channel_dim, double eps,
    bool training, bool need_residual, bool need_decay, bool need_gain, bool need_v_init) {
  Call call("bn_lif backward", x, residual, weight, bias, mean, var, decay_c, gain_c, v_init, numbers, channel_dim);
  check_like(call.op, "g_s", g_s, x, 0, x.scalar_type());
  check_like(call.op, "g_y", g_y, x, 0, x.scalar_type());
  SPK_CHECK((decay_c || !need_decay) && (gain_c || !need_gain) && (residual || !need_residual), call.op,
            ": a gradient was asked for an argument that is no tensor");
  if (g_s) g_s = call.slices.laid_out(*g_s, 1);
  if (g_y) g_y = call.slices.laid_out(*g_y, 1);
  const auto channels = [&](bool need) { return need ? call.channels() : call.none(call.state); };
  Tensor g_x = call.sequence(), g_residual = need_residual ? call.sequence() : call.none(x.scalar_type());
  Tensor g_weight = call.channels(), g_bias = call.channels(), g_decay = channels(need_decay), g_gain = channels(need_gain);
  Tensor g_v_init = need_v_init ? call.slices.empty_slice(call.state, x) : call.none(call.state);
  if (call.empty()) {
    for (Tensor* t : {&g_weight, &g_bias, &g_decay, &g_gain}) torch::stable::zero_(*t);
  } else {
    BnLifBwd p{call.shape,
               call.norm(eps),
               call.neuron(),
               call.step(call.x),
               call.residual ? call.step(*call.residual) : 0,
               call.x.const_data_ptr(),
               Call::data(call.residual),
               Call::data(call.v_init),
               Call::data(g_s),
               Call::data(g_y),
               need_residual ? target(g_residual)
               : training    ? target(g_x)
                             : nullptr,
               target(g_x),
               target(g_v_init),
               target(g_weight),
               target(g_bias),
               target(g_decay),
               target(g_gain),
               training,
               call.n.detach,
               call.n.surrogate,
               call.n.a,
               call.n.b,
               nullptr,
               0,
               nullptr,
               0,
               nullptr};
    const bool maps_on_cpu = !on_gpu(call.x) && bn_maps(call.shape);
    BnShape rows = call.shape;
    if (on_gpu(call.x)) rows.T = 1;  // a thread walks all time steps
    p.parts = parts_of(call, rows);
    const int64_t places = bn_places(p.shape, on_gpu(call.x));
    Tensor sums = empty1d(maps_on_cpu ? 0 : kBnSums * p.parts * places, ScalarType::Double, x);
    p.sums = static_cast<double*>(target(sums));
#ifdef SPK_CUDA
    if (on_gpu(call.x)) {
      p.steps = bn_lif_bwd_steps(p.shape.T);
      Tensor checkpoints = empty1d((p.shape.T - 1) / p.steps * p.shape.N, ScalarType::Float, x);
      p.checkpoints = checkpoints.mutable_data_ptr<float>();
      Tensor constants = empty1d(7 * call.C, ScalarType::Float, x);
      p.constants = constants.mutable_data_ptr<float>();
      launch_cuda(bn_lif_bwd_cuda, p, call.x, call.op, call.sizes());
    } else
#endif
    {
      const int64_t units = bn_units(p.shape), grain = call.grain(units);
      launch_cpu(bn_lif_bwd_cpu(), p, units, grain, call.op, call.sizes());
      if (!maps_on_cpu) {
        launch_cpu(bn_lif_bwd_finish_cpu(), p, call.C, kGrain / p.parts, call.op, call.sizes());
        if (training) launch_cpu(bn_lif_bwd_x_cpu(), p, units, grain, call.op, call.sizes());
      }
    }
  }
  return std::make_tuple(g_x, g_residual, g_weight, g_bias, of_parameter(call, g_decay, decay_c, need_decay),
                         of_parameter(call, g_gain, gain_c, need_gain), g_v_init);
}

using torch::stable::detail::StableLibrary;
void implement(StableLibrary& m) {
  m.impl("bn_lif_fwd", TORCH_BOX(&bn_lif_fwd));
  m.impl("bn_lif_bwd", TORCH_BOX(&bn_lif_bwd));
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(SPK_LIBRARY, m) {
  m.def("bn_lif_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
        "Tensor? decay_c, Tensor? gain_c, Tensor? v_init, float[] neuron, int channel_dim, float eps, bool return_sum) "
        "-> (Tensor s, Tensor y, Tensor mean, Tensor var)");
  m.def("bn_lif_bwd(Tensor? g_s, Tensor? g_y, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
        "Tensor var, Tensor? decay_c, Tensor? gain_c, Tensor? v_init, float[] neuron, int channel_dim, float eps, bool training, "
        "bool need_residual, bool need_decay, bool need_gain, bool need_v_init) -> (Tensor g_x, Tensor g_residual, "
        "Tensor g_weight, Tensor g_bias, Tensor g_decay, Tensor g_gain, Tensor g_v_init)");
}
// clang-format on
STABLE_TORCH_LIBRARY_IMPL(SPK_LIBRARY, CPU, m) { implement(m); }

#ifdef SPK_CUDA
void register_bn_lif_cuda(StableLibrary& m) { implement(m); }
#endif

}  // namespace spk
