// The CPU kernels of bn_lif against plain loops, without torch or Python: for sanitizers, and for machines that can only be
// emulated. usage: bn_lif_check [random cases]; prints one line per failure, exits 1 after any.
#include "bn_lif/bn_lif.h"
#include "check.h"
#include "core/surrogate.h"

namespace {

struct Kernels {
  Isa isa;
  BnStatsFn *stats, *stats_finish;
  BnLifFwdFn* fwd;
  BnLifBwdFn *bwd, *bwd_finish, *bwd_x;
};

#define SPK_ROW(name)                                                                  \
  {Isa::name,        name::bn_stats,          name::bn_stats_finish, name::bn_lif_fwd, \
   name::bn_lif_bwd, name::bn_lif_bwd_finish, name::bn_lif_bwd_x},
#ifdef SPK_CHECK_ONLY  // one instruction set of several
const Kernels kKernels[] = {SPK_ROW(SPK_CHECK_ONLY)};
#else
const Kernels kKernels[] = {SPK_EACH_ISA(SPK_ROW)};
#endif

struct Problem {
  DType dtype;
  int64_t T, outer, C, inner, x_step, r_step;
  bool batch, affine, residual, sum, hard, strict, detach, decay_c, gain_c, init, use_s, use_y;
  double a, decay, gain, threshold, rest, reset_by, eps;

  int64_t N() const { return outer * C * inner; }
  DType state() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
  std::string text(const char* isa) const {
    char line[400];
    snprintf(line, sizeof line,
             "%s %s T=%" PRId64 " outer=%" PRId64 " C=%" PRId64 " inner=%" PRId64 " x_step=%" PRId64
             " batch=%d affine=%d residual=%d sum=%d hard=%d strict=%d detach=%d channels=%d%d init=%d use=%d%d",
             isa, name_of(dtype), T, outer, C, inner, x_step, batch, affine, residual, sum, hard, strict, detach, decay_c, gain_c,
             init, use_s, use_y);
    return line;
  }
};

// Against `exact`, in double: at most twice as far as `plain`, the same loops in the state type, and a few roundings.
// more: what roundings to a half-precision type on the way, or of sums in another order, may add.
void compare(const char* what, const Array& got, const Numbers& plain, const Numbers& exact, DType state, double more) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    largest = std::max(largest, fabs(exact[i]));
    error = std::max(error, fabs(plain[i] - exact[i]));
  }
  const double allowed = 2 * error + 8 * (state == DType::f64 ? 0x1p-52 : 0x1p-23) * largest + more;
  for (int64_t i = 0; i < got.n; ++i)
    if (!(fabs(got[i] - exact[size_t(i)]) <= allowed)) fail(what, i, got[i], exact[size_t(i)]);
}

template <class A>
struct Path {  // of all neurons: currents, potentials before and after the reset
  std::vector<A> y, h, v;
  std::vector<bool> s;
};

struct Gradients {
  Numbers x, residual, weight, bias, decay, gain, v_init;
  double rounding = 0;  // what the roundings of a channel's sums, in double and in any order, may add up to
};

template <class A>
struct Inputs {
  const Problem& p;
  const Array &x, &r, &weight, &bias, &mean, &var, &decay_c, &gain_c, &v_init, &g_s, &g_y;

  int64_t channel(int64_t n) const { return n / p.inner % p.C; }
  A number(const Array& of, bool given, int64_t c, double otherwise) const { return given ? A(of[c]) : A(otherwise); }
  A inverse(int64_t c) const { return A(1.0 / sqrt(var[c] + p.eps)); }
  A scale(int64_t c) const { return number(weight, p.affine, c, 1) * inverse(c); }
  A start(int64_t n) const { return number(v_init, p.init, n, p.rest); }

  // In the state type: the kernels must give these very bits.
  Path<A> walk() const {
    const int64_t N = p.N();
    Path<A> path;
    for (std::vector<A>* of : {&path.y, &path.h, &path.v}) of->resize(size_t(p.T * N));
    path.s.resize(size_t(p.T * N));
    for (int64_t n = 0; n < N; ++n) {
      const int64_t c = channel(n);
      const A rest = A(p.rest), decay = number(decay_c, p.decay_c, c, p.decay), gain = number(gain_c, p.gain_c, c, p.gain);
      A v = start(n);
      for (int64_t t = 0; t < p.T; ++t) {
        const size_t i = size_t(t * N + n);
        A y = (A(x[t * p.x_step + n]) - A(mean[c])) * scale(c) + number(bias, p.affine, c, 0);
        if (p.residual) y = y + A(r[t * p.r_step + n]);
        const A h = (rest + decay * (v - rest)) + gain * y;
        const bool s = p.strict ? h > A(p.threshold) : h >= A(p.threshold);
        v = p.hard ? (s ? rest : h) : s ? h - A(p.reset_by) : h;
        path.y[i] = y, path.h[i] = h, path.v[i] = v, path.s[i] = s;
      }
    }
    return path;
  }

