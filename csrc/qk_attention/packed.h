// qk_attention's CPU kernel of packed spikes: a byte holds eight time steps.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "qk_attention/rows.h"

namespace spk {
namespace SPK_ISA {
namespace {

// counts[t][i] += bit t of x[i] (and y[i]).
template <bool PRODUCT>
SPK_NOINLINE void count_columns(uint8_t (*counts)[kQkTile], const uint8_t* x, const uint8_t* y, int n) {
  for (int t = 0; t < 8; ++t) {
    uint8_t* __restrict__ c = counts[t];
    for (int i = 0; i < n; ++i) c[i] = uint8_t(c[i] + (((PRODUCT ? x[i] & y[i] : x[i]) >> t) & 1));
  }
}
// counts[t] += how many of the n bytes have bit t.
template <bool PRODUCT>
SPK_NOINLINE void count_row(int64_t* counts, const uint8_t* x, const uint8_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t a = 0, b = 0;
    const size_t m = size_t(n - i < 8 ? n - i : 8);
    memcpy(&a, x + i, m);
    if (PRODUCT) {
      memcpy(&b, y + i, m);
      a &= b;
    }
    for (int t = 0; t < 8; ++t) counts[t] += __builtin_popcountll(a >> t & 0x0101010101010101u);
  }
}

int packed_forward(const QkFwd& p, int64_t begin, int64_t end) {
  const QkShape& shape = p.shape;
  const int64_t slices = (shape.T + 7) / 8;
  float* const a = static_cast<float*>(aligned_alloc(64, sizeof(float) * size_t(slices) * 8 * kQkRow));
  if (!a) return kOutOfMemory;
  float v[kQkTile];
  for (int64_t index = begin; index < end; ++index) {
    const QkPart part(shape, p.out, index);
    const int n = part.neurons();
    for (int64_t j = 0; j < slices; ++j) {
      float* const sum = a + j * 8 * kQkRow;
      const auto row = [&](const QkIn& x, int64_t r) { return x.data ? part.at<const uint8_t>(x, j, r, part.l0) : nullptr; };
      if (shape.columns) {
        for (int t = 0; t < 8; ++t) fill_row(sum + t * kQkRow, 0.f, n);
        uint8_t counts[8][kQkTile];
        for (int64_t r0 = 0; r0 < shape.R; r0 += 255) {
          memset(counts, 0, sizeof counts);
          for (int64_t r = r0; r < shape.R && r < r0 + 255; ++r)
            (p.w.data ? count_columns<true> : count_columns<false>)(counts, row(p.s, r), row(p.w, r), n);
          for (int t = 0; t < 8; ++t)
            for (int i = 0; i < n; ++i) sum[t * kQkRow + i] += float(counts[t][i]);
        }
      } else {
        for (int64_t r = part.r0; r < part.r1; ++r) {
          int64_t counts[8] = {};
          (p.w.data ? count_row<true> : count_row<false>)(counts, row(p.s, r), row(p.w, r), shape.L);
          for (int t = 0; t < 8; ++t) sum[t * kQkRow + (r - part.r0)] = float(counts[t]);
        }
      }
    }
    fire(Lif<float>(p.attn, part.h), a, kQkRow, v, a, static_cast<float*>(nullptr), kQkRow, shape.T, n);
    for (int64_t j = 0; j < slices; ++j) {
      uint8_t bits[kQkTile] = {};
      for (int t = 0; t < 8 && j * 8 + t < shape.T; ++t)
        for (int i = 0; i < n; ++i) bits[i] = uint8_t(bits[i] | (a[(j * 8 + t) * kQkRow + i] != 0 ? 1 << t : 0));
      for (int64_t r = part.r0; r < part.r1; ++r) {
        const uint8_t* __restrict__ y = part.at<const uint8_t>(p.y, j, r, part.l0);
        uint8_t* __restrict__ out = part.at<uint8_t>(p.out, j, r, part.l0);
        const uint8_t one = bits[shape.columns ? 0 : r - part.r0];
        const int64_t m = part.l1 - part.l0;
        if (shape.columns)
          for (int64_t i = 0; i < m; ++i) out[i] = y[i] & bits[i];
        else
          for (int64_t i = 0; i < m; ++i) out[i] = y[i] & one;
      }
    }
  }
  free(a);
  return kOk;
}

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
