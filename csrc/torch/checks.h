// Tensors of the stable ABI as the kernels want them: checks with one clear line, allocation, layouts.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/params.h"

namespace spk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}
// One clear line, unlike STD_TORCH_CHECK's, which begins with function and source file.
#define SPK_CHECK(condition, ...)               \
  do {                                          \
    if (!(condition)) ::spk::fail(__VA_ARGS__); \
  } while (false)

inline void check_abi(AOTITorchError code, const char* what) { SPK_CHECK(code == 0, "spikecore: torch call failed: ", what); }

inline std::string dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "dtype " + std::to_string(static_cast<int>(t));
  }
}

template <class Sizes>
std::string shape_name(const Sizes& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

inline std::string device_name(const Tensor& t) { return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda" : "another device"; }

// "float32 [4, 2] on cpu"
inline std::string describe(const Tensor& t) {
  return dtype_name(t.scalar_type()) + " " + shape_name(t.sizes()) + " on " + device_name(t);
}

inline std::optional<DType> kernel_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: return std::nullopt;
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type = 0;
  check_abi(aoti_torch_get_device_type(like.get(), &device_type), "get_device_type");
  check_abi(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), static_cast<int32_t>(dtype), device_type,
                                     like.get_device_index(), &handle),
            "empty_strided");
  return Tensor(handle);
}

inline Tensor empty1d(int64_t n, ScalarType dtype, const Tensor& like) { return empty({n}, {1}, dtype, like); }

// How a sequence x: [T, ...] lies in memory, seen as T time slices of N elements.
struct Slices {
  std::vector<int64_t> sizes, strides;  // of one slice
  int64_t T, N, step;                   // step: elements from slice to slice
  bool dense;                           // the slice fills N elements of memory without gap (in any order of dimensions)

  explicit Slices(const Tensor& x) {
    const auto size = x.sizes(), stride = x.strides();
    T = size[0];
    step = stride[0];
    sizes.assign(size.begin() + 1, size.end());
    strides.assign(stride.begin() + 1, stride.end());
    N = 1;
    for (int64_t n : sizes) N *= n;
    std::vector<std::pair<int64_t, int64_t>> order;
    for (size_t i = 0; i < sizes.size(); ++i)
      if (sizes[i] != 1) order.emplace_back(strides[i], sizes[i]);
    std::sort(order.begin(), order.end());
    int64_t expected = 1;
    dense = true;
    for (auto [st, n] : order) {
      dense = dense && st == expected;
      expected *= n;
    }
    if (!dense) {  // outputs are laid out contiguously then; an empty slice counts sizes of 0 as 1, as torch does
      expected = 1;
      for (size_t i = sizes.size(); i-- > 0; expected *= std::max<int64_t>(sizes[i], 1)) strides[i] = expected;
    }
  }

  Tensor empty_slice(ScalarType dtype, const Tensor& like) const { return spk::empty(sizes, strides, dtype, like); }
  Tensor empty_sequence(int64_t steps, ScalarType dtype, const Tensor& like) const {
    std::vector<int64_t> size(sizes), stride(strides);
    size.insert(size.begin(), steps);
    stride.insert(stride.begin(), std::max<int64_t>(N, 1));
    return spk::empty(size, stride, dtype, like);
  }
  // t with this layout: itself where it has it already, else a copy. `first`: the first dimension of t that is of a slice.
  Tensor laid_out(const Tensor& t, int first) const {
    bool same = first == 0 || t.size(0) == 1 || t.stride(0) == N;
    for (size_t i = 0; i < sizes.size(); ++i) same = same && (sizes[i] == 1 || t.stride(i + first) == strides[i]);
    if (same || t.numel() == 0) return t;
    Tensor copy = first ? empty_sequence(t.size(0), t.scalar_type(), t) : empty_slice(t.scalar_type(), t);
    torch::stable::copy_(copy, t);
    return copy;
  }
};

}  // namespace spk
