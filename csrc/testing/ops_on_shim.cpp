// Launches of libraries built with SPK_SHIM: host function and launcher as they are, kernels on the shim. Not shipped.
#include <functional>
#include <string>

#include "testing/checks.h"
#include "testing/shim_buffers.h"

extern "C" {
void shim_reset(unsigned seed, int coalescing);
void shim_register(void* data, size_t bytes, const char* name, int read_only, int granule);
const char* shim_error();
void shim_coalescing(int write, uint64_t* requests, uint64_t* sectors);
// Order of threads and blocks of the next launches: 0 natural, 1 reversed, else random.
static unsigned shim_order = 0;
void shim_set_order(unsigned seed) { shim_order = seed; }
// Bytes of the 32-byte sectors that all launches since then have asked memory for; counting slows them down.
static bool shim_counting = false;
static uint64_t shim_bytes = 0;
void shim_start_counting() {
  shim_counting = true;
  shim_bytes = 0;
}
uint64_t shim_counted() {
  shim_counting = false;
  return shim_bytes;
}
}

namespace spk {

void shim_buffer(const void* data, int64_t count, int64_t size, const char* name, bool read_only) {
  if (data) shim_register(const_cast<void*>(data), size_t(count * size), name, read_only, int(size));
}

std::string run_on_shim(const std::function<int()>& launch) {
  shim_reset(shim_order, shim_counting);
  const int code = launch();
  for (int write = 0; write < 2; ++write) {
    uint64_t requests = 0, sectors = 0;
    shim_coalescing(write, &requests, &sectors);
    if (shim_counting) shim_bytes += 32 * sectors;
  }
  return *shim_error() ? shim_error() : code ? "launcher returned " + std::to_string(code) : "";
}

}  // namespace spk
