// The CPU kernels of qk_attention against plain loops in double, without torch. All numbers are dyadic and few, so that
// every sum is exact: results must be the same to the last bit. usage: qk_attention_check [random cases]
#include "check.h"
#include "core/surrogate.h"
#include "qk_attention/qk_attention.h"

namespace {

struct Kernels {
  Isa isa;
  QkFwdFn* fwd;
  QkBwdFn* bwd;
};
#define SPK_ROW(name) {Isa::name, name::qk_fwd, name::qk_bwd},
#ifdef SPK_CHECK_ONLY  // one instruction set of several
const Kernels kKernels[] = {SPK_ROW(SPK_CHECK_ONLY)};
#else
const Kernels kKernels[] = {SPK_EACH_ISA(SPK_ROW)};
#endif

constexpr int kAll = 400, kLarge = -4;  // index of a case of its own, unless there are to be fewer
constexpr double kLeak = 0.5;           // the surrogate's slope below the threshold; 1 above

struct Neuron {
  double threshold;
  bool hard, strict;
  const double *decay, *gain;  // [H]

  bool fires(double h) const { return strict ? h > threshold : h >= threshold; }
  double after(double h) const { return hard ? (fires(h) ? 0 : h) : h - (fires(h) ? threshold : 0); }
};

struct Shape {
  int64_t T, B, H, R, L;
  int64_t n() const { return T * B * H * R * L; }
  int64_t head(int64_t i, int64_t per_head) const { return i / per_head % H; }
};

// Potentials of neurons fed by x: [T, B, H, per_head].
Numbers potentials(const Neuron& f, const Shape& s, const Numbers& x, int64_t per_head) {
  Numbers h(x.size());
  const int64_t n = s.B * s.H * per_head;
  for (int64_t i = 0; i < n; ++i) {
    double v = 0;
    for (int64_t t = 0; t < s.T; ++t) {
      const double now = f.decay[s.head(i, per_head)] * v + f.gain[s.head(i, per_head)] * x[size_t(t * n + i)];
      h[size_t(t * n + i)] = now;
      v = f.after(now);
    }
  }
  return h;
}
Numbers fired(const Neuron& f, const Numbers& h) {
  Numbers s;
  for (double x : h) s.push_back(f.fires(x) ? 1 : 0);
  return s;
}
// Gradients of the inputs from those of the spikes; adds those of decay and gain of (b, head) to sums: [2, B * H].
Numbers back(const Neuron& f, const Shape& s, const Numbers& x, const Numbers& h, const Numbers& g_s, int64_t per_head,
             Numbers& sums) {
  Numbers g_x(h.size());
  const int64_t n = s.B * s.H * per_head;
  for (int64_t i = 0; i < n; ++i) {
    double g_v = 0;
    for (int64_t t = s.T - 1; t >= 0; --t) {
      const size_t at = size_t(t * n + i);
      // The slope of leaky_relu turns at h = threshold, whichever side of it fires.
      const double g = g_s[at] * (h[at] - f.threshold >= 0 ? 1 : kLeak) + (f.hard && f.fires(h[at]) ? 0 : g_v);
      g_x[at] = f.gain[s.head(i, per_head)] * g;
      g_v = f.decay[s.head(i, per_head)] * g;
      if (t > 0) sums[size_t(i / per_head)] += g * f.after(h[at - size_t(n)]);
      sums[size_t(s.B * s.H + i / per_head)] += g * x[at];
    }
  }
  return g_x;
}

// An operand in memory: rows `gap` longer than L; heads before rows, or rows before heads (channels innermost).
struct Layout {
  int64_t t, b, h, r, size;
  Layout(const Shape& s, int64_t gap, bool rows_first, int64_t slices)
      : t(s.B * s.H * s.R * (s.L + gap)),
        b(s.H * s.R * (s.L + gap)),
        h(rows_first ? s.L + gap : s.R * (s.L + gap)),
        r(rows_first ? s.H * (s.L + gap) : s.L + gap),
        size(slices * t - gap) {}
  template <class F>
  void each(const Shape& s, int64_t slices, F f) const {  // f(index, place)
    int64_t i = 0;
    for (int64_t t_ = 0; t_ < slices; ++t_)
      for (int64_t b_ = 0; b_ < s.B; ++b_)
        for (int64_t h_ = 0; h_ < s.H; ++h_)
          for (int64_t r_ = 0; r_ < s.R; ++r_)
            for (int64_t l_ = 0; l_ < s.L; ++l_, ++i) f(i, t_ * t + b_ * b + h_ * h + r_ * r + l_);
  }
  template <class Pointer>
  QkRows<Pointer> rows(Pointer data) const {
    return {data, t, b, h, r};
  }
};

Numbers read(const Array& x, const Shape& s, const Layout& at) {
  Numbers d(size_t(s.n()));
  at.each(s, s.T, [&](int64_t i, int64_t place) { d[size_t(i)] = x[place]; });
  return d;
}
void compare(const char* what, const Array& got, const Shape& s, const Layout& at, const Numbers& want) {
  at.each(s, s.T, [&](int64_t i, int64_t place) {
    const double w = is_half(got.dtype) ? rounded(want[size_t(i)], format_of(got.dtype)) : want[size_t(i)];
    if (!same(got[place], w)) fail(what, i, got[place], w);
  });
}

// The attention neurons' input, or any sum over the rows (columns) or along them: [T, B, H, J] of [T, B, H, R, L].
Numbers summed(const Shape& s, bool columns, const Numbers& x, const Numbers* w) {
  const int64_t J = columns ? s.L : s.R;
  Numbers sum(size_t(s.T * s.B * s.H * J));
  for (int64_t i = 0; i < s.n(); ++i)
    sum[size_t(i / (s.R * s.L) * J + (columns ? i % s.L : i / s.L % s.R))] += x[size_t(i)] * (w ? (*w)[size_t(i)] : 1);
  return sum;
}
double& of(Numbers& neurons, const Shape& s, bool columns, int64_t i) {
  return neurons[size_t(columns ? i / (s.R * s.L) * s.L + i % s.L : i / s.L)];
}

struct Problem {
  Shape s;
  bool columns, currents, two;  // two: a second factor, w
  DType dtype;
  Neuron attn, qkv;
  QkNeuron attn_p, qkv_p;
  Array decay, gain;  // [H]
  double decays[4], gains[4];

