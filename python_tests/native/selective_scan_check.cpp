// The CPU kernels of selective_scan against plain loops in double, without torch or Python.
// usage: selective_scan_check [random cases]; prints one line per failure, exits 1 after any.
#include "check.h"
#include "selective_scan/selective_scan.h"

namespace {

struct Kernels {
  Isa isa;
  SelectiveScanFwdFn* fwd;
  SelectiveScanBwdFn* bwd;
  SelectiveScanReduceFn* reduce;
};

#define SPK_ROW(name) {Isa::name, name::selective_scan_fwd, name::selective_scan_bwd, name::selective_scan_reduce},
#ifdef SPK_CHECK_ONLY  // one instruction set of several
const Kernels kKernels[] = {SPK_ROW(SPK_CHECK_ONLY)};
#else
const Kernels kKernels[] = {SPK_EACH_ISA(SPK_ROW)};
#endif

double sigmoid(double x) { return 1 / (1 + exp(-x)); }

// Sequences of L numbers, `step` apart: [n, L].
struct Rows {
  int64_t L, step;
  Array data;
  Rows(DType dtype, int64_t n, int64_t L, int64_t gap) : L(L), step(L + gap), data(dtype, n * step - gap) {}
  double at(int64_t row, int64_t l) const { return data[row * step + l]; }
};

void check(const Kernels& k, int number) {
  const DType dtype = DType(number % 4), state = dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t B = 1 + below(2), G = 1 + below(3), each = coin() ? 1 + below(20) : 1 + below(70), C = G * each;
  const int64_t S = 1 + below(coin() ? 3 : 12), L = 1 + below(coin() ? 20 : 150);
  const bool softplus = coin(), with_z = coin(), with_D = coin(), with_bias = coin(), init = coin(), with_g = below(4) != 0,
             with_last = !with_g || coin();
  Rows u(dtype, B * C, L, below(3)), delta(dtype, B * C, L, below(3)), z(dtype, B * C, L, below(3)), g_y(dtype, B * C, L, below(3));
  Rows Bs(dtype, B * G * S, L, below(3)), Cs(dtype, B * G * S, L, below(3));
  Array A(state, C * S), D(state, C), bias(state, C), h_init(state, B * C * S), g_last(state, B * C * S);
  for (Array* t : {&u.data, &z.data, &g_y.data, &Bs.data, &Cs.data, &D, &h_init, &g_last}) t->fill(-1, 1, false);
  delta.data.fill(softplus ? -2 : 0, 1, false);
  bias.fill(0, 0.5, false);
  A.fill(-1.5, -0.1, false);
  const auto rows = [&](Rows& r, bool given = true) { return ScanRows{given ? r.data.data() : nullptr, C * r.step, r.step}; };
  const auto matrix = [&](Rows& r) { return ScanMatrix{r.data.data(), G * S * r.step, S * r.step, r.step}; };
  const SelectiveScan p{dtype,
                        B,
                        C,
                        L,
                        G,
                        S,
                        softplus,
                        rows(u),
                        rows(delta),
                        rows(z, with_z),
                        matrix(Bs),
                        matrix(Cs),
                        A.data(),
                        with_D ? D.data() : nullptr,
                        with_bias ? bias.data() : nullptr,
                        init ? h_init.data() : nullptr};
  char line[240];
  snprintf(line, sizeof line, "%s %s B=%d C=%d L=%d G=%d S=%d softplus=%d z=%d D=%d bias=%d h_init=%d g_y=%d g_last=%d",
           kIsaNames[int(k.isa)], name_of(dtype), int(B), int(C), int(L), int(G), int(S), softplus, with_z, with_D, with_bias, init,
           with_g, with_last);
  context = line;

  Numbers y(size_t(B * C * L)), last(size_t(B * C * S)), g_u(y), g_delta(y), g_z(y), g_init(last), g_A(size_t(C * S)),
      g_B(size_t(B * G * S * L)), g_C(g_B), g_D(size_t(B * C)), g_bias(g_D);
  for (int64_t row = 0; row < B * C; ++row) {
    const int64_t c = row % C, group = row / C * G + c / each;
    Numbers h(size_t((L + 1) * S)), raw(static_cast<size_t>(L)), dt(raw), slope(raw), g_h(size_t(S), 0.0);
    const auto in = [&](int64_t s, int64_t l) { return Bs.at(group * S + s, l); };
    const auto out = [&](int64_t s, int64_t l) { return Cs.at(group * S + s, l); };
    for (int64_t s = 0; s < S; ++s) {
      h[size_t(s)] = init ? h_init[row * S + s] : 0;
      g_h[size_t(s)] = with_last ? g_last[row * S + s] : 0;
    }
    for (int64_t l = 0; l < L; ++l) {
      const size_t i = size_t(l);
      const double d = delta.at(row, l) + (with_bias ? bias[c] : 0), x = u.at(row, l);
      dt[i] = softplus ? log1p(exp(d)) : d;
      slope[i] = softplus ? sigmoid(d) : 1;
      raw[i] = with_D ? D[c] * x : 0;
      for (int64_t s = 0; s < S; ++s) {
        const double now = exp(dt[i] * A[c * S + s]) * h[size_t(l * S + s)] + dt[i] * x * in(s, l);
        h[size_t((l + 1) * S + s)] = now;
        raw[i] += now * out(s, l);
      }
      y[size_t(row * L + l)] = raw[i] * (with_z ? z.at(row, l) * sigmoid(z.at(row, l)) : 1);
    }
    for (int64_t l = L - 1; l >= 0; --l) {
      const size_t i = size_t(l), at = size_t(row * L + l);
      double g = with_g ? g_y.at(row, l) : 0;
      if (with_z) {
        const double x = z.at(row, l), gate = sigmoid(x);
        g_z[at] = g * raw[i] * gate * (1 + x * (1 - gate));
        g *= x * gate;
      }
      double g_t = 0, g_x = with_D ? D[c] * g : 0;
      for (int64_t s = 0; s < S; ++s) {
        const size_t cell = size_t((group * S + s) * L + l);
        const double a = exp(dt[i] * A[c * S + s]), total = g_h[size_t(s)] + g * out(s, l),
                     through = total * a * h[size_t(l * S + s)];
        g_C[cell] += g * h[size_t((l + 1) * S + s)];
        g_B[cell] += total * dt[i] * u.at(row, l);
        g_A[size_t(c * S + s)] += dt[i] * through;
        g_t += A[c * S + s] * through + total * in(s, l) * u.at(row, l);
        g_x += total * in(s, l) * dt[i];
        g_h[size_t(s)] = total * a;
      }
      g_u[at] = g_x;
      g_delta[at] = g_t * slope[i];
      g_bias[size_t(row)] += g_delta[at];
      g_D[size_t(row)] += g * u.at(row, l);
    }
    for (int64_t s = 0; s < S; ++s) {
      last[size_t(row * S + s)] = h[size_t(L * S + s)];
      g_init[size_t(row * S + s)] = g_h[size_t(s)];
    }
  }

  constexpr double kUlps = 64;
  Array got_y(dtype, B * C * L), got_last(state, B * C * S);
  run(k.fwd, SelectiveScanFwd{p, got_y.data(), got_last.data()}, B * G * scan_blocks(p));
  close("y", got_y, y, state, kUlps);
  close("h_last", got_last, last, state, kUlps);

  const int64_t parts = 1 + below(scan_blocks(p));
  Array got_u(dtype, B * C * L), got_delta(dtype, B * C * L), got_z(dtype, B * C * L), got_init(state, B * C * S),
      got_A(DType::f64, B * C * S), got_D(DType::f64, B * C), got_bias(DType::f64, B * C), part_B(state, B * G * parts * S * L),
      part_C(state, B * G * parts * S * L);
  const auto sums = [](Array& x, bool given = true) { return given ? static_cast<double*>(x.data()) : nullptr; };
  run(k.bwd,
      SelectiveScanBwd{p, rows(g_y, with_g), with_last ? g_last.data() : nullptr, got_u.data(), got_delta.data(),
                       with_z ? got_z.data() : nullptr, init ? got_init.data() : nullptr, sums(got_A), sums(got_D, with_D),
                       sums(got_bias, with_bias), part_B.data(), part_C.data(), parts, nullptr},
      B * G * parts);
  close("g_u", got_u, g_u, state, kUlps);
  close("g_delta", got_delta, g_delta, state, kUlps);
  if (with_z) close("g_z", got_z, g_z, state, kUlps);
  if (init) close("g_h_init", got_init, g_init, state, kUlps);
  if (with_D) close("g_D", got_D, g_D, state, kUlps);
  if (with_bias) close("g_bias", got_bias, g_bias, state, kUlps);

  const auto reduced = [&](const char* what, Array& from, int64_t outer, int64_t count, int64_t inner, DType to,
                           const Numbers& want) {
    Array sum(to, outer * inner);
    run(k.reduce, SelectiveScanReduce{from.dtype, to, outer, count, inner, from.data(), sum.data()}, outer * inner);
    close(what, sum, want, state, kUlps);
  };
  reduced("g_A", got_A, 1, B, C * S, state, g_A);
  reduced("g_B", part_B, B * G, parts, S * L, dtype, g_B);
  reduced("g_C", part_C, B * G, parts, S * L, dtype, g_C);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 300;
  Isa usable[4];
  const int n = usable_isas(usable);
#ifndef SPK_CHECK_ONLY
  for (const Kernels& k : kKernels)  // what the extension itself would run
    if (k.isa == chosen_isa() &&
        (selective_scan_fwd_cpu() != k.fwd || selective_scan_bwd_cpu() != k.bwd || selective_scan_reduce_cpu() != k.reduce)) {
      context = "dispatch";
      fail("isa", static_cast<int>(k.isa), 0, 1);
    }
#endif
  for (const Kernels& k : kKernels) {
    if (std::find(usable, usable + n, k.isa) == usable + n) continue;
    const int before = failures;
    random_state = 1;
    for (int i = 0; i < cases; ++i) check(k, i);
    printf("%s: %d failures\n", kIsaNames[static_cast<int>(k.isa)], failures - before);
  }
  return failures ? 1 : 0;
}