  // The gradients along that path, in arithmetic of type B; sums in double.
  template <class B>
  Gradients back(const Path<A>& path) const {
    const int64_t N = p.N();
    const size_t all = size_t(p.T * N), channels = size_t(p.C);
    Gradients g{Numbers(all),      Numbers(all),      Numbers(channels), Numbers(channels),
                Numbers(channels), Numbers(channels), Numbers(size_t(N))};
    Numbers products(channels), sizes(channels);
    for (int64_t n = 0; n < N; ++n) {
      const int64_t c = channel(n);
      const B decay = B(number(decay_c, p.decay_c, c, p.decay)), gain = B(number(gain_c, p.gain_c, c, p.gain)), a = B(A(p.a));
      B next = 0;
      for (int64_t t = p.T - 1; t >= 0; --t) {
        const size_t i = size_t(t * N + n);
        const B h = B(path.h[i]), k = B(1.5707963267948966) * a * B(path.h[i] - A(p.threshold));
        const B sg = a / 2 / (1 + k * k), gs = p.use_s ? B(g_s[int64_t(i)]) : 0;
        const B jump = p.detach ? 0 : p.hard ? B(A(p.rest)) - h : -B(A(p.reset_by));
        const B gh = gs * sg + (p.hard && path.s[i] ? 0 : next) + next * jump * sg;
        const B to_y = gain * gh + (p.use_y ? B(g_y[int64_t(i)]) : 0);
        const B product = to_y * (B(x[t * p.x_step + n]) - B(A(mean[c])));
        const B of_decay = gh * (B(t ? path.v[size_t((t - 1) * N + n)] : start(n)) - B(A(p.rest))), of_gain = gh * B(path.y[i]);
        g.residual[i] = double(to_y);
        g.bias[size_t(c)] += double(to_y);
        products[size_t(c)] += double(product);
        g.decay[size_t(c)] += double(of_decay);
        g.gain[size_t(c)] += double(of_gain);
        for (B term : {to_y, product, of_decay, of_gain}) sizes[size_t(c)] += fabs(double(term));
        next = decay * gh;
      }
      g.v_init[size_t(n)] = double(next);
    }
    const double count = double(p.T) * double(N / p.C);
    for (int64_t c = 0; c < p.C; ++c) {
      g.weight[size_t(c)] = products[size_t(c)] * double(inverse(c));
      g.rounding = std::max(g.rounding, count * 0x1p-53 * sizes[size_t(c)] * std::max(1.0, double(inverse(c))));
    }
    for (int64_t n = 0; n < N; ++n) {
      const int64_t c = channel(n);
      const B mean_g = B(g.bias[size_t(c)] / count), slope = B(g.weight[size_t(c)] * double(inverse(c)) / count);
      for (int64_t t = 0; t < p.T; ++t) {
        const size_t i = size_t(t * N + n);
        const B to_y = B(g.residual[i]);
        const B to_x = p.batch ? (to_y - mean_g) - (B(x[t * p.x_step + n]) - B(A(mean[c]))) * slope : to_y;
        g.x[i] = double(B(scale(c)) * to_x);
      }
    }
    return g;
  }
};

// Mean and var of x by the kernels that take them apart from forward (layouts that are no maps).
void take_stats(const Kernels& k, const Problem& p, Array& x, Array& mean, Array& var) {
  BnStats of{{p.dtype, p.x_step ? p.T : 1, p.N(), p.C, p.inner}, p.x_step, x.data(), mean.data(), var.data(), nullptr, 0, false};
  of.parts = bn_units(of.shape);
  std::vector<double> sums(size_t(2 * of.parts * p.C), NAN);
  of.sums = sums.data();
  for (int pass = 0; pass < (p.dtype == DType::f64 ? 2 : 1); ++pass) {
    of.again = pass > 0;
    run(k.stats, of, of.parts);
    run(k.stats_finish, of, p.C);
  }
}

