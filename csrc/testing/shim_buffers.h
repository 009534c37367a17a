// Tells the host shim which memory a launch may touch: one function per params struct, in <op>_buffers.cpp.
#pragma once
#include "bn_lif/bn_lif.h"
#include "codebook_lookup/codebook_lookup.h"
#include "lif/lif.h"
#include "qk_attention/qk_attention.h"
#include "selective_scan/selective_scan.h"
#include "selective_scan_2d/selective_scan_2d.h"
#include "spiking_self_attention/spiking_self_attention.h"

namespace spk {

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::f64 ? 8 : 2; }

// `count` elements of `size` bytes at `data`; null: not wanted.
void shim_buffer(const void* data, int64_t count, int64_t size, const char* name, bool read_only);

void shim_buffers(const LifFwd& p);
void shim_buffers(const LifBwd& p);
void shim_buffers(const LifReduce& p);
void shim_buffers(const BnStats& p);
void shim_buffers(const BnLifFwd& p);
void shim_buffers(const BnLifBwd& p);
void shim_buffers(const QkFwd& p);
void shim_buffers(const QkBwd& p);
void shim_buffers(const QkReduce& p);
void shim_buffers(const SpikingSelfAttentionFwd& p);
void shim_buffers(const SpikingSelfAttentionBwd& p);
void shim_buffers(const SelectiveScanFwd& p);
void shim_buffers(const SelectiveScanBwd& p);
void shim_buffers(const SelectiveScanReduce& p);
void shim_buffers(const SelectiveScan2dFwd& p);
void shim_buffers(const SelectiveScan2dBwd& p);
void shim_buffers(const CodebookFwd& p);
void shim_buffers(const CodebookBwd& p);

}  // namespace spk
