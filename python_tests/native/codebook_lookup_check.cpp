// The CPU kernels of codebook_lookup against plain loops, without torch or Python: for sanitizers, and for machines
// that can only be emulated. usage: codebook_lookup_check [random cases]; one line per failure, exits 1 after any.
#include "check.h"
#include "codebook_lookup/codebook_lookup.h"

namespace {

struct Kernels {
  Isa isa;
  bool (*has_bf16)();
  CodebookScanFn *pack, *screen, *settle;
  CodebookBwdFn* bwd;
};

#define SPK_ROW(name) \
  {Isa::name, name::codebook_has_bf16, name::codebook_pack, name::codebook_screen, name::codebook_settle, name::codebook_bwd},
#ifdef SPK_CHECK_ONLY  // one instruction set of several
const Kernels kKernels[] = {SPK_ROW(SPK_CHECK_ONLY)};
#else
const Kernels kKernels[] = {SPK_EACH_ISA(SPK_ROW)};
#endif

struct Problem {
  DType dtype, c_dtype;
  Metric metric;
  int64_t n, K, D, tile;  // codes of a tile
  bool grid, equal, bf16, broken;

  std::string text(const char* isa) const {
    char line[200];
    snprintf(line, sizeof line,
             "%s %s %s metric=%d n=%" PRId64 " K=%" PRId64 " D=%" PRId64 " tile=%" PRId64 " grid=%d equal=%d bf16=%d broken=%d",
             isa, name_of(dtype), name_of(c_dtype), static_cast<int>(metric), n, K, D, tile, grid, equal, bf16, broken);
    return line;
  }
};

double score(const Problem& p, const Array& z, const Array& c, int64_t i, int64_t k) {
  long double s = 0, square = 0;
  for (int64_t d = 0; d < p.D; ++d) {
    const long double a = z[i * p.D + d], b = c[k * p.D + d];
    s += p.metric == Metric::l2 ? -(a - b) * (a - b) : a * b;
    square += b * b;
  }
  if (p.metric == Metric::cosine) s = square > 0 ? s / sqrtl(square) : 0;
  return double(s);
}

void check(const Kernels& k, const Problem& p) {
  context = p.text(kIsaNames[static_cast<int>(k.isa)]);
  Array z(p.dtype, p.n * p.D), c(p.c_dtype, p.K * p.D), values(p.dtype, p.n * p.D);
  z.fill(-2, 2, p.grid);
  c.fill(-2, 2, p.grid);
  if (p.equal)
    for (int64_t i = p.D; i < c.n; ++i) c.put(i, c[i % p.D]);
  const int64_t broken = p.broken ? below(p.n) : -1;
  if (p.broken) z.put(broken * p.D + below(p.D), coin() ? NAN : INFINITY);
  const auto rows = std::make_unique<CodebookRow[]>(size_t(p.n));
  const auto indices = std::make_unique<int64_t[]>(size_t(p.n));
  const int64_t panels = (p.tile + kCodebookPanel - 1) / kCodebookPanel;
  const auto bounds = std::make_unique<CodebookPanel[]>(size_t(panels));
  Array packed(DType::f32, panels * kCodebookPanel * (p.bf16 ? (p.D + 1) / 2 : p.D));
  CodebookScan scan{};
  scan.f.dtype = p.dtype, scan.f.c_dtype = p.c_dtype, scan.f.metric = p.metric;
  scan.f.n = p.n, scan.f.K = p.K, scan.f.D = p.D;
  scan.f.z_step = scan.f.v_step = p.D, scan.f.i_step = 1;
  scan.f.z = z.data(), scan.f.codes = c.data(), scan.f.values = values.data(), scan.f.indices = indices.get();
  scan.bf16 = p.bf16, scan.packed = packed.data(), scan.panels = bounds.get(), scan.rows = rows.get();
  if (p.dtype != DType::f64)
    for (; scan.first < p.K; scan.first += scan.count) {
      scan.count = std::min(p.tile, p.K - scan.first);
      run(k.pack, scan, (scan.count + kCodebookPanel - 1) / kCodebookPanel);
      run(k.screen, scan, (p.n + kCodebookRows - 1) / kCodebookRows);
    }
  run(k.settle, scan, p.n);

  for (int64_t i = 0; i < p.n; ++i) {
    if (i == broken) {
      if (indices[size_t(i)] != -1 || !isnan(values[i * p.D])) fail("index", i, double(indices[size_t(i)]), -1);
      continue;
    }
    double best = -INFINITY;
    int64_t at = -1;
    for (int64_t j = 0; j < p.K; ++j) {
      const double s = score(p, z, c, i, j);
      if (s > best) best = s, at = j;
    }
    // Off the grid, a code whose score is the best up to what double loses.
    const int64_t got = indices[size_t(i)];
    const bool near = got >= 0 && got < p.K && !p.grid && best - score(p, z, c, i, got) <= 1e-13 * (1 + fabs(best)) * double(p.D);
    if (got != at && !(near && !p.equal)) fail("index", i, double(got), double(at));
    for (int64_t d = 0; d < p.D && got == at; ++d) {
      const double want = is_half(p.dtype) ? rounded(c[at * p.D + d], format_of(p.dtype)) : c[at * p.D + d];
      if (!same(values[i * p.D + d], want)) fail("value", i * p.D + d, values[i * p.D + d], want);
    }
  }

  // Sums of rows by code, in their order.
  Array g(p.dtype, p.n * p.D), sums(p.c_dtype, p.K * p.D);
  g.fill(-2, 2, true);
  std::vector<int64_t> starts(size_t(p.K) + 1), order;
  for (int64_t j = 0; j < p.K; ++j) {
    for (int64_t i = 0; i < p.n; ++i)
      if (indices[size_t(i)] == j) order.push_back(i);
    starts[size_t(j) + 1] = int64_t(order.size());
  }
  const CodebookBwd bwd{p.dtype, p.c_dtype, p.n, p.K, p.D, p.D, 1, g.data(), nullptr, order.data(), starts.data(), sums.data()};
  run(k.bwd, bwd, p.K);
  for (int64_t j = 0; j < p.K; ++j)
    for (int64_t d = 0; d < p.D; ++d) {
      double want = 0;
      for (int64_t i = starts[size_t(j)]; i < starts[size_t(j) + 1]; ++i) want += g[order[size_t(i)] * p.D + d];
      if (is_half(p.c_dtype)) want = rounded(want, format_of(p.c_dtype));
      if (!same(sums[j * p.D + d], want)) fail("sum", j * p.D + d, sums[j * p.D + d], want);
    }
}

Problem problem(bool has_bf16) {
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
  Problem p{};
  p.dtype = dtypes[below(8) < 5 ? 0 : 1 + below(3)];
  p.c_dtype = is_half(p.dtype) && coin() ? DType::f32 : p.dtype;
  p.metric = static_cast<Metric>(below(kMetrics));
  p.n = 1 + below(coin() ? 30 : 120);
  p.K = 1 + below(coin() ? 40 : 200);
  p.D = 1 + below(coin() ? 20 : 150);
  p.tile = kCodebookPanel * (1 + below(4));
  p.grid = p.metric != Metric::cosine && coin();
  p.equal = below(5) == 0;
  p.broken = below(5) == 0;
  p.bf16 = has_bf16 && coin();
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 400;
  Isa usable[4];
  const int n = usable_isas(usable);
  for (const Kernels& k : kKernels) {
    if (std::find(usable, usable + n, k.isa) == usable + n) continue;
    const int before = failures;
    random_state = 7;
    for (int i = 0; i < cases; ++i) check(k, problem(k.has_bf16()));
    printf("%s: %d failures\n", kIsaNames[static_cast<int>(k.isa)], failures - before);
  }
#ifndef SPK_CHECK_ONLY
  for (const Kernels& k : kKernels)  // what the extension itself would run
    if (k.isa == chosen_isa() && (codebook_pack_cpu() != k.pack || codebook_screen_cpu() != k.screen ||
                                  codebook_settle_cpu() != k.settle || codebook_bwd_cpu() != k.bwd)) {
      context = "dispatch";
      fail("isa", static_cast<int>(k.isa), 0, 1);
    }
#endif
  return failures != 0;
}
