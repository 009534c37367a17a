// Products with spikes as bits, for AVX-512. Four spikes are an index into the 16 sums that four coefficients can make, and
// a permutation looks 16 of them up at once: a quarter of the additions of a product of floats. Zeros add nothing, so that
// sums of integers are those of any other order.
#pragma once
#include <stdint.h>

#include "lif/neuron.h"
#include "spiking_self_attention/products.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int kWords = 8;  // of 32 bits, of a row of spikes: as many as the columns of a chunk may take

// Spikes x of D rows and n columns. Bit b of over_n[w][r]: x[r, 32 w + b]; of over_d[w][i]: x[32 w + b, i].
struct Bits {
  uint32_t *over_n, *over_d;  // [kWords, D padded], [ceil(D / 32), n padded]; zero where there is no spike
  int64_t n_ld, d_ld;         // between words
};

// Numbers of type A whose spikes are kept as bits.
template <class A>
constexpr bool kBits = false;

#if defined(__AVX512F__)
template <>
constexpr bool kBits<float> = true;

typedef uint16_t Half __attribute__((may_alias));  // of a word
constexpr __mmask16 kAll = 0xffff;                 // of intrinsics whose other forms GCC 12 warns of

inline __mmask16 within(int64_t n) { return n < 16 ? __mmask16((1u << n) - 1) : kAll; }

// 16 spikes of each of R rows from row r on (of the same 32) from column i on.
template <int R>
inline void put_bits(Bits b, int64_t r, int64_t i, const __mmask16 (&fired)[R]) {
  uint32_t* const d = b.over_d + r / 32 * b.d_ld + i;
  __m512i all = r % 32 ? _mm512_load_si512(d) : _mm512_setzero_si512();
  SPK_UNROLL
  for (int j = 0; j < R; ++j) {
    reinterpret_cast<Half*>(b.over_n + i / 32 * b.n_ld + r + j)[i / 16 % 2] = fired[j];
    all = _mm512_mask_or_epi32(all, fired[j], all, _mm512_set1_epi32(int32_t(1u << (r + j) % 32)));
  }
  _mm512_store_si512(d, all);
}

// After a row's last 16: the other half of its word.
template <int R>
inline void end_bits(Bits b, int64_t r, int64_t n) {
  const int64_t i = (n + 15) / 16 * 16;
  for (int j = 0; i % 32 && j < R; ++j) reinterpret_cast<Half*>(b.over_n + i / 32 * b.n_ld + r + j)[1] = 0;
}

// What is read next lies `next` numbers after what is read now, if it lies anywhere.
inline void prefetch(const float* x, int64_t next) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(x) + uintptr_t(next) * 4), _MM_HINT_T1);
}

constexpr int64_t kRowsAtOnce = 8;  // that share what put_bits reads and writes; a divisor of 32

// Rows [r, r + R); adds to `other` the bits of numbers that are not 1.
template <int R>
inline __m512i rows_to_bits(Bits b, const float* s, int64_t row, int64_t next, int64_t r, int64_t n, __m512i other) {
  const __m512 one = _mm512_set1_ps(1.f);
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 fired[R];
    SPK_UNROLL
    for (int j = 0; j < R; ++j) {
      const float* const from = s + j * row + i;
      prefetch(from, next);
      const __m512 x = _mm512_maskz_loadu_ps(within(n - i), from);
      fired[j] = _mm512_cmp_ps_mask(x, one, _CMP_EQ_OQ);
      other = _mm512_mask_or_epi32(other, __mmask16(~fired[j]), other, _mm512_castps_si512(x));
    }
    put_bits(b, r, i, fired);
  }
  end_bits<R>(b, r, n);
  return other;
}

// False where a number is neither 0 nor 1.
SPK_NOINLINE bool to_bits(Bits b, const float* s, int64_t row, int64_t next, int64_t D, int64_t n) {
  __m512i other = _mm512_setzero_si512();
  int64_t r = 0;
  for (; r + kRowsAtOnce <= D; r += kRowsAtOnce) other = rows_to_bits<kRowsAtOnce>(b, s + r * row, row, next, r, n, other);
  for (; r < D; ++r) other = rows_to_bits<1>(b, s + r * row, row, next, r, n, other);
  return _mm512_test_epi32_mask(other, _mm512_set1_epi32(0x7fffffff)) == 0;
}

// The same from bit `bit` of bytes.
SPK_NOINLINE void to_bits(Bits b, const uint8_t* s, int bit, int64_t row, int64_t D, int64_t n) {
  for (int64_t r = 0; r < D; ++r, s += row) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 fired[] = {_mm_test_epi8_mask(_mm_maskz_loadu_epi8(within(n - i), s + i), _mm_set1_epi8(char(1 << bit)))};
      put_bits(b, r, i, fired);
    }
    end_bits<1>(b, r, n);
  }
}

