// The memory that codebook_lookup's launches may touch.
#include "testing/shim_buffers.h"

namespace spk {
namespace {

int64_t span(int64_t n, int64_t width, int64_t step) { return n ? (n - 1) * step + width : 0; }

}  // namespace

void shim_buffers(const CodebookFwd& p) {
  shim_buffer(p.z, span(p.n, p.D, p.z_step), size_of(p.dtype), "z", true);
  shim_buffer(p.codes, p.K * p.D, size_of(p.c_dtype), "codes", true);
  shim_buffer(p.indices, span(p.n, 1, p.i_step), 8, "indices", false);
  shim_buffer(p.values, span(p.n, p.D, p.v_step), size_of(p.dtype), "values", false);
  shim_buffer(p.z_norm, p.n, 4, "z_norm", false);
  shim_buffer(p.c_norm, p.K, 4, "c_norm", false);
  shim_buffer(p.found, p.splits * p.n * 4, 4, "found", false);
  shim_buffer(p.bad_z, 1, 4, "bad_z", false);
  shim_buffer(p.bad_c, 1, 4, "bad_c", false);
}

void shim_buffers(const CodebookBwd& p) {
  shim_buffer(p.g, span(p.n, p.D, p.g_step), size_of(p.dtype), "g", true);
  shim_buffer(p.indices, span(p.n, 1, p.i_step), 8, "indices", true);
  shim_buffer(p.g_codes, p.K * p.D, size_of(p.c_dtype), "g_codes", false);
}

bool codebook_has_bf16_cpu() { return false; }
CodebookScanFn* codebook_pack_cpu() { return nullptr; }
CodebookScanFn* codebook_screen_cpu() { return nullptr; }
CodebookScanFn* codebook_settle_cpu() { return nullptr; }
CodebookBwdFn* codebook_bwd_cpu() { return nullptr; }

}  // namespace spk
