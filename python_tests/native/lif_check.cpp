// The CPU kernels of lif against plain loops, without torch or Python: for sanitizers, and for machines that can only
// be emulated. usage: lif_check [random cases]; prints one line per failure, exits 1 after any.
#include "check.h"
#include "core/surrogate.h"
#include "lif/lif.h"

namespace {

struct Kernels {
  Isa isa;
  LifFwdFn* fwd;
  LifBwdFn* bwd;
  LifReduceFn* reduce;
};

#define SPK_ROW(name) {Isa::name, name::lif_fwd, name::lif_bwd, name::lif_reduce},
#ifdef SPK_CHECK_ONLY  // one instruction set of several
const Kernels kKernels[] = {SPK_ROW(SPK_CHECK_ONLY)};
#else
const Kernels kKernels[] = {SPK_EACH_ISA(SPK_ROW)};
#endif

// ---- one problem, and its solution by plain loops ------------------------------------------------------------------

struct Problem {
  DType dtype;
  int64_t T, N, C, inner, x_step;
  bool hard, strict, detach, per_channel_decay, per_channel_gain, with_init, want_h, want_v, packed, extreme, grid;
  Surrogate surrogate;
  double a, b, decay, gain, threshold, rest, reset_by;

  DType state() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
  LifNeuron neuron(Array& decay_c, Array& gain_c) const {
    return {decay,
            gain,
            per_channel_decay ? decay_c.data() : nullptr,
            per_channel_gain ? gain_c.data() : nullptr,
            C,
            inner,
            threshold,
            rest,
            reset_by,
            hard,
            strict};
  }
  std::string text(const char* isa) const {
    char line[400];
    snprintf(line, sizeof line,
             "%s %s T=%" PRId64 " N=%" PRId64 " C=%" PRId64 " inner=%" PRId64 " x_step=%" PRId64
             " hard=%d strict=%d detach=%d channels=%d%d init=%d h=%d v=%d packed=%d surrogate=%d",
             isa, name_of(dtype), T, N, C, inner, x_step, hard, strict, detach, per_channel_decay, per_channel_gain, with_init,
             want_h, want_v, packed, static_cast<int>(surrogate));
    return line;
  }
};

// What the derivative of a surrogate is at most, for the tolerance.
double bound(const Problem& p) {
  switch (p.surrogate) {
    case Surrogate::atan: return p.a / 2;
    case Surrogate::sigmoid: return p.a;
    case Surrogate::rectangle:
    case Surrogate::triangle: return 1 / p.a;
    case Surrogate::fast_sigmoid: return 1;
    case Surrogate::erf: return p.a;
    default: return std::max(p.a, p.b);
  }
}

// In double, at a potential of the state type; a and b as the kernels see them.
template <class A>
double derivative(const Problem& p, A u_state) {
  const double u = double(u_state), a = double(A(p.a)), b = double(A(p.b)), pi = 3.14159265358979323846;
  switch (p.surrogate) {
    case Surrogate::atan: return a / 2 / (1 + pow(pi / 2 * a * u, 2));
    case Surrogate::sigmoid: return a / (1 + exp(-a * u)) / (1 + exp(a * u));
    case Surrogate::rectangle: return fabs(u) < a / 2 ? 1 / a : 0;
    case Surrogate::triangle: return std::max(0.0, 1 - fabs(u) / a) / a;
    case Surrogate::fast_sigmoid: return 1 / pow(1 + a * fabs(u), 2);
    case Surrogate::erf: return a / sqrt(pi) * exp(-pow(a * u, 2));
    default: return u >= 0 ? a : b;
  }
}

template <class A>
struct Path {  // potentials of one neuron
  std::vector<A> h, v;
  std::vector<bool> s;
};

// The formulas in the state type: the kernels must give these very bits (NaN where NaN).
template <class A>
Path<A> walk(const Problem& p, const Array& x, int64_t n, A decay, A gain, A v) {
  Path<A> path;
  const A rest = A(p.rest), threshold = A(p.threshold), reset_by = A(p.reset_by);
  for (int64_t t = 0; t < p.T; ++t) {
    const A h = (rest + decay * (v - rest)) + gain * A(x[t * p.x_step + n]);
    const bool s = p.strict ? h > threshold : h >= threshold;
    v = p.hard ? (s ? rest : h) : s ? h - reset_by : h;
    path.h.push_back(h);
    path.v.push_back(v);
    path.s.push_back(s);
  }
  return path;
}

void close(const char* what, const Array& got, int64_t i, double want, double tolerance) {
  if (!is_half(got.dtype)) {
    if (!(fabs(got[i] - want) <= tolerance)) fail(what, i, got[i], want);
    return;
  }
  // Anything that a number within the tolerance may round to.
  const Format f = format_of(got.dtype);
  if (!(got[i] >= rounded(want - tolerance, f) && got[i] <= rounded(want + tolerance, f))) fail(what, i, got[i], want);
}

template <class A>
void check(const Kernels& k, const Problem& p) {
  context = p.text(kIsaNames[static_cast<int>(k.isa)]);
  const DType state = p.state();
  Array x(p.dtype, p.x_step * (p.T - 1) + p.N), decay_c(state, p.C), gain_c(state, p.C), v_init(state, p.N);
  x.fill(-1, 3, p.grid);
  decay_c.fill(0.2, 0.95, p.grid);
  gain_c.fill(0.5, 1.1, p.grid);
  v_init.fill(-0.5, 0.9, p.grid);
  if (p.extreme)
    for (int i = 0; i < 8; ++i) x.put(below(x.n), i == 0 ? NAN : i % 2 ? INFINITY : -INFINITY);
  const auto channel = [&](int64_t n) { return n / p.inner % p.C; };
  const auto decay_of = [&](int64_t n) { return p.per_channel_decay ? A(decay_c[channel(n)]) : A(p.decay); };
  const auto gain_of = [&](int64_t n) { return p.per_channel_gain ? A(gain_c[channel(n)]) : A(p.gain); };
  const auto start_of = [&](int64_t n) { return p.with_init ? A(v_init[n]) : A(p.rest); };

  const int64_t TN = p.T * p.N, bit_rows = (p.T + 7) / 8;
  Array s(p.dtype, p.packed ? 0 : TN), v_last(state, p.N), h(state, p.want_h ? TN : 0), v(state, p.want_v ? TN : 0);
  std::vector<uint8_t> bits(size_t(p.packed ? bit_rows * p.N : 0), 0xff);
  void* const s_out = p.packed ? static_cast<void*>(bits.data()) : s.data();
  const LifFwd fwd{p.neuron(decay_c, gain_c),
                   p.dtype,
                   p.T,
                   p.N,
                   p.x_step,
                   x.data(),
                   p.with_init ? v_init.data() : nullptr,
                   s_out,
                   v_last.data(),
                   h.data(),
                   v.data(),
                   p.packed};
  run(k.fwd, fwd, lif_chunks(p.N));

  Array g_s(p.dtype, TN), g_v_last(state, p.N), g_h(state, TN), g_v(state, TN);
  const bool use[4] = {below(8) != 0, coin(), coin(), coin()};
  for (Array* g : {&g_s, &g_v_last, &g_h, &g_v}) g->fill(-1, 1, false);
  const bool want_decay = coin(), want_gain = coin(), want_init = coin();
  Array g_x(p.dtype, TN), g_decay(state, want_decay ? p.N : 0), g_gain(state, want_gain ? p.N : 0),
      g_v_init(state, want_init ? p.N : 0);
  const LifBwd bwd{fwd.neuron,
                   p.dtype,
                   p.T,
                   p.N,
                   p.x_step,
                   x.data(),
                   fwd.v_init,
                   use[0] ? g_s.data() : nullptr,
                   use[1] ? g_v_last.data() : nullptr,
                   use[2] ? g_h.data() : nullptr,
                   use[3] ? g_v.data() : nullptr,
                   g_x.data(),
                   g_decay.data(),
                   g_gain.data(),
                   g_v_init.data(),
                   p.detach,
                   static_cast<int32_t>(p.surrogate),
                   p.a,
                   p.b,
                   nullptr,
                   0};
  run(k.bwd, bwd, lif_chunks(p.N));

  const double eps = double(std::numeric_limits<A>::epsilon());
  for (int64_t n = 0; n < p.N; ++n) {
    if (n > 2000 && n < p.N - 2000 && n % 31) continue;  // a sample of long rows
    const A decay = decay_of(n), gain = gain_of(n), start = start_of(n);
    const Path<A> path = walk<A>(p, x, n, decay, gain, start);
    for (int64_t t = 0; t < p.T; ++t) {
      const int64_t i = t * p.N + n;
      const bool spike = path.s[size_t(t)];
      const double got = p.packed ? (bits[size_t(t / 8 * p.N + n)] >> (t % 8)) & 1 : s[i];
      if (got != double(spike)) fail("s", i, got, spike);
      if (p.want_h && !same(h[i], path.h[size_t(t)])) fail("h", i, h[i], path.h[size_t(t)]);
      if (p.want_v && !same(v[i], path.v[size_t(t)])) fail("v", i, v[i], path.v[size_t(t)]);
    }
    if (p.packed && p.T % 8 && bits[size_t((bit_rows - 1) * p.N + n)] >> (p.T % 8)) fail("unused bits", n, 1, 0);
    if (!same(v_last[n], path.v.back())) fail("v_last", n, v_last[n], path.v.back());
    if (p.extreme) continue;  // gradients of infinite potentials are compared with autograd, elsewhere

    // Backward in double; `m` follows every term without its sign, `error` what their roundings may add up to.
    double g_next = use[1] ? g_v_last[n] : 0, m_next = fabs(g_next), error_next = 0, to_decay = 0, to_gain = 0, error_decay = 0,
           error_gain = 0;
    bool finite = true;
    for (int64_t t = p.T - 1; t >= 0; --t) {
      const int64_t i = t * p.N + n;
      const A ht = path.h[size_t(t)];
      const double sg = derivative<A>(p, ht - A(p.threshold)), sg_error = 8 * eps * (sg + bound(p));
      const double gv = g_next + (use[3] ? g_v[i] : 0), m_gv = m_next + (use[3] ? fabs(g_v[i]) : 0);
      const double jump = p.detach ? 0 : p.hard ? double(A(p.rest)) - double(ht) : -double(A(p.reset_by));
      const bool cut = p.hard && path.s[size_t(t)];
      const double gs = use[0] ? g_s[i] : 0, gh = use[2] ? g_h[i] : 0;
      const double g = gs * sg + (cut ? 0 : gv) + gh + gv * jump * sg;
      const double m = fabs(gs) * sg + (cut ? 0 : m_gv) + fabs(gh) + m_gv * fabs(jump) * sg;
      const double error =
          error_next * ((cut ? 0 : 1) + fabs(jump) * (sg + sg_error)) + 8 * eps * m + sg_error * (fabs(gs) + m_gv * fabs(jump));
      finite = m < 1e30;
      if (!finite) break;  // gradients through the reset may grow without bound
      close("g_x", g_x, i, double(gain) * g, double(gain) * (error + eps * m) + 1e-40);
      const double xt = x[t * p.x_step + n], before = double(t ? path.v[size_t(t - 1)] : start) - double(A(p.rest));
      to_gain += g * xt;
      to_decay += g * before;
      error_gain += (error + eps * m * double(p.T + 4)) * fabs(xt);
      error_decay += (error + eps * m * double(p.T + 4)) * fabs(before);
      g_next = double(decay) * g;
      m_next = double(decay) * m;
      error_next = double(decay) * (error + eps * m);
    }
    if (!finite) continue;
    if (want_init) close("g_v_init", g_v_init, n, g_next, error_next);
    if (want_decay) close("g_decay", g_decay, n, to_decay, error_decay + 1e-40);
    if (want_gain) close("g_gain", g_gain, n, to_gain, error_gain + 1e-40);
  }
}

void check(const Kernels& k, const Problem& p) { p.dtype == DType::f64 ? check<double>(k, p) : check<float>(k, p); }

Problem random_problem(int number) {
  const int64_t Ns[] = {1, 7, 63, 500, 511, 512, 513, 1000, 1537}, Ts[] = {1, 2, 3, 4, 5, 8, 17, 63, 64, 65, 130, 200};
  Problem p;
  p.dtype = static_cast<DType>(number % 4);
  p.surrogate = static_cast<Surrogate>(number / 4 % kSurrogates);
  p.N = Ns[below(9)];
  p.T = Ts[below(12)];
  if (p.N * p.T > 65536) p.T = 17;
  p.C = 1;
  p.inner = p.N;
  p.per_channel_decay = p.per_channel_gain = false;
  if (coin()) {
    // N = batch * C * inner: channels last (inner 1), channels first, or a scalar tensor.
    std::vector<int64_t> divisors;
    for (int64_t d = 1; d <= p.N; ++d)
      if (p.N % d == 0) divisors.push_back(d);
    p.inner = divisors[size_t(below(int64_t(divisors.size())))];
    const int64_t rest = p.N / p.inner;
    p.C = rest % 2 == 0 && coin() ? rest / 2 : rest;
    p.per_channel_decay = coin();
    p.per_channel_gain = !p.per_channel_decay || coin();
  }
  p.x_step = below(6) == 0 ? 0 : p.N + (coin() ? below(40) : 0);
  p.hard = coin();
  p.strict = coin();
  p.detach = coin();
  p.with_init = coin();
  p.packed = below(4) == 0;
  p.want_h = below(4) == 0;
  p.want_v = below(4) == 0;
  p.extreme = below(8) == 0;
  p.a = uniform(0.5, 4);
  p.b = uniform(0.01, 0.2);
  p.decay = uniform(0.2, 0.95);
  p.gain = uniform(0.5, 1.1);
  p.threshold = uniform(0.5, 1.2);
  p.rest = p.hard ? uniform(-0.3, 0.3) : 0;
  p.reset_by = p.hard ? 0 : uniform(0.3, 1.2);
  p.grid = coin();
  if (p.grid) {  // potentials meet the threshold exactly, where strict or not makes the difference
    p.decay = 0.5;
    p.gain = p.threshold = 1;
    p.rest = 0;
    p.reset_by = p.hard ? 0 : 1;
  }
  return p;
}

// Outputs beyond the size from which they bypass the caches, with rows that are aligned, and rows that are not.
void check_streamed(const Kernels& k, DType dtype, int64_t N) {
  Problem p = random_problem(0);
  p.dtype = dtype;
  p.surrogate = Surrogate::rectangle;
  p.T = 5;
  p.N = p.inner = p.x_step = N;
  p.C = 1;
  p.per_channel_decay = p.per_channel_gain = p.packed = p.extreme = false;
  check(k, p);
}

// Every half-precision number read, and every border between two of them written, at all places in a row.
void check_conversions(const Kernels& k, DType dtype) {
  const Format f = format_of(dtype);
  context = std::string(kIsaNames[static_cast<int>(k.isa)]) + " conversions of " + name_of(dtype);
  const int64_t N = 1 << 16;
  Array x(dtype, N), s(dtype, N), h(DType::f32, N), v_last(DType::f32, N);
  for (int64_t i = 0; i < N; ++i) {
    const uint16_t b = uint16_t(i);
    memcpy(x.bytes.get() + 2 * i, &b, 2);
  }
  const LifNeuron neuron{0, 1, nullptr, nullptr, 1, N, 1e30, 0, 0, false, false};
  run(k.fwd, LifFwd{neuron, dtype, 1, N, N, x.data(), nullptr, s.data(), v_last.data(), h.data(), nullptr, false}, lif_chunks(N));
  for (int64_t i = 0; i < N; ++i)
    if (!same(h[i], x[i])) fail("read", i, h[i], x[i]);

  std::vector<float> values;
  for (int i = 0; i < 0x7fff; ++i) {
    const double lo = decode(uint16_t(i), f), hi = decode(uint16_t(i + 1), f);
    if (!isfinite(lo)) break;
    // Past the last finite number, the border to infinity is where the next one would be.
    const float middle = float(isfinite(hi) ? (lo + hi) / 2 : lo + (lo - decode(uint16_t(i - 1), f)) / 2);
    for (float y : {float(lo), nextafterf(middle, 0.f), middle, nextafterf(middle, INFINITY)}) {
      values.push_back(y);
      values.push_back(-y);
    }
  }
  values.insert(values.end(), {INFINITY, -INFINITY, NAN, 3e38f, -3e38f, 1e-45f});
  for (int shift = 0; shift < 2; ++shift) {  // odd, so that vector bodies and tails change places
    const int64_t n = int64_t(values.size());
    Array zero(dtype, n), g_x(dtype, n);
    memset(zero.data(), 0, zero.size());
    const LifBwd p{neuron,
                   dtype,
                   1,
                   n,
                   n,
                   zero.data(),
                   nullptr,
                   nullptr,
                   nullptr,
                   values.data(),
                   nullptr,
                   g_x.data(),
                   nullptr,
                   nullptr,
                   nullptr,
                   true,
                   static_cast<int32_t>(Surrogate::rectangle),
                   1,
                   0,
                   nullptr,
                   0};
    run(k.bwd, p, lif_chunks(n));
    for (int64_t i = 0; i < n; ++i) {
      const double want = rounded(double(values[size_t(i)]), f);
      if (!same(g_x[i], want)) fail("written", i, g_x[i], want);
    }
    values.insert(values.begin(), 3, 1.f);
  }
}

template <class A>
void check_reduce(const Kernels& k, DType dtype, int64_t outer, int64_t C, int64_t inner) {
  char line[120];
  snprintf(line, sizeof line, "%s reduce %s outer=%" PRId64 " C=%" PRId64 " inner=%" PRId64, kIsaNames[static_cast<int>(k.isa)],
           name_of(dtype), outer, C, inner);
  context = line;
  Array in(dtype, outer * C * inner), out(dtype, C);
  in.fill(-1, 2, false);
  run(k.reduce, LifReduce{dtype, in.n, C, inner, in.data(), out.data(), nullptr}, C);
  for (int64_t c = 0; c < C; ++c) {
    double sum = 0, m = 0;
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; ++i) {
        sum += in[(o * C + c) * inner + i];
        m += fabs(in[(o * C + c) * inner + i]);
      }
    close("out", out, c, sum, m * double(outer * inner) * 0x1p-53 + double(std::numeric_limits<A>::epsilon()) * fabs(sum));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 560;
  Isa usable[4];
  const int n = usable_isas(usable);
#ifndef SPK_CHECK_ONLY
  for (const Kernels& k : kKernels)  // what the extension itself would run
    if (k.isa == chosen_isa() && (lif_fwd_cpu() != k.fwd || lif_bwd_cpu() != k.bwd || lif_reduce_cpu() != k.reduce)) {
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
    check_streamed(k, DType::f32, 419840);
    check_streamed(k, DType::f32, 420007);
    check_streamed(k, DType::f64, 209920);
    check_streamed(k, DType::bf16, 419840);
    check_conversions(k, DType::f16);
    check_conversions(k, DType::bf16);
    for (int64_t outer : {1, 3})
      for (int64_t C : {1, 5, 16, 33})
        for (int64_t inner : {1, 15, 16, 100}) {
          check_reduce<float>(k, DType::f32, outer, C, inner);
          check_reduce<double>(k, DType::f64, outer, C, inner);
        }
    names += std::string(checked++ ? ", " : "") + kIsaNames[static_cast<int>(k.isa)];
  }
  printf("lif_check: %d random cases on %s: %d failures\n", cases, names.c_str(), failures);
  return failures ? 1 : 0;
}