template <bool HARD, bool AT_ZERO, bool KEEP, int R>
inline void step_rows(Bits b, const float* x, int64_t row, int64_t next, float* v, float* h, int64_t ld, float decay, float gain,
                      const Neuron<float> c, int64_t r, int64_t n) {
  const __m512 decays = _mm512_set1_ps(decay), gains = _mm512_set1_ps(gain), rest = _mm512_set1_ps(c.rest),
               fire_at = _mm512_set1_ps(c.fire_at), by = _mm512_set1_ps(c.reset_by);
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 fired[R];
    SPK_UNROLL
    for (int j = 0; j < R; ++j) {
      const float* const from = x + j * row + i;
      const int64_t at = (r + j) * ld + i;
      prefetch(from, next);
      const __m512 was = _mm512_load_ps(v + at), input = gains * _mm512_maskz_loadu_ps(within(n - i), from);
      const __m512 hi = (AT_ZERO ? decays * was : rest + decays * (was - rest)) + input;
      // Columns that do not exist never fire.
      fired[j] = _mm512_mask_cmp_ps_mask(within(n - i), hi, fire_at, _CMP_GE_OQ);
      if (KEEP) _mm512_store_ps(h + at, hi);
      _mm512_store_ps(v + at, HARD ? _mm512_mask_mov_ps(hi, fired[j], rest) : _mm512_mask_sub_ps(hi, fired[j], hi, by));
    }
    put_bits(b, r, i, fired);
  }
  end_bits<R>(b, r, n);
}

// The same from a step of neurons on the currents x; v, and h unless it is null, have rows `ld` apart.
template <bool HARD, bool AT_ZERO, bool KEEP>
SPK_NOINLINE void step_bits(Bits b, const float* x, int64_t row, int64_t next, float* v, float* h, int64_t ld, float decay,
                            float gain, const Neuron<float> c, int64_t D, int64_t n) {
  constexpr int R = kRowsAtOnce;
  int64_t r = 0;
  for (; r + R <= D; r += R) step_rows<HARD, AT_ZERO, KEEP, R>(b, x + r * row, row, next, v, h, ld, decay, gain, c, r, n);
  for (; r < D; ++r) step_rows<HARD, AT_ZERO, KEEP, 1>(b, x + r * row, row, next, v, h, ld, decay, gain, c, r, n);
}

inline void step_bits(Bits b, bool hard, const float* x, int64_t row, int64_t next, float* v, float* h, int64_t ld, float decay,
                      float gain, const Neuron<float> c, int64_t D, int64_t n) {
  using Run = decltype(&step_bits<true, true, true>);
  static constexpr Run runs[3][2] = {{step_bits<false, true, false>, step_bits<false, true, true>},
                                     {step_bits<true, true, false>, step_bits<true, true, true>},
                                     {step_bits<true, false, false>, step_bits<true, false, true>}};
  runs[!hard ? 0 : c.rest == 0 ? 1 : 2][h != nullptr](b, x, row, next, v, h, ld, decay, gain, c, D, n);
}

// out[r, c] (+)= spikes that row r of x and row c of y share; rows of out are `ld` apart, padded.
SPK_NOINLINE void count_bits(Bits x, Bits y, int64_t D, int64_t n, float* out, int64_t ld, bool add) {
  const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1),
                counts = _mm512_maskz_broadcast_i32x4(kAll, _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  for (int64_t r = 0; r < D; ++r)
    for (int64_t c = 0; c < D; c += 16) {
      __m512i sum = _mm512_setzero_si512();  // of each byte
      for (int64_t w = 0; w * 32 < n; ++w) {
        const __m512i both =
            _mm512_and_si512(_mm512_set1_epi32(int32_t(x.over_n[w * x.n_ld + r])), _mm512_load_si512(y.over_n + w * y.n_ld + c));
        sum = _mm512_add_epi8(sum, _mm512_shuffle_epi8(counts, _mm512_and_si512(both, nibble)));
        sum = _mm512_add_epi8(sum, _mm512_shuffle_epi8(counts, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble)));
      }
      const __m512i words = _mm512_madd_epi16(_mm512_maddubs_epi16(sum, ones), _mm512_set1_epi16(1));
      float* const d = out + r * ld + c;
      const __m512 count = _mm512_maskz_cvtepi32_ps(kAll, words);
      _mm512_store_ps(d, add ? _mm512_load_ps(d) + count : count);
    }
}

