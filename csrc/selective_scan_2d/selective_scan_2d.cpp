// selective_scan_2d for torch: schema, checks, allocation, launch. One host function for CPU and CUDA.
#include "selective_scan_2d/selective_scan_2d.h"

#include "torch/launch.h"

namespace spk {
namespace {

constexpr int64_t kGrain = 4096;  // steps of a state worth a thread

ScalarType state_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

void check_tensor(const char* op, const char* arg, const OptTensor& t, const Tensor& x, ScalarType dtype,
                  const std::vector<int64_t>& sizes) {
  if (!t) return;
  bool ok = t->scalar_type() == dtype && same_device(*t, x) && size_t(t->dim()) == sizes.size();
  for (size_t i = 0; ok && i < sizes.size(); ++i) ok = t->size(i) == sizes[i];
  SPK_CHECK(ok, op, ": ", arg, " must be ", dtype_name(dtype), " ", shape_name(sizes), " on ", device_name(x), ", got ",
            describe(*t));
}

const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// The checks of _check in spikecore/ops/selective_scan_2d.py, word for word; then all tensors contiguous, and the shared
// part of the parameters.
SelectiveScan2d prepare(const char* op, Tensor& x, Tensor& delta, Tensor& A, Tensor& B, Tensor& C, OptTensor& D, OptTensor& bias,
                        bool softplus, const std::vector<int64_t>& directions) {
  const auto dtype = kernel_dtype(x.scalar_type());
  SPK_CHECK(dtype.has_value(), op, ": x must be float32, bfloat16, float16 or float64, got ", describe(x));
  SPK_CHECK(x.dim() == 4, op, ": x must be [B, C, H, W], got ", describe(x));
  SPK_CHECK(!on_gpu(x) || *dtype != DType::f64, op, ": float64 runs on the CPU only, got ", describe(x));
  const int64_t b = x.size(0), c = x.size(1), H = x.size(2), W = x.size(3), K = int64_t(directions.size());
  SPK_CHECK(H * W < int64_t(1) << 31, op, ": x must have less than 2^31 places on its map, got ", describe(x));
  bool known = K >= 1 && K <= kMaxDirections;
  for (int64_t d : directions) known = known && d >= 0 && d <= 5;
  SPK_CHECK(known, op, ": directions must be 1 to ", kMaxDirections, " numbers from 0 to 5, got ", shape_name(directions));
  SPK_CHECK(A.dim() == 3 && A.size(2) >= 1 && A.size(2) <= kMaxStates, op, ": A must be [K, C, S] with S from 1 to ", kMaxStates,
            ", got ", describe(A));
  const int64_t S = A.size(2);
  const ScalarType state = state_type(*dtype);
  check_tensor(op, "A", A, x, state, {K, c, S});
  check_tensor(op, "delta", delta, x, x.scalar_type(), {b, K, c, H, W});
  check_tensor(op, "B", B, x, x.scalar_type(), {b, K, S, H, W});
  check_tensor(op, "C", C, x, x.scalar_type(), {b, K, S, H, W});
  check_tensor(op, "D", D, x, state, {K, c});
  check_tensor(op, "delta_bias", bias, x, state, {K, c});
  for (Tensor* t : {&x, &delta, &A, &B, &C}) *t = torch::stable::contiguous(*t);
  for (OptTensor* t : {&D, &bias})
    if (*t) *t = torch::stable::contiguous(**t);
  SelectiveScan2d p{*dtype,
                    b,
                    c,
                    H,
                    W,
                    int32_t(K),
                    int32_t(S),
                    {},
                    softplus,
                    x.const_data_ptr(),
                    delta.const_data_ptr(),
                    A.const_data_ptr(),
                    B.const_data_ptr(),
                    C.const_data_ptr(),
                    data(D),
                    data(bias)};
  for (int64_t k = 0; k < K; ++k) p.directions[k] = int32_t(directions[k]);
  return p;
}

std::string sizes_of(const SelectiveScan2d& p) {
  return "B=" + std::to_string(p.B) + ", K=" + std::to_string(p.K) + ", C=" + std::to_string(p.C) + ", H=" + std::to_string(p.H) +
         ", W=" + std::to_string(p.W) + ", S=" + std::to_string(p.S);
}

Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  return empty(sizes, strides, dtype, like);
}

int64_t groups(int64_t C, int64_t channels) { return (C + channels - 1) / channels; }

Tensor selective_scan_2d_fwd(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, OptTensor D, OptTensor delta_bias,
                             bool delta_softplus, std::vector<int64_t> directions) {
  const char* op = "selective_scan_2d";
  const SelectiveScan2d scan = prepare(op, x, delta, A, B, C, D, delta_bias, delta_softplus, directions);
  Tensor y = empty_contiguous({scan.B, scan.C, scan.H, scan.W}, x.scalar_type(), x);
  const int64_t L = scan.H * scan.W;
  if (scan.B * scan.C * L == 0) return y;
  SelectiveScan2dFwd p{scan, y.mutable_data_ptr(), nullptr};
#ifdef SPK_CUDA
  if (on_gpu(x)) {
    Tensor sum = scan.dtype == DType::f32 ? y : empty1d(scan.B * scan.C * L, ScalarType::Float, x);
    p.sum = sum.mutable_data_ptr<float>();
    launch_cuda(selective_scan_2d_fwd_cuda, p, x, op, sizes_of(scan));
    return y;
  }
#endif
  launch_cpu(selective_scan_2d_fwd_cpu(), p, scan.B * groups(scan.C, 16), kGrain / (L * scan.K * scan.S), op, sizes_of(scan));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_2d_bwd(Tensor g_y, Tensor x, Tensor delta,
                                                                                         Tensor A, Tensor B, Tensor C, OptTensor D,
                                                                                         OptTensor delta_bias, bool delta_softplus,
                                                                                         std::vector<int64_t> directions) {
  const char* op = "selective_scan_2d backward";
  const SelectiveScan2d scan = prepare(op, x, delta, A, B, C, D, delta_bias, delta_softplus, directions);
  const int64_t b = scan.B, K = scan.K, c = scan.C, S = scan.S, L = scan.H * scan.W;
  check_tensor(op, "g_y", g_y, x, x.scalar_type(), {b, c, scan.H, scan.W});
  g_y = torch::stable::contiguous(g_y);
  const ScalarType type = x.scalar_type(), state = state_type(scan.dtype);
  const int64_t G = groups(c, on_gpu(x) ? kGpuGroup : kCpuGroup);
  Tensor g_x = empty_contiguous({b, c, scan.H, scan.W}, type, x), g_delta = empty_contiguous({b, K, c, scan.H, scan.W}, type, x);
  Tensor g_A = empty_contiguous({b, K, c, S}, state, x);
  Tensor g_B = empty_contiguous({b, G, K, S, scan.H, scan.W}, state, x),
         g_C = empty_contiguous({b, G, K, S, scan.H, scan.W}, state, x);
  const auto per_channel = [&](bool given) { return given ? empty_contiguous({b, K, c}, state, x) : empty1d(0, state, x); };
  Tensor g_D = per_channel(D.has_value()), g_bias = per_channel(delta_bias.has_value());
  const auto out = std::make_tuple(g_x, g_delta, g_A, g_B, g_C, g_D, g_bias);
  if (b * c * L == 0) {
    for (Tensor* t : {&g_A, &g_D, &g_bias}) torch::stable::zero_(*t);
    return out;
  }
  SelectiveScan2dBwd p{scan,
                       g_y.const_data_ptr(),
                       g_x.mutable_data_ptr(),
                       g_delta.mutable_data_ptr(),
                       g_A.mutable_data_ptr(),
                       g_B.mutable_data_ptr(),
                       g_C.mutable_data_ptr(),
                       D ? g_D.mutable_data_ptr() : nullptr,
                       delta_bias ? g_bias.mutable_data_ptr() : nullptr,
                       nullptr,
                       nullptr};
#ifdef SPK_CUDA
  if (on_gpu(x)) {
    Tensor sum = scan.dtype == DType::f32 ? g_x : empty1d(b * c * L, ScalarType::Float, x);
    Tensor starts = empty1d(b * c * selective_scan_2d_chunks(L) * S, ScalarType::Float, x);
    p.sum = sum.mutable_data_ptr<float>();
    p.starts = starts.mutable_data_ptr<float>();
    launch_cuda(selective_scan_2d_bwd_cuda, p, x, op, sizes_of(scan));
    return out;
  }
#endif
  launch_cpu(selective_scan_2d_bwd_cpu(), p, b * G, kGrain / (L * K * S), op, sizes_of(scan));
  return out;
}

using torch::stable::detail::StableLibrary;
void implement(StableLibrary& m) {
  m.impl("selective_scan_2d_fwd", TORCH_BOX(&selective_scan_2d_fwd));
  m.impl("selective_scan_2d_bwd", TORCH_BOX(&selective_scan_2d_bwd));
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(SPK_LIBRARY, m) {
  m.def("selective_scan_2d_fwd(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
        "bool delta_softplus, int[] directions) -> Tensor y");
  m.def("selective_scan_2d_bwd(Tensor g_y, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? delta_bias, bool delta_softplus, int[] directions) -> (Tensor g_x, Tensor g_delta, Tensor g_A, "
        "Tensor g_B, Tensor g_C, Tensor g_D, Tensor g_delta_bias)");
}
// clang-format on
STABLE_TORCH_LIBRARY_IMPL(SPK_LIBRARY, CPU, m) { implement(m); }

#ifdef SPK_CUDA
void register_selective_scan_2d_cuda(StableLibrary& m) { implement(m); }
#endif

}  // namespace spk
