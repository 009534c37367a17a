// The CPU kernels of selective_scan_2d against plain loops, without torch or Python.
// usage: selective_scan_2d_check [random cases]; prints one line per failure, exits 1 after any.
#include "check.h"
#include "selective_scan_2d/selective_scan_2d.h"

namespace {

struct Kernels {
  Isa isa;
  SelectiveScan2dFwdFn* fwd;
  SelectiveScan2dBwdFn* bwd;
};

#define SPK_ROW(name) {Isa::name, name::selective_scan_2d_fwd, name::selective_scan_2d_bwd},
#ifdef SPK_CHECK_ONLY  // one instruction set of several
const Kernels kKernels[] = {SPK_ROW(SPK_CHECK_ONLY)};
#else
const Kernels kKernels[] = {SPK_EACH_ISA(SPK_ROW)};
#endif

void check(const Kernels& kernels, int number) {
  const DType dtype = DType(number % 4), state = dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t B = 1 + below(2), C = coin() ? 1 + below(20) : 60 + below(20), H = 1 + below(9), W = 1 + below(20), L = H * W;
  const int64_t K = 1 + below(4), S = coin() ? 1 : coin() ? 1 + below(5) : 1 + below(40), groups = (C + kCpuGroup - 1) / kCpuGroup;
  const bool softplus = coin(), with_D = coin(), with_bias = coin();
  Array x(dtype, B * C * L), delta(dtype, B * K * C * L), into(dtype, B * K * S * L), out_of(dtype, B * K * S * L),
      g_y(dtype, B * C * L), A(state, K * C * S), D(state, K * C), bias(state, K * C), y(dtype, B * C * L), g_x(dtype, B * C * L),
      g_delta(dtype, B * K * C * L), g_A(state, B * K * C * S), g_into(state, B * groups * K * S * L),
      g_out(state, B * groups * K * S * L), g_D(state, B * K * C), g_bias(state, B * K * C);
  for (Array* t : {&x, &into, &out_of, &g_y, &D}) t->fill(-1, 1, false);
  delta.fill(softplus ? -2 : 0, 1, false);
  bias.fill(0, 0.5, false);
  A.fill(-1, -0.1, false);
  SelectiveScan2d p{dtype,
                    B,
                    C,
                    H,
                    W,
                    int32_t(K),
                    int32_t(S),
                    {},
                    softplus,
                    x.data(),
                    delta.data(),
                    A.data(),
                    into.data(),
                    out_of.data(),
                    with_D ? D.data() : nullptr,
                    with_bias ? bias.data() : nullptr};
  for (int64_t k = 0; k < K; ++k) p.directions[k] = int32_t(below(6));
  char line[200];
  snprintf(line, sizeof line, "%s %s B=%d C=%d H=%d W=%d K=%d S=%d softplus=%d D=%d bias=%d first direction %d",
           kIsaNames[int(kernels.isa)], name_of(dtype), int(B), int(C), int(H), int(W), int(K), int(S), softplus, with_D, with_bias,
           p.directions[0]);
  context = line;

  Numbers wy(size_t(B * C * L)), wg_x(wy), wg_delta(size_t(B * K * C * L)), wg_A(size_t(B * K * C * S)),
      wg_into(size_t(B * groups * K * S * L)), wg_out(wg_into), wg_D(size_t(B * K * C)), wg_bias(wg_D);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; ++c) {
        const int64_t bk = b * K + k, bkc = bk * C + c, kc = k * C + c, map = (b * C + c) * L;
        const int64_t partial = ((b * groups + c / kCpuGroup) * K + k) * S * L;
        Numbers h(size_t((L + 1) * S)), dt(size_t(L), 0.0), slope(dt), g_h(size_t(S), 0.0);
        for (int64_t l = 0; l < L; ++l) {
          const int64_t at = walk_place(p.directions[k], int32_t(l), int32_t(H), int32_t(W));
          const double z = delta[bkc * L + at] + (with_bias ? bias[kc] : 0), u = x[map + at];
          dt[size_t(l)] = softplus ? log1p(exp(z)) : z;
          slope[size_t(l)] = softplus ? 1 / (1 + exp(-z)) : 1;
          double sum = with_D ? D[kc] * u : 0;
          for (int64_t s = 0; s < S; ++s) {
            const double before = h[size_t(l * S + s)];
            const double now = exp(dt[size_t(l)] * A[kc * S + s]) * before + dt[size_t(l)] * u * into[(bk * S + s) * L + at];
            h[size_t((l + 1) * S + s)] = now;
            sum += now * out_of[(bk * S + s) * L + at];
          }
          wy[size_t(map + at)] += sum;
        }
        for (int64_t l = L - 1; l >= 0; --l) {
          const int64_t at = walk_place(p.directions[k], int32_t(l), int32_t(H), int32_t(W));
          const double g = g_y[map + at], u = x[map + at], t = dt[size_t(l)];
          double g_t = 0, g_u = with_D ? D[kc] * g : 0;
          for (int64_t s = 0; s < S; ++s) {
            const double a = exp(t * A[kc * S + s]), b_s = into[(bk * S + s) * L + at];
            const double total = g_h[size_t(s)] + g * out_of[(bk * S + s) * L + at], through = total * a * h[size_t(l * S + s)];
            wg_out[size_t(partial + s * L + at)] += g * h[size_t((l + 1) * S + s)];
            wg_into[size_t(partial + s * L + at)] += total * t * u;
            wg_A[size_t(bkc * S + s)] += t * through;
            g_t += A[kc * S + s] * through + total * b_s * u;
            g_u += total * b_s * t;
            g_h[size_t(s)] = total * a;
          }
          wg_x[size_t(map + at)] += g_u;
          wg_delta[size_t(bkc * L + at)] = g_t * slope[size_t(l)];
          wg_bias[size_t(bkc)] += g_t * slope[size_t(l)];
          wg_D[size_t(bkc)] += g * u;
        }
      }

