// From a host function to a kernel: the CPU's threads, or the current CUDA stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#if defined(SPK_SHIM)
#include <functional>

#include "testing/shim_buffers.h"
#elif defined(SPK_CUDA)
#include <cuda_runtime_api.h>
#endif

#include <atomic>

#include "torch/checks.h"

// The library the operators are registered in; tests build a second one of the same source.
#ifndef SPK_LIBRARY
#define SPK_LIBRARY spikecore
#endif

#if defined(SPK_CUDA) && !defined(SPK_SHIM)
// Lives in libtorch_cuda, so it may be missing at run time; weak, and looked at before use. A CUDA tensor implies it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace spk {

inline void check_launch(int code, const char* op, const std::string& sizes) {
  if (code == kOk) return;
  SPK_CHECK(code != kOutOfMemory, op, ": out of memory for scratch space (", sizes, ")");
#if defined(SPK_CUDA) && !defined(SPK_SHIM)
  SPK_CHECK(false, op, ": CUDA error ", code, " (", cudaGetErrorString(static_cast<cudaError_t>(code)), ") at ", sizes);
#endif
  SPK_CHECK(false, op, ": kernel failed with code ", code, " at ", sizes);
}

// Run kernel(params, begin, end) over [0, count) on the CPU's threads; `grain`: least count worth a thread.
template <class Params>
void launch_cpu(int (*kernel)(const Params&, int64_t, int64_t), const Params& p, int64_t count, int64_t grain, const char* op,
                const std::string& sizes) {
  std::atomic<int> code{kOk};
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    const int c = kernel(p, begin, end);
    if (c != kOk) code = c;
  });
  check_launch(code, op, sizes);
}

// Whether `t` goes to the CUDA launchers. A test build (SPK_SHIM) sends CPU tensors there: csrc/testing runs the kernels.
inline bool on_gpu(const Tensor& t) {
#ifdef SPK_SHIM
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

#if defined(SPK_SHIM)
std::string run_on_shim(const std::function<int()>& launch);
template <class Params>
void launch_cuda(int (*launcher)(const Params&, void*), const Params& p, const Tensor&, const char* op, const std::string& sizes) {
  const std::string fault = run_on_shim([&] {
    shim_buffers(p);
    return launcher(p, nullptr);
  });
  SPK_CHECK(fault.empty(), op, ": ", fault, " at ", sizes);
}
#elif defined(SPK_CUDA)
// Run launcher(params, stream) on the device and current stream of `like`.
template <class Params>
void launch_cuda(int (*launcher)(const Params&, void*), const Params& p, const Tensor& like, const char* op,
                 const std::string& sizes) {
  torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  SPK_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch has no CUDA");
  void* stream = nullptr;
  check_abi(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream), "current stream");
  check_launch(launcher(p, stream), op, sizes);
}
#endif

}  // namespace spk
