// Launches of libraries built with SPK_SHIM: host function and launcher as they are, kernels on the shim. Not shipped.
#include <functional>
#include <string>

#include "testing/checks.h"
#include "testing/shim_buffers.h"

extern "C" {
void shim_reset(unsigned seed, int coalescing);
void shim_register(void* data, size_t bytes, const char* name, int read_only, int granule);
const char* shim_error();
// Order of threads and blocks of the next launches: 0 natural, 1 reversed, else random.
static unsigned shim_order = 0;
void shim_set_order(unsigned seed) { shim_order = seed; }
}

namespace spk {

void shim_buffer(const void* data, int64_t count, int64_t size, const char* name, bool read_only) {
  if (data) shim_register(const_cast<void*>(data), size_t(count * size), name, read_only, int(size));
}

std::string run_on_shim(const std::function<int()>& launch) {
  shim_reset(shim_order, 0);
  const int code = launch();
  return *shim_error() ? shim_error() : code ? "launcher returned " + std::to_string(code) : "";
}

}  // namespace spk
