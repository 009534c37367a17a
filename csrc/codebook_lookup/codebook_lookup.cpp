// codebook_lookup for torch: schema, checks, allocation, launch. One host function for CPU and CUDA.
#include "codebook_lookup/codebook_lookup.h"

#include "torch/launch.h"

namespace spk {
namespace {

constexpr int64_t kPackedBytes = 3 << 19;  // packed codes of a tile
constexpr int64_t kRowsAtOnce = 340 * kCodebookRows;
constexpr int64_t kGrain = 1 << 18;  // products worth a thread
constexpr int64_t kTrialCodes = 4 * kCodebookPanel, kTrialExact = 8;

// The checks of _check in spikecore/ops/codebook_lookup.py, word for word.
void check(const char* op, const Tensor& z, const Tensor& codebook, int64_t metric, int64_t groups) {
  const auto dtype = kernel_dtype(z.scalar_type());
  SPK_CHECK(dtype.has_value(), op, ": z must be float32, bfloat16, float16 or float64, got ", describe(z));
  SPK_CHECK(!on_gpu(z) || *dtype != DType::f64, op, ": float64 runs on the CPU only, got ", describe(z));
  SPK_CHECK(metric >= 0 && metric < kMetrics, op, ": metric must be 0 to ", kMetrics - 1, ", got ", metric);
  SPK_CHECK(groups >= 1, op, ": groups must be at least 1, got ", groups);
  SPK_CHECK(z.dim() >= 1 && z.size(z.dim() - 1) % groups == 0, op, ": z must be [..., groups * D] with groups = ", groups, ", got ",
            describe(z));
  const int64_t D = z.size(z.dim() - 1) / groups, d = codebook.dim();
  const bool half = *dtype == DType::bf16 || *dtype == DType::f16;
  const bool typed = codebook.scalar_type() == z.scalar_type() || (half && codebook.scalar_type() == ScalarType::Float);
  const bool shaped = (d == 2 || (d == 3 && codebook.size(0) == groups)) && codebook.size(d - 1) == D;
  const std::string types = dtype_name(z.scalar_type()) + (half ? " or float32" : "");
  SPK_CHECK(typed && shaped && same_device(codebook, z), op, ": codebook must be ", types, " [K, ", D, "] or [", groups, ", K, ", D,
            "] on ", device_name(z), ", got ", describe(codebook));
  const int64_t K = codebook.size(d - 2);
  SPK_CHECK(K >= 1 && K < int64_t(1) << 31, op, ": codebook must hold 1 to 2^31 - 1 codes, got ", K);
}

// z: [..., groups * D] as rows of one length, `step` elements apart, without a copy where its strides allow.
Tensor as_rows(Tensor z, int64_t& step) {
  const int64_t last = z.dim() - 1;
  step = z.size(last);
  bool regular = z.size(last) == 1 || z.stride(last) == 1;
  int64_t expected = -1;
  for (int64_t i = last; regular && i-- > 0;) {
    if (z.size(i) == 1) continue;
    if (expected < 0) expected = step = z.stride(i);
    regular = z.stride(i) == expected;
    expected *= z.size(i);
  }
  if (regular) return z;
  step = z.size(last);
  return torch::stable::contiguous(z);
}

int64_t rows_of(const Tensor& z) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < z.dim(); ++i) n *= z.size(i);
  return n;
}

Tensor empty_like_sizes(std::vector<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  return empty(sizes, strides, dtype, like);
}

std::string sizes_of(int64_t n, int64_t K, int64_t D) {
  return "n=" + std::to_string(n) + ", K=" + std::to_string(K) + ", D=" + std::to_string(D);
}

void* moved(const void* base, int64_t elements, DType dtype) {
  const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  return const_cast<char*>(static_cast<const char*>(base) + elements * size);
}

struct Bad {
  bool z, codebook;
};

