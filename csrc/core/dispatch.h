// One source file, one object per instruction set: <op>_cpu.cpp is compiled with -DSPK_ISA=avx2 and so on, each copy in
// the namespace of that name, so that the linker can never take code of one for another. The copy compiled with
// SPK_DISPATCH (one per binary) also defines the functions that choose.
#pragma once
#include "core/isa.h"

#if defined(__x86_64__)
#define SPK_EACH_ISA(X) X(baseline) X(avx2) X(avx512)
#define SPK_PICK(fn) ::spk::pick(&baseline::fn, &avx2::fn, &avx512::fn, decltype(&baseline::fn){})
#elif defined(__aarch64__)
#define SPK_EACH_ISA(X) X(neon)
#define SPK_PICK(fn) ::spk::pick(decltype(&neon::fn){}, decltype(&neon::fn){}, decltype(&neon::fn){}, &neon::fn)
#else
#define SPK_EACH_ISA(X) X(baseline)
#define SPK_PICK(fn) (&baseline::fn)
#endif
