// Which instruction set the CPU kernels run with: chosen once, when the extension is loaded.
#pragma once

namespace spk {

enum class Isa : int { baseline, avx2, avx512, neon };

extern const char* const kIsaNames[4];

// The instruction sets that this binary has and this machine runs, best last; returns how many.
int usable_isas(Isa out[4]);

// The best usable one, or the one that SPIKECORE_ISA names. Null message: fine; else what is wrong with SPIKECORE_ISA.
Isa chosen_isa();
const char* isa_error();

// Choose among the copies of a kernel that dispatch.h's SPK_PICK lists.
template <class F>
F* pick(F* baseline, F* avx2, F* avx512, F* neon) {
  F* const table[] = {baseline, avx2, avx512, neon};
  return table[static_cast<int>(chosen_isa())];
}

}  // namespace spk