// Rows in chunks, and for each the codes in tiles, so that working space stays small.
Bad lookup_cpu(const CodebookFwd& f, const Tensor& like, const char* op, const std::string& sizes) {
  if (f.dtype == DType::f64) {
    const CodebookScan p{f, false, 0, f.K, nullptr, nullptr, nullptr};
    launch_cpu(codebook_settle_cpu(), p, f.n, kGrain / (f.K * std::max<int64_t>(f.D, 1)), op, sizes);
    bool bad = false;
    const double* codes = static_cast<const double*>(f.codes);
    for (int64_t i = 0; i < f.K * f.D; ++i) bad = bad || !(codes[i] - codes[i] == 0);
    bool none = false;
    for (int64_t i = 0; i < f.n; ++i) none = none || f.indices[i * f.i_step] < 0;
    return {none && !bad, bad};
  }
  const int64_t width = (f.D + 1) / 2 * 2 * 4, fit = kPackedBytes / std::max<int64_t>(width, 1) / kCodebookPanel * kCodebookPanel;
  const int64_t codes = (f.K + kCodebookPanel - 1) / kCodebookPanel * kCodebookPanel;
  const int64_t tile = std::min(codes, std::max<int64_t>(fit, kCodebookPanel));  // of floats; twice as many bfloat16
  Tensor packed = empty1d(tile * width, ScalarType::Byte, like);
  std::vector<CodebookPanel> panels(size_t(2 * tile / kCodebookPanel));
  std::vector<CodebookRow> rows(size_t(std::min(f.n, kRowsAtOnce)));
  CodebookScan p{f, codebook_has_bf16_cpu(), 0, 0, packed.mutable_data_ptr(), panels.data(), rows.data()};
  Bad bad{false, false};
  for (int64_t row = 0; row < f.n; row += kRowsAtOnce) {
    p.f.n = std::min(f.n - row, kRowsAtOnce);
    p.f.z = moved(f.z, row * f.z_step, f.dtype);
    p.f.values = moved(f.values, row * f.v_step, f.dtype);
    p.f.indices = f.indices + row * f.i_step;
    const int64_t tiles = (p.f.n + kCodebookRows - 1) / kCodebookRows;
    for (p.first = 0; p.first < f.K; p.first += p.count) {
      const bool trial = p.bf16 && row == 0 && p.first == 0;
      p.count = std::min({f.K - p.first, p.bf16 ? 2 * tile : tile, trial ? kTrialCodes : f.K});
      const int64_t count = (p.count + kCodebookPanel - 1) / kCodebookPanel;
      launch_cpu(codebook_pack_cpu(), p, count, kGrain / (8 * kCodebookPanel * std::max<int64_t>(f.D, 1)), op, sizes);
      launch_cpu(codebook_screen_cpu(), p, tiles, kGrain / (kCodebookRows * p.count * std::max<int64_t>(f.D, 1)), op, sizes);
      for (int64_t i = 0; i < count; ++i) bad.codebook = bad.codebook || panels[size_t(i)].bad;
      if (trial) {  // rounding to bfloat16 leaves too much in the race where codes lie close for their length
        int64_t exact = 0;
        for (int64_t i = 0; i < p.f.n; ++i) exact += rows[size_t(i)].exact;
        p.bf16 = exact <= kTrialExact * p.f.n;
      }
    }
    launch_cpu(codebook_settle_cpu(), p, p.f.n, kGrain / (8 * std::max<int64_t>(f.D, 1)), op, sizes);
    for (int64_t i = 0; i < p.f.n; ++i) bad.z = bad.z || rows[size_t(i)].lower == INFINITY;
  }
  return bad;
}

#ifdef SPK_CUDA
bool any(const Tensor& flag) {
  int32_t value = 0;
  check_abi(aoti_torch_item_int32(flag.get(), &value), "item");
  return value != 0;
}

