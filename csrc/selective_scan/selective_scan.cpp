// selective_scan for torch: schema, checks, allocation, launch. One host function for CPU and CUDA.
#include "selective_scan/selective_scan.h"

#include "torch/launch.h"

namespace spk {
namespace {

constexpr int64_t kGrain = 16384;  // state updates worth a thread

// The checks of _check in spikecore/ops/selective_scan.py, word for word.
void check_tensor(const char* op, const char* arg, const OptTensor& t, const Tensor& u, ScalarType dtype,
                  const std::vector<int64_t>& sizes) {
  if (!t) return;
  bool ok = t->scalar_type() == dtype && same_device(*t, u) && size_t(t->dim()) == sizes.size();
  for (size_t i = 0; ok && i < sizes.size(); ++i) ok = t->size(i) == sizes[i];
  SPK_CHECK(ok, op, ": ", arg, " must be ", dtype_name(dtype), " ", shape_name(sizes), " on ", device_name(u), ", got ",
            describe(*t));
}

void check_matrix(const char* op, const char* arg, const Tensor& t) {
  SPK_CHECK(t.dim() == 4, op, ": ", arg, " must be [B, S, L] or [B, G, S, L] (constant in L, [C, S], is not supported), got ",
            describe(t));
}

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

Tensor dense(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  return empty(sizes, strides, dtype, like);
}
OptTensor dense_like(const OptTensor& t) { return t ? OptTensor(dense(sizes_of(*t), t->scalar_type(), *t)) : OptTensor(); }

const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }
void* target(OptTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }

void make_contiguous(OptTensor& t) {
  if (t) t = torch::stable::contiguous(*t);
}

// Rows of a sequence, [..., L], as they lie where each is dense, else in a copy that `t` then holds.
void make_dense(Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) t = torch::stable::contiguous(t);
}
ScanRows rows(OptTensor& t) {
  if (!t) return {nullptr, 0, 0};
  make_dense(*t);
  return {t->const_data_ptr(), t->stride(0), t->stride(1)};
}
ScanMatrix matrix(Tensor& t) {
  make_dense(t);
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// The arguments of both directions, checked; it holds the copies that kernels read.
struct Inputs {
  ScalarType dtype, state;
  OptTensor u, delta, A, D, z, bias, h_init;
  Tensor Bs, Cs;
  SelectiveScan p{};

  Inputs(const char* op, const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& Bs_, const Tensor& Cs_,
         const OptTensor& D_, const OptTensor& z_, const OptTensor& bias_, const OptTensor& h_init_, bool softplus)
      : dtype(u_.scalar_type()),
        state(dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        u(u_),
        delta(delta_),
        A(A_),
        D(D_),
        z(z_),
        bias(bias_),
        h_init(h_init_),
        Bs(Bs_),
        Cs(Cs_) {
    const auto kernel = kernel_dtype(dtype);
    SPK_CHECK(kernel.has_value(), op, ": u must be float32, bfloat16, float16 or float64, got ", describe(u_));
    SPK_CHECK(u_.dim() == 3, op, ": u must be [B, C, L], got ", describe(u_));
    SPK_CHECK(!on_gpu(u_) || *kernel != DType::f64, op, ": float64 runs on the CPU only, got ", describe(u_));
    const int64_t B = u_.size(0), C = u_.size(1), L = u_.size(2);
    check_tensor(op, "delta", delta, u_, dtype, {B, C, L});
    SPK_CHECK(A_.dim() == 2 && A_.size(0) == C && A_.scalar_type() == state && same_device(A_, u_), op, ": A must be [", C,
              ", S], ", dtype_name(state), " on ", device_name(u_), " (complex A is not supported), got ", describe(A_));
    const int64_t S = A_.size(1);
    check_matrix(op, "B", Bs);
    const int64_t G = Bs.size(1);
    SPK_CHECK(G >= 1 && C % G == 0, op, ": B must have a number of groups that divides the ", C, " channels, got ", describe(Bs));
    check_tensor(op, "B", Bs, u_, dtype, {B, G, S, L});
    check_matrix(op, "C", Cs);
    check_tensor(op, "C", Cs, u_, dtype, {B, G, S, L});
    check_tensor(op, "D", D, u_, state, {C});
    check_tensor(op, "z", z, u_, dtype, {B, C, L});
    check_tensor(op, "delta_bias", bias, u_, state, {C});
    check_tensor(op, "h_init", h_init, u_, state, {B, C, S});
    for (OptTensor* t : {&A, &D, &bias, &h_init}) make_contiguous(*t);
    p = {*kernel,     B,       C,          L,          G,       S,       softplus,   rows(u),
         rows(delta), rows(z), matrix(Bs), matrix(Cs), data(A), data(D), data(bias), data(h_init)};
  }

  std::string sizes() const {
    return "B=" + std::to_string(p.B) + ", C=" + std::to_string(p.C) + ", L=" + std::to_string(p.L) + ", S=" + std::to_string(p.S);
  }
  // Least count of items worth a thread, where `items` share the whole.
  int64_t grain(int64_t items) const { return kGrain * items / std::max<int64_t>(p.B * p.C * p.L * std::max<int64_t>(p.S, 1), 1); }
};

std::tuple<Tensor, Tensor> selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor Bs, Tensor Cs, OptTensor D, OptTensor z,
                                              OptTensor delta_bias, OptTensor h_init, bool delta_softplus) {
  const char* op = "selective_scan";
  const Inputs in(op, u, delta, A, Bs, Cs, D, z, delta_bias, h_init, delta_softplus);
  const SelectiveScan& q = in.p;
  Tensor y = dense({q.B, q.C, q.L}, in.dtype, u), h_last = dense({q.B, q.C, q.S}, in.state, u);
  if (q.B == 0 || q.C == 0) return std::make_tuple(y, h_last);

  const SelectiveScanFwd p{q, y.mutable_data_ptr(), h_last.mutable_data_ptr()};
#ifdef SPK_CUDA
  if (on_gpu(u)) {
    launch_cuda(selective_scan_fwd_cuda, p, u, op, in.sizes());
    return std::make_tuple(y, h_last);
  }
#endif
  const int64_t items = q.B * q.G * scan_blocks(q);
  launch_cpu(selective_scan_fwd_cpu(), p, items, in.grain(items), op, in.sizes());
  return std::make_tuple(y, h_last);
}

void reduce(const char* op, const Tensor& in, Tensor& out, int64_t outer, int64_t parts, const std::string& sizes) {
  if (out.numel() == 0) return;
  const SelectiveScanReduce p{
      *kernel_dtype(in.scalar_type()), *kernel_dtype(out.scalar_type()), outer, parts, out.numel() / outer, in.const_data_ptr(),
      out.mutable_data_ptr()};
#ifdef SPK_CUDA
  if (on_gpu(in)) return launch_cuda(selective_scan_reduce_cuda, p, in, op, sizes);
#endif
  launch_cpu(selective_scan_reduce_cpu(), p, out.numel(), kGrain / std::max<int64_t>(parts, 1), op, sizes);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_bwd(OptTensor g_y, OptTensor g_h_last, Tensor u, Tensor delta, Tensor A, Tensor Bs, Tensor Cs, OptTensor D,
                             OptTensor z, OptTensor delta_bias, OptTensor h_init, bool delta_softplus) {
  const char* op = "selective_scan backward";
  const Inputs in(op, u, delta, A, Bs, Cs, D, z, delta_bias, h_init, delta_softplus);
  const SelectiveScan& q = in.p;
  check_tensor(op, "g_y", g_y, u, in.dtype, {q.B, q.C, q.L});
  check_tensor(op, "g_h_last", g_h_last, u, in.state, {q.B, q.C, q.S});
  make_contiguous(g_h_last);
  Tensor g_u = dense(sizes_of(u), in.dtype, u), g_delta = dense(sizes_of(u), in.dtype, u);
  Tensor g_A = dense(sizes_of(A), in.state, u);
  Tensor g_Bs = dense(sizes_of(Bs), in.dtype, u), g_Cs = dense(sizes_of(Cs), in.dtype, u);
  OptTensor g_D = dense_like(D), g_z = dense_like(z), g_bias = dense_like(delta_bias), g_h_init = dense_like(h_init);
  const auto results = [&] {
    const auto or_none = [&](const OptTensor& t) { return t ? *t : empty1d(0, in.dtype, u); };
    return std::make_tuple(g_u, g_delta, g_A, g_Bs, g_Cs, or_none(g_D), or_none(g_z), or_none(g_bias), or_none(g_h_init));
  };
  if (q.B == 0 || q.C == 0) {
    for (Tensor* t : {&g_A, &g_Bs, &g_Cs}) torch::stable::zero_(*t);
    for (OptTensor* t : {&g_D, &g_bias})
      if (*t) torch::stable::zero_(**t);
    return results();
  }

  // What several items add to is first written by each of them, then summed in a fixed order.
  const bool gpu = on_gpu(u);
  const int64_t parts = gpu ? scan_parts_gpu(q) : scan_parts_cpu(q);
  const auto partial = [&](const std::vector<int64_t>& sizes, ScalarType dtype) { return dense(sizes, dtype, u); };
  Tensor p_A = partial({q.B, q.C, q.S}, ScalarType::Double), p_D = partial({q.B, D ? q.C : 0}, ScalarType::Double);
  Tensor p_bias = partial({q.B, delta_bias ? q.C : 0}, ScalarType::Double);
  Tensor p_Bs = partial({q.B, q.G, parts, q.S, q.L}, in.state), p_Cs = partial({q.B, q.G, parts, q.S, q.L}, in.state);
  SelectiveScanBwd p{q,
                     rows(g_y),
                     data(g_h_last),
                     g_u.mutable_data_ptr(),
                     g_delta.mutable_data_ptr(),
                     target(g_z),
                     target(g_h_init),
                     p_A.mutable_data_ptr<double>(),
                     D ? p_D.mutable_data_ptr<double>() : nullptr,
                     delta_bias ? p_bias.mutable_data_ptr<double>() : nullptr,
                     p_Bs.mutable_data_ptr(),
                     p_Cs.mutable_data_ptr(),
                     parts,
                     nullptr};
#ifdef SPK_CUDA
  if (gpu) {
    Tensor starts = empty1d(selective_scan_starts(p), ScalarType::Float, u);
    p.starts = starts.mutable_data_ptr<float>();
    launch_cuda(selective_scan_bwd_cuda, p, u, op, in.sizes());
  } else
#endif
  {
    const int64_t items = q.B * q.G * parts;
    launch_cpu(selective_scan_bwd_cpu(), p, items, in.grain(items), op, in.sizes());
  }
  reduce(op, p_A, g_A, 1, q.B, in.sizes());
  if (g_D) reduce(op, p_D, *g_D, 1, q.B, in.sizes());
  if (g_bias) reduce(op, p_bias, *g_bias, 1, q.B, in.sizes());
  reduce(op, p_Bs, g_Bs, q.B * q.G, parts, in.sizes());
  reduce(op, p_Cs, g_Cs, q.B * q.G, parts, in.sizes());
  return results();
}

using torch::stable::detail::StableLibrary;
void implement(StableLibrary& m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&selective_scan_bwd));
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(SPK_LIBRARY, m) {
  m.def("selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
        "Tensor? h_init, bool delta_softplus) -> (Tensor y, Tensor h_last)");
  m.def("selective_scan_bwd(Tensor? g_y, Tensor? g_h_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? z, Tensor? delta_bias, Tensor? h_init, bool delta_softplus) -> (Tensor g_u, Tensor g_delta, Tensor g_A, "
        "Tensor g_B, Tensor g_C, Tensor g_D, Tensor g_z, Tensor g_delta_bias, Tensor g_h_init)");
}
// clang-format on
STABLE_TORCH_LIBRARY_IMPL(SPK_LIBRARY, CPU, m) { implement(m); }

#ifdef SPK_CUDA
void register_selective_scan_cuda(StableLibrary& m) { implement(m); }
#endif

}  // namespace spk