constexpr int kTableRows = 4, kTableVectors = 5, kTables = kSpikesAtOnce / 4;  // rows, vectors of a tile; tables of a row

// tables[k, r]: entry i is the sum of a[r, 4 k + j] over the bits j of i.
template <int R>
inline void make_tables(const float* a, int64_t row, int64_t column, int64_t groups, __m512* tables) {
  for (int64_t k = 0; k < groups; ++k, a += 4 * column) {
    SPK_UNROLL
    for (int r = 0; r < R; ++r) {
      const float* const x = a + r * row;
      __m512 t = _mm512_maskz_mov_ps(0xaaaa, _mm512_set1_ps(x[0]));
      t = _mm512_mask_add_ps(t, 0xcccc, t, _mm512_set1_ps(x[column]));
      t = _mm512_mask_add_ps(t, 0xf0f0, t, _mm512_set1_ps(x[2 * column]));
      tables[k * R + r] = _mm512_mask_add_ps(t, 0xff00, t, _mm512_set1_ps(x[3 * column]));
    }
  }
}

template <int R, int W>
SPK_NOINLINE void table_tile(const __m512* tables, int64_t groups, const uint32_t* bits, int64_t bits_ld, float* c, int64_t ld,
                             int64_t n, bool add) {
  __m512 sum[R][W] = {};
  for (int64_t k = 0; k < groups; bits += bits_ld) {
    __m512i word[W];
    SPK_UNROLL
    for (int w = 0; w < W; ++w) word[w] = _mm512_load_si512(bits + 16 * w);
    const int64_t end = k + 8 < groups ? k + 8 : groups;
    for (; k < end; ++k, tables += R) {
      SPK_UNROLL
      for (int w = 0; w < W; ++w) {
        SPK_UNROLL
        for (int r = 0; r < R; ++r) sum[r][w] += _mm512_maskz_permutexvar_ps(kAll, word[w], tables[r]);
        word[w] = _mm512_maskz_srli_epi32(kAll, word[w], 4);
      }
    }
  }
  SPK_UNROLL
  for (int r = 0; r < R; ++r) {
    SPK_UNROLL
    for (int w = 0; w < W; ++w) {
      float* const d = c + r * ld + 16 * w;
      const __mmask16 in = w + 1 < W ? kAll : within(n - 16 * w);
      _mm512_mask_storeu_ps(d, in, add ? _mm512_maskz_loadu_ps(in, d) + sum[r][w] : sum[r][w]);
    }
  }
}

template <int R>
inline void table_rows(const float* a, int64_t row, int64_t column, int64_t groups, const uint32_t* bits, int64_t bits_ld, float* c,
                       int64_t ld, int64_t n, bool add) {
  alignas(64) __m512 tables[kTables * R];
  make_tables<R>(a, row, column, groups, tables);
  constexpr decltype(&table_tile<R, 1>) tiles[kTableVectors] = {table_tile<R, 1>, table_tile<R, 2>, table_tile<R, 3>,
                                                                table_tile<R, 4>, table_tile<R, 5>};
  int64_t vectors = (n + 15) / 16;
  for (int64_t panels = (vectors + kTableVectors - 1) / kTableVectors, i = 0; panels > 0; --panels) {
    const int64_t w = (vectors + panels - 1) / panels;  // panels as even as can be
    tiles[w - 1](tables, groups, bits + i, bits_ld, c + i, ld, n - i, add);
    vectors -= w, i += 16 * w;
  }
}

// c[r, i] (+)= sum over k < K of a[r, k] b[k, i], where bit k % 32 of bits[k / 32, i] is b[k, i]. Of a, K is read to the next
// multiple of four; of c, n columns are written.
SPK_NOINLINE void spike_product(const float* a, int64_t row, int64_t column, int64_t M, int64_t K, const uint32_t* bits,
                                int64_t bits_ld, float* c, int64_t ld, int64_t n, bool add) {
  for (int64_t k = 0; k < K; k += 4 * kTables, a += 4 * kTables * column, bits += kTables / 8 * bits_ld, add = true) {
    const int64_t groups = K - k < 4 * kTables ? (K - k + 3) / 4 : kTables;
    int64_t r = 0;
    for (; r + kTableRows <= M; r += kTableRows)
      table_rows<kTableRows>(a + r * row, row, column, groups, bits, bits_ld, c + r * ld, ld, n, add);
    for (; r < M; ++r) table_rows<1>(a + r * row, row, column, groups, bits, bits_ld, c + r * ld, ld, n, add);
  }
}

#endif  // AVX-512

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