Bad lookup_cuda(CodebookFwd f, const Tensor& like, bool wait, const char* op, const std::string& sizes) {
  f.splits = codebook_splits(f.n, f.K);
  Tensor norms = empty1d(f.n + f.K, ScalarType::Float, like);
  Tensor found = empty1d(f.splits * f.n * 4, ScalarType::Float, like);
  Tensor bad_z = empty({}, {}, ScalarType::Int, like), bad_c = empty({}, {}, ScalarType::Int, like);
  torch::stable::zero_(bad_z);
  torch::stable::zero_(bad_c);
  f.z_norm = norms.mutable_data_ptr<float>();
  f.c_norm = f.z_norm + f.n;
  f.found = static_cast<CodebookFound*>(found.mutable_data_ptr());
  f.bad_z = bad_z.mutable_data_ptr<int32_t>();
  f.bad_c = bad_c.mutable_data_ptr<int32_t>();
  launch_cuda(codebook_lookup_fwd_cuda, f, like, op, sizes);
  return wait ? Bad{any(bad_z), any(bad_c)} : Bad{false, false};
}
#endif

std::tuple<Tensor, Tensor> codebook_lookup_fwd(Tensor z, Tensor codebook, int64_t metric, int64_t groups, bool check_nan) {
  const char* op = "codebook_lookup";
  check(op, z, codebook, metric, groups);
  const int64_t n = rows_of(z), D = z.size(z.dim() - 1) / groups, K = codebook.size(codebook.dim() - 2);
  const auto size = z.sizes();
  std::vector<int64_t> sizes(size.begin(), size.end());
  Tensor values = empty_like_sizes(sizes, z.scalar_type(), z);
  sizes.pop_back();
  if (groups > 1) sizes.push_back(groups);
  Tensor indices = empty_like_sizes(sizes, ScalarType::Long, z);
  auto out = std::make_tuple(indices, values);
  if (n == 0) return out;
  if (D == 0) {  // all scores are 0
    torch::stable::zero_(indices);
    return out;
  }

  int64_t step = 0;
  z = as_rows(z, step);
  codebook = torch::stable::contiguous(codebook);
  CodebookFwd p{};
  p.dtype = *kernel_dtype(z.scalar_type());
  p.c_dtype = *kernel_dtype(codebook.scalar_type());
  p.metric = static_cast<Metric>(metric);
  p.n = n, p.K = K, p.D = D;
  p.z_step = step, p.v_step = groups * D, p.i_step = groups;
  p.z = z.const_data_ptr(), p.codes = codebook.const_data_ptr();
  p.indices = indices.mutable_data_ptr<int64_t>(), p.values = values.mutable_data_ptr();
  const bool shared = codebook.dim() == 2;
  int64_t launches = groups;
  if (shared && (groups == 1 || step == groups * D)) {  // one book for rows of all groups alike
    p.n = n * groups;
    if (groups > 1) p.z_step = D;
    p.v_step = D, p.i_step = 1;
    launches = 1;
  }
  const std::string text = sizes_of(n, K, D);
  for (int64_t g = 0; g < launches; ++g) {
    Bad bad{};
#ifdef SPK_CUDA
    if (on_gpu(z))
      bad = lookup_cuda(p, z, check_nan, op, text);
    else
#endif
      bad = lookup_cpu(p, z, op, text);
    SPK_CHECK(!check_nan || !bad.z, op, ": z must be finite, got NaN or infinity (check_nan=False gives such rows index -1)");
    SPK_CHECK(!check_nan || !bad.codebook, op,
              ": codebook must be finite, got NaN or infinity (check_nan=False never chooses such codes)");
    p.z = moved(p.z, D, p.dtype);
    p.values = moved(p.values, D, p.dtype);
    p.indices += 1;
    if (!shared) p.codes = moved(p.codes, K * D, p.c_dtype);
  }
  return out;
}