void check_stats(const Problem& p, const Array& x, const Array& mean, const Array& var) {
  const double count = double(p.T) * double(p.N() / p.C), eps = p.dtype == DType::f64 ? 0x1p-48 : 0x1p-22;
  Numbers sums(size_t(p.C)), squares(size_t(p.C));
  const auto each = [&](auto f) {
    for (int64_t n = 0; n < p.N(); ++n)
      for (int64_t t = 0; t < p.T; ++t) f(size_t(n / p.inner % p.C), x[t * p.x_step + n]);
  };
  each([&](size_t c, double v) { sums[c] += v / count; });
  each([&](size_t c, double v) { squares[c] += (v - sums[c]) * (v - sums[c]) / count; });
  for (int64_t c = 0; c < p.C; ++c) {
    if (!(fabs(mean[c] - sums[size_t(c)]) <= eps * 4)) fail("mean", c, mean[c], sums[size_t(c)]);
    if (!(fabs(var[c] - squares[size_t(c)]) <= eps * 16)) fail("var", c, var[c], squares[size_t(c)]);
  }
}

template <class A>
void check(const Kernels& k, const Problem& p) {
  context = p.text(kIsaNames[static_cast<int>(k.isa)]);
  const DType state = p.state();
  const int64_t N = p.N(), TN = p.T * N;
  Array x(p.dtype, p.x_step * (p.T - 1) + N), r(p.dtype, p.residual ? p.r_step * (p.T - 1) + N : 0);
  Array weight(state, p.C), bias(state, p.C), mean(state, p.C), var(state, p.C), decay_c(state, p.C), gain_c(state, p.C),
      v_init(state, N), g_s(p.dtype, TN), g_y(p.dtype, TN);
  x.fill(-1, 3, false);
  r.fill(-1, 1, false);
  weight.fill(0.5, 2, false);
  bias.fill(-0.5, 1, false);
  decay_c.fill(0.2, 0.95, false);
  gain_c.fill(0.5, 1.1, false);
  v_init.fill(-0.5, 0.9, false);
  g_s.fill(-1, 1, false);
  g_y.fill(-1, 1, false);
  if (!p.batch) {
    mean.fill(-1, 1, false);
    var.fill(0.2, 2, false);
  }
  const BnShape shape{p.dtype, p.T, N, p.C, p.inner};
  const bool maps = bn_maps(shape);
  const int64_t units = bn_units(shape);
  if (p.batch && !maps) take_stats(k, p, x, mean, var);

  const BnNorm norm{mean.data(), var.data(), p.affine ? weight.data() : nullptr, p.affine ? bias.data() : nullptr, p.eps};
  const LifNeuron neuron{p.decay,
                         p.gain,
                         p.decay_c ? decay_c.data() : nullptr,
                         p.gain_c ? gain_c.data() : nullptr,
                         p.C,
                         p.inner,
                         p.threshold,
                         p.rest,
                         p.reset_by,
                         p.hard,
                         p.strict};
  Array s(p.dtype, TN), y(p.dtype, p.sum ? TN : 0);
  const void* const residual = p.residual ? r.data() : nullptr;
  const void* const init = p.init ? v_init.data() : nullptr;
  run(k.fwd,
      BnLifFwd{shape, norm, neuron, p.x_step, p.r_step, x.data(), residual, init, s.data(), y.data(), p.batch && maps, nullptr},
      units);
  if (p.batch) check_stats(p, x, mean, var);

  const Inputs<A> inputs{p, x, r, weight, bias, mean, var, decay_c, gain_c, v_init, g_s, g_y};
  const Path<A> path = inputs.walk();
  for (int64_t i = 0; i < TN; ++i) {
    if (s[i] != double(path.s[size_t(i)])) fail("s", i, s[i], path.s[size_t(i)]);
    if (!p.sum) continue;
    const double want = double(path.y[size_t(i)]), as_stored = is_half(p.dtype) ? rounded(want, format_of(p.dtype)) : want;
    if (!same(y[i], as_stored)) fail("y", i, y[i], as_stored);
  }

  const bool want_r = p.residual && coin();
  Array g_x(p.dtype, TN), g_r(p.dtype, want_r ? TN : 0), g_weight(state, p.C), g_bias(state, p.C),
      g_decay(state, p.decay_c ? p.C : 0), g_gain(state, p.gain_c ? p.C : 0), g_init(state, p.init ? N : 0);
  std::vector<double> sums(size_t(maps ? 0 : kBnSums * units * p.C), NAN);
  void* const g = want_r ? g_r.data() : p.batch ? g_x.data() : nullptr;
  const BnLifBwd bwd{shape,
                     norm,
                     neuron,
                     p.x_step,
                     p.r_step,
                     x.data(),
                     residual,
                     init,
                     p.use_s ? g_s.data() : nullptr,
                     p.use_y ? g_y.data() : nullptr,
                     g,
                     g_x.data(),
                     g_init.data(),
                     g_weight.data(),
                     g_bias.data(),
                     g_decay.data(),
                     g_gain.data(),
                     p.batch,
                     p.detach,
                     static_cast<int32_t>(Surrogate::atan),
                     p.a,
                     0,
                     sums.data(),
                     units,
                     nullptr,
                     0,
                     nullptr};
  run(k.bwd, bwd, units);
  if (!maps) {
    run(k.bwd_finish, bwd, p.C);
    if (p.batch) run(k.bwd_x, bwd, units);
  }

  const Gradients plain = inputs.template back<A>(path), exact = inputs.template back<double>(path);
  double largest = 0, widest = 1;
  for (double v : exact.residual) largest = std::max(largest, fabs(v));
  for (int64_t c = 0; c < p.C; ++c) widest = std::max(widest, fabs(double(inputs.scale(c))));
  // g itself is stored in x's type before g_x is made of it, and g_x once more.
  const double half = is_half(p.dtype) ? ldexp(1, -format_of(p.dtype).mantissa) * largest * widest : 0;
  compare("g_x", g_x, plain.x, exact.x, state, 2 * half + exact.rounding * widest);
  compare("g_residual", g_r, plain.residual, exact.residual, state, half);
  compare("g_weight", g_weight, plain.weight, exact.weight, state, exact.rounding);
  compare("g_bias", g_bias, plain.bias, exact.bias, state, exact.rounding);
  compare("g_decay", g_decay, plain.decay, exact.decay, state, exact.rounding);
  compare("g_gain", g_gain, plain.gain, exact.gain, state, exact.rounding);
  compare("g_v_init", g_init, plain.v_init, exact.v_init, state, 0);
}

