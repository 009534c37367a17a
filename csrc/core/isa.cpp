#include "core/isa.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace spk {

const char* const kIsaNames[4] = {"baseline", "avx2", "avx512", "neon"};

int usable_isas(Isa out[4]) {
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  out[n++] = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    out[n++] = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      out[n++] = Isa::avx512;
  }
#elif defined(__aarch64__)
  out[n++] = Isa::neon;
#else
  out[n++] = Isa::baseline;
#endif
  return n;
}

namespace {

struct Choice {
  Isa isa;
  char error[256];
};

Choice choose() {
  Isa usable[4];
  const int n = usable_isas(usable);
  Choice c{usable[n - 1], ""};
  const char* wanted = getenv("SPIKECORE_ISA");
  if (wanted == nullptr || *wanted == '\0') return c;
  for (int i = 0; i < n; ++i) {
    if (strcmp(wanted, kIsaNames[static_cast<int>(usable[i])]) != 0) continue;
    c.isa = usable[i];
    return c;
  }
  char names[64] = "";
  for (int i = 0; i < n; ++i) {
    if (i) strcat(names, ", ");
    strcat(names, kIsaNames[static_cast<int>(usable[i])]);
  }
  snprintf(c.error, sizeof c.error, "SPIKECORE_ISA must be one of the instruction sets of this machine (%s), got '%.40s'", names,
           wanted);
  return c;
}

const Choice& choice() {
  static const Choice c = choose();
  return c;
}

}  // namespace

Isa chosen_isa() { return choice().isa; }
const char* isa_error() { return choice().error[0] ? choice().error : nullptr; }

}  // namespace spk