Tensor codebook_lookup_bwd(Tensor g_values, Tensor indices, Tensor codebook, int64_t groups) {
  const char* op = "codebook_lookup backward";
  check(op, g_values, codebook, 0, groups);
  const int64_t n = rows_of(g_values), D = g_values.size(g_values.dim() - 1) / groups, K = codebook.size(codebook.dim() - 2);
  SPK_CHECK(indices.scalar_type() == ScalarType::Long && indices.numel() == n * groups && same_device(indices, g_values), op,
            ": indices must be int64 with ", n * groups, " elements on ", device_name(g_values), ", got ", describe(indices));
  const auto size = codebook.sizes();
  Tensor g_codebook = empty_like_sizes({size.begin(), size.end()}, codebook.scalar_type(), codebook);
  if (D == 0) return g_codebook;
  g_values = torch::stable::contiguous(g_values);
  indices = torch::stable::contiguous(indices);
  const bool shared = codebook.dim() == 2;
  const int64_t each = shared ? 1 : groups;  // books, and the groups that lie between rows of one
  CodebookBwd p{*kernel_dtype(g_values.scalar_type()),
                *kernel_dtype(codebook.scalar_type()),
                shared ? n * groups : n,
                K,
                D,
                each * D,
                each,
                g_values.const_data_ptr(),
                indices.const_data_ptr<int64_t>(),
                nullptr,
                nullptr,
                g_codebook.mutable_data_ptr()};
  const std::string text = sizes_of(n, K, D);
  for (int64_t g = 0; g < each; ++g) {
#ifdef SPK_CUDA
    if (on_gpu(g_values)) {
      launch_cuda(codebook_lookup_bwd_cuda, p, g_values, op, text);
    } else
#endif
    {
      // Rows by code, in their order: what every sum then follows, whatever the threads.
      std::vector<int64_t> starts(size_t(K) + 1), order(size_t(p.n));
      for (int64_t i = 0; i < p.n; ++i) {
        const int64_t k = p.indices[i * p.i_step];
        SPK_CHECK(k >= -1 && k < K, op, ": indices must be below ", K, ", got ", k);
        if (k >= 0) ++starts[size_t(k) + 1];
      }
      for (int64_t k = 0; k < K; ++k) starts[size_t(k) + 1] += starts[size_t(k)];
      std::vector<int64_t> next(starts.begin(), starts.end() - 1);
      for (int64_t i = 0; i < p.n; ++i)
        if (const int64_t k = p.indices[i * p.i_step]; k >= 0) order[size_t(next[size_t(k)]++)] = i;
      p.order = order.data();
      p.starts = starts.data();
      launch_cpu(codebook_bwd_cpu(), p, K, kGrain / (8 * D * (1 + p.n / K)), op, text);
    }
    p.g = moved(p.g, D, p.dtype);
    p.indices += 1;
    p.g_codes = moved(p.g_codes, K * D, p.c_dtype);
  }
  return g_codebook;
}

using torch::stable::detail::StableLibrary;
void implement(StableLibrary& m) {
  m.impl("codebook_lookup_fwd", TORCH_BOX(&codebook_lookup_fwd));
  m.impl("codebook_lookup_bwd", TORCH_BOX(&codebook_lookup_bwd));
}

}  // namespace

// clang-format off
STABLE_TORCH_LIBRARY_FRAGMENT(SPK_LIBRARY, m) {
  m.def("codebook_lookup_fwd(Tensor z, Tensor codebook, int metric, int groups, bool check_nan) "
        "-> (Tensor indices, Tensor values)");
  m.def("codebook_lookup_bwd(Tensor g_values, Tensor indices, Tensor codebook, int groups) -> Tensor g_codebook");
}
// clang-format on
STABLE_TORCH_LIBRARY_IMPL(SPK_LIBRARY, CPU, m) { implement(m); }

#ifdef SPK_CUDA
void register_codebook_lookup_cuda(StableLibrary& m) { implement(m); }
#endif

}  // namespace spk
