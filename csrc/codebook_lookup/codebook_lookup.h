// Parameters of the codebook_lookup kernels. A launch looks up the rows of one product group.
#pragma once
#include "core/dispatch.h"
#include "core/params.h"

namespace spk {

// The numbers are those of METRICS in spikecore/ops/codebook_lookup.py; a test compares the two.
enum class Metric : int32_t { dot, l2, cosine };
constexpr int kMetrics = 3;

// CUDA: what one part of the codes holds for a row. The best of it has `index`; its score is between `lower` and
// `upper`, all others are at most `second`.
struct alignas(16) CodebookFound {
  float upper, lower, second;
  int32_t index;
};

struct CodebookFwd {
  DType dtype, c_dtype;  // of z and values; of codes: the same, or f32 beside half precision
  Metric metric;
  int64_t n, K, D;
  int64_t z_step, v_step, i_step;  // elements from row to row of z, values, indices
  const void* z;                   // [n, D]
  const void* codes;               // [K, D], dense
  int64_t* indices;                // [n]; -1 where no score is a finite number
  void* values;                    // [n, D]; NaN there
  float *z_norm, *c_norm;          // CUDA: [n], [K] scratch; NaN where a vector is not finite
  CodebookFound* found;            // CUDA: [splits, n] scratch
  int64_t splits;                  // CUDA: parts of the codes that different blocks screen
  int32_t *bad_z, *bad_c;          // CUDA: become 1 where a vector is not finite
};

// CPU: codes are screened in panels, rows in tiles of these sizes.
constexpr int kCodebookPanel = 32, kCodebookRows = 12, kCodebookKept = 16;

struct CodebookPanel {
  float weight, residual, slack;  // largest norm, largest norm of what packing rounded away, error of the bias
  int32_t bad;                    // codes that are not finite
  float bias[kCodebookPanel];     // added to a product: l2's -|c|^2 / 2; -inf past the last code
};

// What a row knows of the codes screened so far: who may still be the nearest.
struct CodebookRow {
  float lower;    // the best score is at least this; +inf: the row is not finite
  int32_t count;  // candidates kept
  int64_t exact;  // scores computed in double
  int32_t index[kCodebookKept];
  float upper[kCodebookKept];
};

struct CodebookScan {
  CodebookFwd f;          // of a chunk of rows
  bool bf16;              // screen in bfloat16
  int64_t first, count;   // codes of this tile
  void* packed;           // [panels][D][kCodebookPanel] float, or [panels][(D + 1) / 2][kCodebookPanel][2] bfloat16
  CodebookPanel* panels;  // [panels]
  CodebookRow* rows;      // [n]
};

// g_codes[k] = sum of g over the rows of code k, in their order.
struct CodebookBwd {
  DType dtype, c_dtype;  // of g; of g_codes
  int64_t n, K, D;
  int64_t g_step, i_step;  // elements from row to row of g and indices
  const void* g;           // [n, D]
  const int64_t* indices;  // CUDA: [n]
  const int64_t* order;    // CPU: rows sorted by code
  const int64_t* starts;   // CPU: [K + 1] where in `order` a code's rows begin
  void* g_codes;           // [K, D], dense
};

using CodebookScanFn = int(const CodebookScan&, int64_t begin, int64_t end);
using CodebookBwdFn = int(const CodebookBwd&, int64_t begin, int64_t end);

#define SPK_DECLARE(isa)          \
  namespace isa {                 \
  bool codebook_has_bf16();       \
  CodebookScanFn codebook_pack;   \
  CodebookScanFn codebook_screen; \
  CodebookScanFn codebook_settle; \
  CodebookBwdFn codebook_bwd;     \
  }
SPK_EACH_ISA(SPK_DECLARE)
#undef SPK_DECLARE

bool codebook_has_bf16_cpu();           // whether screening in bfloat16 is faster here
CodebookScanFn* codebook_pack_cpu();    // panels [begin, end) of the tile
CodebookScanFn* codebook_screen_cpu();  // tiles of rows [begin, end) against the packed codes
CodebookScanFn* codebook_settle_cpu();  // rows [begin, end): who is the nearest, and its vector
CodebookBwdFn* codebook_bwd_cpu();      // codes [begin, end)

// CUDA launchers: return a cudaError_t as int.
int codebook_lookup_fwd_cuda(const CodebookFwd& p, void* stream);
int64_t codebook_splits(int64_t n, int64_t K);
int codebook_lookup_bwd_cuda(const CodebookBwd& p, void* stream);

}  // namespace spk
