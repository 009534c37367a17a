// The CPU kernels of spiking_self_attention against plain loops in double, without torch. All numbers are dyadic and few,
// so that every sum is exact: results must be the same to the last bit.
#include "check.h"
#include "core/surrogate.h"
#include "spiking_self_attention/spiking_self_attention.h"

namespace {

struct Kernels {
  Isa isa;
  SpikingSelfAttentionFwdFn* fwd;
  SpikingSelfAttentionBwdFn* bwd;
};
#ifdef SPK_CHECK_ONLY
#define ROW(isa) {Isa::isa, isa::spiking_self_attention_fwd, isa::spiking_self_attention_bwd},
const Kernels kKernels[] = {ROW(SPK_CHECK_ONLY)};
#else
#define ROW(isa) {Isa::isa, isa::spiking_self_attention_fwd, isa::spiking_self_attention_bwd},
const Kernels kKernels[] = {SPK_EACH_ISA(ROW)};
#endif
#undef ROW

constexpr double kScale = 0.125, kLeak = 0.5;

// A neuron of decay and gain 1/2 at rest 0: h from x, both [T, n]; its derivative: 1 above the threshold, else kLeak.
Numbers potentials(const Numbers& x, int64_t T, double threshold) {
  const size_t n = x.size() / size_t(T);
  Numbers h(x.size());
  for (size_t i = 0; i < n; ++i) {
    double v = 0;
    for (size_t j = i; j < x.size(); j += n) {
      h[j] = 0.5 * v + 0.5 * x[j];
      v = h[j] >= threshold ? 0 : h[j];
    }
  }
  return h;
}
Numbers fired(const Numbers& h, double threshold) {
  Numbers s;
  for (double x : h) s.push_back(x >= threshold ? 1 : 0);
  return s;
}
Numbers back(const Numbers& h, const Numbers& g_s, int64_t T, double threshold) {
  const size_t n = h.size() / size_t(T);
  Numbers g_x(h.size());
  for (size_t i = 0; i < n; ++i) {
    double g_v = 0;
    for (size_t j = h.size() - n + i;; j -= n) {
      const bool s = h[j] >= threshold;
      const double g = g_s[j] * (s ? 1 : kLeak) + (s ? 0 : g_v);
      g_x[j] = g / 2;
      g_v = g / 2;
      if (j < n) break;
    }
  }
  return g_x;
}

void compare(const char* what, const Array& got, const Numbers& want, int64_t gap) {
  for (size_t i = 0; i < want.size(); ++i) {
    const double w = is_half(got.dtype) ? rounded(want[i], format_of(got.dtype)) : want[i];
    if (!same(got[int64_t(i) * gap], w)) fail(what, int64_t(i), got[int64_t(i) * gap], w);
  }
}

void check(const Kernels& k, int index) {
  const DType dtype = DType(index % 4);
  const bool currents = coin();
  const int64_t T = 1 + below(2), B = 1 + below(2), H = 1 + below(2), D = 1 + below(index % 9 ? 6 : 40);
  const int64_t N = index % 11 ? 1 + below(40) : 250 + below(40);  // chunks are of 256 columns at most
  const int64_t gap = 1 + below(2), n = T * B * H * D * N;         // gap: of the operands' columns
  const double fire_at = index % 3 ? 1 : 0;                        // of the operands: at 0, rest fires
  char line[160];
  snprintf(line, sizeof line, "%s %s currents=%d T=%d B=%d H=%d D=%d N=%d gap=%d", kIsaNames[int(k.isa)], name_of(dtype), currents,
           int(T), int(B), int(H), int(D), int(N), int(gap));
  context = line;
  Array q(dtype, n * gap), key(dtype, n * gap), v(dtype, n * gap), g_out(dtype, n), out(dtype, n), g_q(dtype, n), g_k(dtype, n),
      g_v(dtype, n);
  const auto sequence = [&](Array& x, int64_t step) {
    return Sequence<void*>{x.data(), B * H * D * N * step, H * D * N * step, D * N * step, N * step, step};
  };
  const auto input = [&](Array& x, int64_t step) {
    const Sequence<void*> o = sequence(x, step);
    return SequenceIn{o.data, o.step, o.batch, o.head, o.row, o.column};
  };
  Numbers x[3], h[3], s[3], grad(size_t(n), 0.0);
  Array* const operands[3] = {&q, &key, &v};
  for (int o = 0; o < 3; ++o) {
    for (int64_t i = 0; i < n; ++i) {
      const double value = currents ? double(below(13) - 3 * (fire_at == 0)) / 4 : double(below(3) == 0);
      operands[o]->put(i * gap, value);
      x[o].push_back(value);
    }
    h[o] = currents ? potentials(x[o], T, fire_at) : x[o];
    s[o] = currents ? fired(h[o], fire_at) : x[o];
  }
  for (int64_t i = 0; i < n; ++i) g_out.put(i, grad[size_t(i)] = double(below(9) - 4) / 4);

  const auto neuron = [](double threshold) {
    return AttentionNeuron{
        {0.5, 0.5, nullptr, nullptr, 1, 1, threshold, 0, 0, true, false}, true, int32_t(Surrogate::leaky_relu), 1, kLeak};
  };
  const AttentionShape shape{dtype, false, currents, T, B, H, D, N, kScale};
  run(k.fwd,
      SpikingSelfAttentionFwd{shape, neuron(0.5), neuron(fire_at), input(q, gap), input(key, gap), input(v, gap), sequence(out, 1),
                              nullptr},
      B * H);
  run(k.bwd,
      SpikingSelfAttentionBwd{shape, neuron(0.5), neuron(fire_at), input(q, gap), input(key, gap), input(v, gap), input(g_out, 1),
                              sequence(g_q, 1), sequence(g_k, 1), sequence(g_v, 1), nullptr, nullptr, nullptr, nullptr, nullptr},
      B * H);

  const size_t size = size_t(n);
  Numbers y(size), g[3] = {Numbers(size), Numbers(size), Numbers(size)};
  const auto at = [&](int64_t head, int64_t r, int64_t c) { return size_t((head * D + r) * N + c); };
  Numbers kv(size_t(T * B * H * D * D)), g_kv(kv.size());
  const auto cell = [&](int64_t head, int64_t d, int64_t e) { return size_t((head * D + d) * D + e); };
  for (int64_t i = 0; i < T * B * H; ++i)
    for (int64_t d = 0; d < D; ++d)
      for (int64_t e = 0; e < D; ++e) {
        for (int64_t c = 0; c < N; ++c) kv[cell(i, d, e)] += s[1][at(i, d, c)] * s[2][at(i, e, c)];
        for (int64_t c = 0; c < N; ++c) y[at(i, e, c)] += kScale * s[0][at(i, d, c)] * kv[cell(i, d, e)];
      }
  const Numbers h_y = potentials(y, T, 0.5);
  compare("out", out, fired(h_y, 0.5), 1);
  const Numbers g_u = back(h_y, grad, T, 0.5);
  for (int64_t i = 0; i < T * B * H; ++i)
    for (int64_t d = 0; d < D; ++d)
      for (int64_t e = 0; e < D; ++e) {
        for (int64_t c = 0; c < N; ++c) {
          const double g_y = kScale * g_u[at(i, e, c)];
          g[0][at(i, d, c)] += kv[cell(i, d, e)] * g_y;
          g_kv[cell(i, d, e)] += s[0][at(i, d, c)] * g_y;
        }
        for (int64_t c = 0; c < N; ++c) {
          g[1][at(i, d, c)] += g_kv[cell(i, d, e)] * s[2][at(i, e, c)];
          g[2][at(i, e, c)] += g_kv[cell(i, d, e)] * s[1][at(i, d, c)];
        }
      }
  const Array* const results[3] = {&g_q, &g_k, &g_v};
  const char* const names[3] = {"g_q", "g_k", "g_v"};
  for (int o = 0; o < 3; ++o) compare(names[o], *results[o], currents ? back(h[o], g[o], T, fire_at) : g[o], 1);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 560;
  Isa usable[4];
  const int n = usable_isas(usable);
  int checked = 0;
  std::string names;
  for (const Kernels& k : kKernels) {
    if (std::find(usable, usable + n, k.isa) == usable + n) continue;
    random_state = 1;
    for (int i = 0; i < cases; ++i) check(k, i);
    names += std::string(checked++ ? ", " : "") + kIsaNames[static_cast<int>(k.isa)];
  }
  printf("spiking_self_attention_check: %d random cases on %s: %d failures\n", cases, names.c_str(), failures);
  return failures ? 1 : 0;
}
