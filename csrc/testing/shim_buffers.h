// Tells the host shim which memory a launch may touch; one function per params struct.
#pragma once
#include "lif/lif.h"

namespace spk {

void shim_buffers(const LifFwd& p);
void shim_buffers(const LifBwd& p);
void shim_buffers(const LifReduce& p);

}  // namespace spk
