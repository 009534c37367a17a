// placeholder until the kernels stand
#include "core/cuda.h"
#include "selective_scan/selective_scan.h"
namespace spk {
int selective_scan_fwd_cuda(const SelectiveScanFwd&, void*) { return 1; }
int selective_scan_bwd_cuda(const SelectiveScanBwd&, void*) { return 1; }
int selective_scan_reduce_cuda(const SelectiveScanReduce&, void*) { return 1; }
int64_t selective_scan_starts(const SelectiveScanBwd&) { return 0; }
}  // namespace spk
