// The Python module _C. Loading it defines the operators and their CPU kernels; CUDA kernels wait for register_cuda(),
// because torch takes a second implementation of one dispatch key with a mere warning (spikecore/_backend.py decides).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/isa.h"
#include "torch/checks.h"

#ifdef SPK_CUDA
#include <cuda_runtime_api.h>
namespace spk {
#define X(op) void register_##op##_cuda(torch::stable::detail::StableLibrary&);
SPK_EACH_OP  // X(lif) and so on, from CMakeLists.txt
#undef X
}  // namespace spk
#endif

namespace {

std::vector<std::string> isas() {
  spk::Isa usable[4];
  const int n = spk::usable_isas(usable);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.push_back(spk::kIsaNames[static_cast<int>(usable[i])]);
  return names;
}

void register_cuda() {
#ifdef SPK_CUDA
  using torch::stable::detail::StableLibrary;
  static StableLibrary library(StableLibrary::Kind::IMPL, "spikecore", "CUDA", __FILE__, __LINE__);
  static const bool once = [] {
#define X(op) spk::register_##op##_cuda(library);
    SPK_EACH_OP
#undef X
    return true;
  }();
  (void)once;
#else
  throw std::runtime_error("spikecore was built without CUDA kernels");
#endif
}

// The newest CUDA the installed driver speaks, "13.0"; "" without a driver or without CUDA kernels.
std::string cuda_driver() {
  int version = 0;
#ifdef SPK_CUDA
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
#endif
  return version ? std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) : "";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isa", [] { return spk::kIsaNames[static_cast<int>(spk::chosen_isa())]; }, "The instruction set of the CPU kernels.");
  m.def("isa_error", &spk::isa_error, "What is wrong with SPIKECORE_ISA, or None.");
  m.def("isas", &isas, "The instruction sets this machine can run, best last.");
  m.def("register_cuda", &register_cuda, "Attach the compiled CUDA kernels to torch's CUDA dispatch key.");
  m.def("cuda_driver", &cuda_driver, "The newest CUDA the installed driver speaks, or an empty string.");
#define X(op) #op " "
  m.attr("ops") = SPK_EACH_OP;  // "lif ..."
#undef X
  m.attr("cuda_archs") = SPK_CUDA_ARCHS;      // "80 90 100", or empty
  m.attr("cuda_version") = SPK_CUDA_VERSION;  // of the compiler, "13.0", or empty
  m.attr("build_torch") = SPK_BUILD_TORCH;    // torch whose headers it was built with
  m.attr("compiler") = __VERSION__;
}
