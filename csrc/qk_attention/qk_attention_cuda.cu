#include "core/cuda.h"
#include "qk_attention/qk_attention.h"
namespace spk {
int qk_fwd_cuda(const QkFwd&, void*) { return 1; }
int qk_bwd_cuda(const QkBwd&, void*) { return 1; }
int qk_reduce_cuda(const QkReduce&, void*) { return 1; }
int64_t qk_parts_cuda(const QkShape&) { return 1; }
}  // namespace spk
