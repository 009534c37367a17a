// What lif and other operators whose CPU kernels walk over rows of neurons share.
#pragma once
#include <math.h>

#include <type_traits>

#include "lif/lif.h"
#include "lif/neuron.h"

namespace spk {
namespace SPK_ISA {

// Row loops are shared by all element types and variants of the walk around them; inlined, they compile for minutes.
#define SPK_NOINLINE __attribute__((noinline))

constexpr int kLifUnroll = 4;       // time steps that a row loop carries through registers
constexpr int kLine = 64;           // bytes
constexpr int kFetch = 16 * kLine;  // how far ahead of its work a row loop fetches its rows, in bytes

// One step back from a row of h. g_v comes in as the gradient of v[t] and goes out as that of v[t-1]; g is left holding
// that of h[t].
template <class A>
using LifStepBack = void(const A* h, const A* g_s, const A* g_h, A* g_v, A* g, A* g_x, const A* decay, const A* gain, Neuron<A> c,
                         A a, A b, int n);
LifStepBack<float>* lif_step_back(const LifNeuron& p, bool detach, int surrogate, float);
LifStepBack<double>* lif_step_back(const LifNeuron& p, bool detach, int surrogate, double);

namespace {

template <class A>
Neuron<A> constants(const LifNeuron& p) {
  const A threshold = A(p.threshold);
  const A above = sizeof(A) == 4 ? A(nextafterf(float(threshold), INFINITY)) : A(nextafter(double(threshold), INFINITY));
  // Nothing lies above infinity, and no potential is >= NaN.
  return {A(p.rest), !p.strict ? threshold : above > threshold ? above : A(NAN), threshold, A(p.reset_by)};
}

template <class A>
void fill_row(A* d, A value, int n) {
  for (int i = 0; i < n; ++i) d[i] = value;
}
template <class A>
void add_row(A* __restrict__ d, const A* __restrict__ s, int n) {
  for (int i = 0; i < n; ++i) d[i] += s[i];
}
template <class A>
void reset_row(A* __restrict__ v, const A* __restrict__ h, bool hard, const Neuron<A> c, int n) {
  if (hard)
    for (int i = 0; i < n; ++i) v[i] = reset(h[i], true, c);
  else
    for (int i = 0; i < n; ++i) v[i] = reset(h[i], false, c);
}

// The processor takes a read for one of a pending write whose address has the same lowest 12 bits, and waits for it. So
// rows of which the written one is so a few lines ahead of the one read are walked down, from their ends to their starts,
// and those where it is a few behind up. Tensors allocated one after another often are. Positive: down, negative: up, the
// more the nearer.
constexpr int kNearest = 8;
inline int direction(const void* read, const void* written) {
  const int lines = int((reinterpret_cast<uintptr_t>(written) - reinterpret_cast<uintptr_t>(read)) / kLine % 64);
  return lines >= 1 && lines <= kNearest ? kNearest + 1 - lines : lines >= 64 - kNearest ? 63 - kNearest - lines : 0;
}
// That of kLifUnroll rows of each, summed.
template <class T>
int direction(const void* read, int64_t read_step, const void* written, int64_t write_step) {
  int sum = 0;
  for (int r = 0; read && r < kLifUnroll; ++r)
    for (int w = 0; w < kLifUnroll; ++w)
      sum += direction(static_cast<const T*>(read) + r * read_step, static_cast<const T*>(written) + w * write_step);
  return sum;
}
// A row, or (mask 0) one line that stands for a row of equal numbers, or for one that nobody reads.
template <class A>
struct RowOrLine {
  A* data;
  int64_t mask;
  RowOrLine(A* row, bool one) : data(row), mask(one ? 0 : -1) {}
  RowOrLine from(int j) const { return {data + (j & mask), !mask}; }
  A* line(int64_t first) const { return data + (first & mask); }
};

// body(first, lane, lines) for the n neurons of a row, W lines at a time: for the lane-th neuron of each of the lines from
// `first` on (std::integral_constant; a last odd line and the rest come singly). Before each whole line: ahead(its first neuron).
template <class A, int W = 1, class Body, class Ahead>
inline __attribute__((always_inline)) void by_lines(int n, bool down, const Body& body, const Ahead& ahead) {
  constexpr int kStep = kLine / int(sizeof(A)), kBlock = W * kStep;
  const int blocks = n / kBlock;
  const int64_t step = down ? -kBlock : kBlock;
  int64_t first = down ? (blocks - 1) * kBlock : 0;
  for (int left = blocks; left > 0; --left, first += step) {
    for (int w = 0; w < W; ++w) ahead(first + w * kStep);
#pragma GCC ivdep
    for (int lane = 0; lane < kStep; ++lane) body(first, lane, std::integral_constant<int, W>());
  }
  for (int i = blocks * kBlock; i < n; ++i) {
    __asm__ volatile("");  // a vectorised copy of so short a loop would only be code
    body(i / kStep * kStep, i % kStep, std::integral_constant<int, 1>());
  }
}

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