void check(const Kernels& k, const Problem& p) { p.dtype == DType::f64 ? check<double>(k, p) : check<float>(k, p); }

Problem random_problem(int number) {
  const int64_t inners[] = {1, 2, 5, 31, 32, 33, 64, 100, 1500}, channels[] = {1, 2, 3, 7, 16, 40, 300, 1100},
                Ts[] = {1, 2, 3, 4, 5, 8, 17};
  Problem p;
  p.dtype = static_cast<DType>(number % 4);
  do {
    p.inner = inners[below(9)];
    p.C = channels[below(8)];
    p.outer = 1 + below(5);
    p.T = Ts[below(7)];
  } while (p.T * p.N() > 30000 || p.T * p.outer * p.inner < 2);
  p.x_step = below(6) == 0 ? 0 : p.N() + (coin() ? below(40) : 0);
  p.r_step = below(4) == 0 ? 0 : p.N();
  for (bool* of : {&p.batch, &p.affine, &p.residual, &p.sum, &p.hard, &p.strict, &p.detach, &p.decay_c, &p.gain_c, &p.init})
    *of = coin();
  p.use_s = below(8) != 0;
  p.use_y = p.sum && coin();
  p.a = uniform(0.5, 4);
  p.decay = uniform(0.2, 0.95);
  p.gain = uniform(0.5, 1.1);
  p.threshold = uniform(0.5, 1.2);
  p.rest = p.hard && coin() ? uniform(-0.3, 0.3) : 0;
  p.reset_by = p.hard ? 0 : uniform(0.3, 1.2);
  p.eps = 1e-5;
  return p;
}

// Outputs beyond the size from which they bypass the caches: a map, and channels side by side.
void check_streamed(const Kernels& k, int64_t C, int64_t inner) {
  Problem p = random_problem(0);
  p.dtype = DType::f32;
  p.T = 4;
  p.C = C;
  p.inner = inner;
  p.outer = (1 << 19) / (C * inner) + 1;
  p.x_step = p.r_step = p.N();
  check(k, p);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 400;
  Isa usable[4];
  const int n = usable_isas(usable);
#ifndef SPK_CHECK_ONLY
  for (const Kernels& k : kKernels)  // what the extension itself would run
    if (k.isa == chosen_isa() && (bn_lif_fwd_cpu() != k.fwd || bn_lif_bwd_cpu() != k.bwd || bn_stats_cpu() != k.stats)) {
      context = "dispatch";
      fail("isa", static_cast<int>(k.isa), 0, 1);
    }
#endif
  int checked = 0;
  std::string names;
  for (const Kernels& k : kKernels) {
    if (std::find(usable, usable + n, k.isa) == usable + n) continue;
    random_state = 1;
    for (int i = 0; i < cases; ++i) check(k, random_problem(i));
    check_streamed(k, 3, 4096);
    check_streamed(k, 96, 1);
    names += std::string(checked++ ? ", " : "") + kIsaNames[static_cast<int>(k.isa)];
  }
  printf("bn_lif_check: %d random cases on %s: %d failures\n", cases, names.c_str(), failures);
  return failures ? 1 : 0;
}