  Problem(int index)
      : s{1, 1 + below(2), 1 + below(3), 1 + below(index % 5 ? 20 : 40), 1 + below(index % 7 ? 40 : 300)},
        columns(coin()),
        currents(coin()),
        two(coin()),
        dtype(DType(index % 4)),
        decay(dtype == DType::f64 ? DType::f64 : DType::f32, s.H),
        gain(decay.dtype, s.H) {
    for (int h = 0; h < 4; ++h) decays[h] = coin() ? 0.5 : 0, gains[h] = coin() ? 0.5 : 1;
    for (int64_t h = 0; h < s.H; ++h) decay.put(h, decays[h]), gain.put(h, gains[h]);
    const auto neuron = [&](double threshold) { return Neuron{threshold, coin(), coin(), decays, gains}; };
    attn = neuron(2), qkv = neuron(1);
    const auto params = [&](const Neuron& f) {
      return QkNeuron{0,           0,        decay.data(), gain.data(), 1,     1,
                      f.threshold, 0,        f.threshold,  1,           kLeak, int32_t(Surrogate::leaky_relu),
                      f.hard,      f.strict, true};
    };
    attn_p = params(attn), qkv_p = params(qkv);
  }
  QkShape shape() const { return {s.T, s.B, s.H, s.R, s.L, columns, currents, dtype}; }
  void say(const char* what, const Kernels& k) const {
    char line[200];
    snprintf(line, sizeof line, "%s %s %s columns=%d currents=%d two=%d T=%d B=%d H=%d R=%d L=%d", kIsaNames[int(k.isa)], what,
             name_of(dtype), columns, currents, two, int(s.T), int(s.B), int(s.H), int(s.R), int(s.L));
    context = line;
  }
};

void check(const Kernels& k, int index) {
  Problem p(index);
  Shape& s = p.s;
  const bool four = p.dtype == DType::f32 && coin();                   // steps, which have loops of their own
  s.T = four ? 4 : 1 + below(p.dtype == DType::f64 ? 6 : 2);           // every step takes bits
  if (index == kLarge) s = {2, 1, 1, 1100, 1000}, p.currents = false;  // outputs go past the caches
  p.say("numbers", k);
  const int64_t n = s.n(), blocks = s.B * s.H;
  const Layout at(s, below(3), coin(), s.T), dense(s, 0, coin(), s.T);
  Array operands[3] = {{p.dtype, at.size}, {p.dtype, at.size}, {p.dtype, at.size}};
  Numbers x[3], h[3], f[3];  // y, s, w: in memory, potentials, as factors
  for (int o = 0; o < (p.two ? 3 : 2); ++o) {
    at.each(s, s.T,
            [&](int64_t, int64_t place) { operands[o].put(place, double(below(p.currents ? 9 : 3)) / (p.currents ? 4 : 1)); });
    x[o] = read(operands[o], s, at);
    h[o] = p.currents ? potentials(p.qkv, s, x[o], s.R * s.L) : x[o];
    f[o] = p.currents ? fired(p.qkv, h[o]) : x[o];
  }
  Array g_out(p.dtype, at.size), out(p.dtype, dense.size);
  at.each(s, s.T, [&](int64_t, int64_t place) { g_out.put(place, double(below(5) - 2) / 2); });
  const Numbers g = read(g_out, s, at);
  const auto in = [&](int o) { return o < 2 || p.two ? at.rows<const void*>(operands[o].data()) : QkIn{}; };
  const int64_t parts = qk_parts(p.shape());
  run(k.fwd, QkFwd{p.shape(), p.attn_p, p.qkv_p, false, in(0), in(1), in(2), dense.rows<void*>(out.data()), nullptr},
      blocks * parts);

  const Numbers input = summed(s, p.columns, f[1], p.two ? &f[2] : nullptr);
  const int64_t J = p.columns ? s.L : s.R;
  const Numbers h_attn = potentials(p.attn, s, input, J);
  Numbers a = fired(p.attn, h_attn), want(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) want[size_t(i)] = of(a, s, p.columns, i) * f[0][size_t(i)];
  compare("out", out, s, dense, want);

  const bool need = four ? below(4) == 0 : coin();
  Array grads[3] = {{p.dtype, dense.size}, {p.dtype, dense.size}, {p.dtype, dense.size}}, sums(DType::f64, 4 * blocks * parts);
  const auto to = [&](int o) { return dense.rows<void*>(grads[o].data()); };
  run(k.bwd,
      QkBwd{p.shape(), p.attn_p, p.qkv_p, in(0), in(1), in(2), at.rows<const void*>(g_out.data()), to(0), to(1), to(2),
            need ? static_cast<double*>(sums.data()) : nullptr, nullptr, nullptr},
      blocks * parts);
  Numbers attn_sums(size_t(2 * blocks)), qkv_sums(attn_sums);
  Numbers g_attn = back(p.attn, s, input, h_attn, summed(s, p.columns, f[0], &g), J, attn_sums);
  const char* const names[] = {"g_y", "g_s", "g_w"};
  for (int o = 0; o < (p.two ? 3 : 2); ++o) {
    for (int64_t i = 0; i < n; ++i) {
      const double factor = of(o ? g_attn : a, s, p.columns, i);
      want[size_t(i)] = o == 0 ? factor * g[size_t(i)] : p.two ? factor * f[3 - o][size_t(i)] : factor;
    }
    compare(names[o], grads[o], s, dense, p.currents ? back(p.qkv, s, x[o], h[o], want, s.R * s.L, qkv_sums) : want);
  }
  for (int which = 0; need && which < (p.currents ? 4 : 2); ++which)
    for (int64_t b = 0; b < blocks; ++b) {
      double got = 0;
      for (int64_t part = 0; part < parts; ++part) got += sums[(which * blocks + b) * parts + part];
      const double right = (which < 2 ? attn_sums : qkv_sums)[size_t(which % 2 * blocks + b)];
      if (!same(got, right)) fail("sums", which * blocks + b, got, right);
    }
}

void check_packed(const Kernels& k, int index) {
  Problem p(index * 4);  // float
  Shape& s = p.s;
  const bool full = index % 9 == 0;
  if (full) s.R = 255 + below(3), s.L = 1 + below(9);  // counts pass a byte
  s.T = 1 + below(12);
  p.currents = false;
  p.say("packed", k);
  const int64_t slices = (s.T + 7) / 8;
  const Layout at(s, below(3), coin(), slices), dense(s, 0, coin(), slices);
  std::vector<uint8_t> bits[3], out(size_t(dense.size), 0xff);
  Numbers f[3];
  for (auto& b : bits) b.resize(size_t(at.size), 0xff);
  for (int o = 0; o < 3; ++o) {
    f[o].resize(size_t(s.n()));
    at.each(s, slices, [&](int64_t i, int64_t place) {
      const int64_t step = s.B * s.H * s.R * s.L, slice = i / step;
      uint8_t byte = 0;
      for (int64_t t = slice * 8; t < slice * 8 + 8 && t < s.T; ++t) {
        const bool one = full || below(3) != 0;
        byte = uint8_t(byte | int(one) << (t % 8));
        f[o][size_t(t * step + i % step)] = one;
      }
      bits[o][size_t(place)] = byte;
    });
  }
  const auto in = [&](int o) { return o < 2 || p.two ? at.rows<const void*>(bits[o].data()) : QkIn{}; };
  run(k.fwd, QkFwd{p.shape(), p.attn_p, p.qkv_p, true, in(0), in(1), in(2), dense.rows<void*>(out.data()), nullptr},
      s.B * s.H * qk_parts(p.shape()));
  const Numbers input = summed(s, p.columns, f[1], p.two ? &f[2] : nullptr);
  Numbers a = fired(p.attn, potentials(p.attn, s, input, p.columns ? s.L : s.R));
  dense.each(s, slices, [&](int64_t i, int64_t place) {
    const int64_t step = s.B * s.H * s.R * s.L, slice = i / step;
    int want = 0;
    for (int64_t t = slice * 8; t < slice * 8 + 8 && t < s.T; ++t) {
      const int64_t j = t * step + i % step;
      want |= int(of(a, s, p.columns, j) * f[0][size_t(j)]) << (t % 8);
    }
    if (out[size_t(place)] != want) fail("out", i, out[size_t(place)], want);
  });
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : kAll;
  Isa usable[4];
  const int n = usable_isas(usable);
#ifndef SPK_CHECK_ONLY
  for (const Kernels& k : kKernels)  // what the extension itself would run
    if (k.isa == chosen_isa() && (qk_fwd_cpu() != k.fwd || qk_bwd_cpu() != k.bwd)) {
      context = "dispatch";
      fail("isa", static_cast<int>(k.isa), 0, 1);
    }
#endif
  for (const Kernels& k : kKernels) {
    if (std::find(usable, usable + n, k.isa) == usable + n) continue;
    const int before = failures;
    random_state = 1;
    for (int i = cases < kAll ? 0 : kLarge; i < cases; i += i == kLarge ? -kLarge : 1) check(k, i);
    for (int i = 0; i < cases / 2; ++i) check_packed(k, i);
    printf("%s: %d failures\n", kIsaNames[static_cast<int>(k.isa)], failures - before);
  }
  return failures ? 1 : 0;
}