  const SelectiveScan2dFwd forward{p, y.data(), nullptr};
  run(kernels.fwd, forward, B * ((C + 15) / 16));
  const SelectiveScan2dBwd backward{p,
                                    g_y.data(),
                                    g_x.data(),
                                    g_delta.data(),
                                    g_A.data(),
                                    g_into.data(),
                                    g_out.data(),
                                    with_D ? g_D.data() : nullptr,
                                    with_bias ? g_bias.data() : nullptr,
                                    nullptr,
                                    nullptr};
  run(kernels.bwd, backward, B * groups);
  close("y", y, wy, state, 64);
  close("g_x", g_x, wg_x, state, 64);
  close("g_delta", g_delta, wg_delta, state, 64);
  close("g_A", g_A, wg_A, state, 64);
  close("g_B", g_into, wg_into, state, 64);
  close("g_C", g_out, wg_out, state, 64);
  if (with_D) close("g_D", g_D, wg_D, state, 64);
  if (with_bias) close("g_bias", g_bias, wg_bias, state, 64);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 200;
  Isa usable[4];
  const int n = usable_isas(usable);
#ifndef SPK_CHECK_ONLY
  for (const Kernels& k : kKernels)  // what the extension itself would run
    if (k.isa == chosen_isa() && (selective_scan_2d_fwd_cpu() != k.fwd || selective_scan_2d_bwd_cpu() != k.bwd)) {
      context = "dispatch";
      fail("isa", static_cast<int>(k.isa), 0, 1);
    }
#endif
  int checked = 0;
  std::string names;
  for (const Kernels& k : kKernels) {
    if (std::find(usable, usable + n, k.isa) == usable + n) continue;
    random_state = 1;
    for (int i = 0; i < cases; ++i) check(k, i);
    names += std::string(checked++ ? ", " : "") + kIsaNames[static_cast<int>(k.isa)];
  }
  printf("selective_scan_2d_check: %d random cases on %s: %d failures\n", cases, names.c_str(), failures);
  return failures ? 1 : 0;
}
