// What lif and other operators whose CPU kernels walk over rows of neurons share.
#pragma once
#include <math.h>

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
// and those where it is a few behind up. Tensors allocated one after another often are a line apart. 1: down, -1: up.
inline int direction(const void* read, const void* written) {
  const int lines = int((reinterpret_cast<uintptr_t>(written) - reinterpret_cast<uintptr_t>(read)) / kLine % 64);
  return lines >= 1 && lines <= 8 ? 1 : lines >= 56 ? -1 : 0;
}
// That of kLifUnroll rows of each: positive where more pairs ask for down.
template <class T>
int direction(const void* read, int64_t read_step, const void* written, int64_t write_step) {
  int sum = 0;
  for (int r = 0; read && r < kLifUnroll; ++r)
    for (int w = 0; w < kLifUnroll; ++w)
      sum += direction(static_cast<const T*>(read) + r * read_step, static_cast<const T*>(written) + w * write_step);
  return sum;
}
// body(i) for the n neurons of a row, a line at a time: ahead(i) before the line from i on.
template <class A, class Body, class Ahead>
inline __attribute__((always_inline)) void by_lines(int n, bool down, const Body& body, const Ahead& ahead) {
  constexpr int kStep = kLine / int(sizeof(A));
  const int lines = n / kStep;
  const int64_t step = down ? -kStep : kStep;
  int64_t first = down ? (lines - 1) * kStep : 0;
  for (int left = lines; left > 0; --left, first += step) {
    ahead(first);
#pragma GCC ivdep
    for (int i = 0; i < kStep; ++i) body(first + i);
  }
  for (int i = lines * kStep; i < n; ++i) {
    __asm__ volatile("");  // a vectorised copy of so short a loop would only be code
    body(i);
  }
}

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
