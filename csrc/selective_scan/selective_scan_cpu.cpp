// selective_scan on the CPU; compiled once per instruction set (core/dispatch.h). 16 channels of a group go through the
// sequence side by side, a chunk at a time: their rows are transposed to [L, 16], one state after the other then walks
// the chunk in registers.
#include <stdlib.h>
#include <string.h>

#include "selective_scan/block.h"

namespace spk {
namespace SPK_ISA {
namespace {

template <class A>
struct Forward {
  Block<A> block;
  Inputs<A> inputs;
};

template <class A>
int forward(const SelectiveScanFwd& q, int64_t begin, int64_t end) {
  const SelectiveScan& p = q.in;
  Forward<A>* w;
  if (!allocate<A>(w, p, 0)) return kOutOfMemory;
  Block<A>& k = w->block;
  k.in = &w->inputs;
  const int64_t blocks = scan_blocks(p), chunk = chunk_of(p);
  for (int64_t item = begin; item < end; ++item) {
    k.at(item / blocks / p.G, item / blocks % p.G, item % blocks);
    k.load_rates();
    k.load_states(k.h, p.h_init, k.channel());
    for (int64_t l = 0; l < p.L; l += chunk) {
      const int n = int(p.L - l < chunk ? p.L - l : chunk);
      k.template load_chunk<false>(l, n, k.ahead(p.u, l + n), k.ahead(p.delta, l + n));
      k.load_matrices(l, n);
      walk_all<true>(k, n);
      if (p.z.data) {
        k.load_columns(k.z, p.z, l, n);
        silu_all(k.tmp[0], k.z[0], n * kLanes);
        each(k.y, n, product, k.y, k.tmp);
      }
      k.store_columns(q.y, k.y, l, n);
    }
    k.store_states(static_cast<A*>(q.h_last), k.h);
  }
  stream_fence();
  free(w);
  return kOk;
}

// ---- backward

template <class A>
struct Backward {
  Block<A> block;
  A *A_, *carry, *starts;  // [S, 16]: A, and the gradient that reaches the states from later on; [chunks, S, 16]
  double* g_A;             // [S, 16]
  double g_D[kLanes], g_bias[kLanes];
  Columns<A> g, gated, g_du, g_dt, part_du, part_dt;  // g: of the gated y; g_dt: what comes through the decays
  Columns<A>* g_y;
  Columns<A> a[kStatesBack], h[kStatesBack];  // h[l + 1] is after step l
  A sums[kChunk];
  Inputs<A>* inputs;  // [kept]
};

// R states through the n steps of a chunk and back, leaving each step's parts in g_B in a, in g_C in h[l + 1]. With OUT y
// is computed again. first: of those that part_du and part_dt add up.
template <bool OUT, bool BOUNDED, int R, class A>
SPK_NOINLINE void back(Backward<A>& w, int64_t s, int n, bool first, const Ahead* reads) {
  using V = typename Vector<A>::type;
  constexpr int P = 4 / R;  // steps whose decays are computed at once
  Block<A>& k = w.block;
  const Inputs<A>& in = *k.in;
  A rows[R][kChunk / kSum][kLanes];  // of g_A, from the last on
  const int last = (n - 1) / kSum;
  const A *Bs[R], *Cs[R];
  for (int r = 0; r < R; ++r) Bs[r] = k.Bs.row(s + r), Cs[r] = k.Cs.row(s + r);
  for (int i = 0; i < kLanes; i += Vector<A>::W) {
    V h[R];
    {
      V rate[R];
      for (int r = 0; r < R; ++r) {
        const int64_t at = (s + r) * kLanes + i;
        h[r] = load<V>(k.h + at), rate[r] = load<V>(k.rate + at);
        store(&w.h[r][0][i], h[r]);
      }
      for (int l = 0; l < n; l += P) {
        Pack<V, 4> a;
        V t[P];
        for (int j = 0; j < P; ++j) {
          t[j] = load<V>(&in.dt[l + j][i]);
          for (int r = 0; r < R; ++r) a.v[j * R + r] = t[j] * rate[r];
        }
        a = decays<BOUNDED>(a);
        for (int j = 0; j < P && l + j < n; ++j) {
          if (i == 0 && s == 0) reads[0].fetch(l + j), reads[1].fetch(l + j);
          const V x = t[j] * load<V>(&in.u[l + j][i]);
          V out{};
          for (int r = 0; r < R; ++r) {
            h[r] = scan_step(h[r], a.v[j * R + r], x * Bs[r][l + j]);
            store(&w.a[r][l + j][i], a.v[j * R + r]);
            store(&w.h[r][l + j + 1][i], h[r]);
            if (OUT) out = r ? out + h[r] * Cs[r][l + j] : h[r] * Cs[r][l + j];
          }
          if (OUT) store(&k.y[l + j][i], load<V>(&k.y[l + j][i]) + out);
        }
      }
    }
    V A_[R], g_h[R], g_A[R];
    for (int r = 0; r < R; ++r) {
      const int64_t at = (s + r) * kLanes + i;
      A_[r] = load<V>(w.A_ + at), g_h[r] = load<V>(w.carry + at), g_A[r] = V{};
    }
    for (int l = n - 1; l >= 0; --l) {
      const V g_y = load<V>(&(*w.g_y)[l][i]), t = load<V>(&in.dt[l][i]), x = t * load<V>(&in.u[l][i]);
      V du{}, dt{};
      for (int r = 0; r < R; ++r) {
        const V before = load<V>(&w.h[r][l][i]), g = g_h[r] + g_y * Cs[r][l];  // g: of h[l]
        g_h[r] = g * load<V>(&w.a[r][l][i]);
        const V g_exponent = g_h[r] * before;
        store(&w.h[r][l + 1][i], g_y * h[r]);
        store(&w.a[r][l][i], g * x);
        du = r ? du + g * Bs[r][l] : g * Bs[r][l];
        dt = r ? dt + g_exponent * A_[r] : g_exponent * A_[r];
        g_A[r] = g_A[r] + g_exponent * t;
        h[r] = before;
      }
      store(&w.part_du[l][i], first ? du : load<V>(&w.part_du[l][i]) + du);
      store(&w.part_dt[l][i], first ? dt : load<V>(&w.part_dt[l][i]) + dt);
      if (l % kSum == 0)
        for (int r = 0; r < R; ++r) store(&rows[r][last - l / kSum][i], g_A[r]), g_A[r] = V{};
    }
    for (int r = 0; r < R; ++r) store(w.carry + (s + r) * kLanes + i, g_h[r]);
  }
  for (int r = 0; r < R; ++r) add_rows(w.g_A + (s + r) * kLanes, rows[r], last + 1);
}

// The gradients of u, into du, and of delta, into dt, and what they and g_y give those of D and the bias. du and dt come in
// as the sums over states.
template <bool SOFTPLUS, class A>
SPK_NOINLINE void finish(Backward<A>& w, Columns<A>& du, Columns<A>& dt, int n) {
  using V = typename Vector<A>::type;
  const Inputs<A>& in = *w.block.in;
  A to_D[kChunk / kSum][kLanes], to_bias[kChunk / kSum][kLanes];
  for (int i = 0; i < kLanes; i += Vector<A>::W) {
    const V skip = load<V>(w.block.skip + i);
    V g_D{}, g_bias{};
    for (int l = 0; l < n; ++l) {
      const V u = load<V>(&in.u[l][i]), g_y = load<V>(&(*w.g_y)[l][i]), g_du = load<V>(&du[l][i]);
      V g_delta = load<V>(&dt[l][i]) + g_du * u;
      if (SOFTPLUS) g_delta = g_delta * load<V>(&in.slope[l][i]);
      store(&dt[l][i], g_delta);
      store(&du[l][i], g_du * load<V>(&in.dt[l][i]) + g_y * skip);
      g_D = g_D + g_y * u;
      g_bias = g_bias + g_delta;
      if (l % kSum == kSum - 1 || l + 1 == n) {
        store(&to_D[l / kSum][i], g_D), store(&to_bias[l / kSum][i], g_bias);
        g_D = g_bias = V{};
      }
    }
  }
  add_rows(w.g_D, to_D, (n + kSum - 1) / kSum);
  add_rows(w.g_bias, to_bias, (n + kSum - 1) / kSum);
}

// The sums of `from` over its 16 channels, to a row of the part's gradient: written by its first block, then added to.
template <class A>
void sum_channels(A* __restrict__ d, const A (*from)[kLanes], A* __restrict__ sums, bool first, int n) {
  for (int l = 0; l < n; l += 16) sum16(sums + l, from[l]);
  for (int l = 0; l < n; ++l) d[l] = first ? sums[l] : d[l] + sums[l];
}

template <class A>
int backward(const SelectiveScanBwd& q, int64_t begin, int64_t end) {
  const SelectiveScan& p = q.in;
  const int64_t blocks = scan_blocks(p), length = chunk_of(p), chunks = (p.L + length - 1) / length, per_state = p.S * kLanes;
  Backward<A>* w;
  const int64_t kept = chunks < kKept ? chunks : kKept, dropped = chunks - kept;  // whose inputs do not stay
  A* const room = allocate<A>(w, p, per_state * (2 + chunks + sizeof(double) / sizeof(A)) + kept * sizeof(Inputs<A>) / sizeof(A));
  if (!room) return kOutOfMemory;
  Block<A>& k = w->block;
  w->g_A = reinterpret_cast<double*>(room);
  w->A_ = reinterpret_cast<A*>(w->g_A + per_state);
  w->carry = w->A_ + per_state;
  w->starts = w->carry + per_state;
  w->inputs = reinterpret_cast<Inputs<A>*>(w->starts + chunks * per_state);  // all before it are whole cache lines
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % q.parts, group = item / q.parts;
    const int64_t first = part * blocks / q.parts, last = (part + 1) * blocks / q.parts;
    A* const g_Bs = static_cast<A*>(q.g_Bs) + item * p.S * p.L;
    A* const g_Cs = static_cast<A*>(q.g_Cs) + item * p.S * p.L;
    for (int64_t block = first; block < last; ++block) {
      k.at(group / p.G, group % p.G, block);
      k.load_states(w->A_, p.A, k.c);
      k.load_rates();
      k.load_states(k.h, p.h_init, k.channel());
      k.load_states(w->carry, q.g_h_last, k.channel());
      memset(w->g_A, 0, per_state * sizeof(double));
      memset(w->g_D, 0, sizeof(w->g_D));
      memset(w->g_bias, 0, sizeof(w->g_bias));
      const auto enter = [&](int64_t chunk) { k.in = w->inputs + (chunk < dropped ? 0 : chunk - dropped); };
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t l = chunk * length, next = l + length;
        const int n = int(p.L - l < length ? p.L - l : length);
        memcpy(w->starts + chunk * per_state, k.h, per_state * sizeof(A));
        enter(chunk);
        if (chunk + 1 == chunks) {
          k.template load_chunk<true>(l, n, k.ahead(q.g_y, l), {});
          break;
        }
        if (chunk < dropped)
          k.template load_chunk<false>(l, n, k.ahead(p.u, next), k.ahead(p.delta, next));
        else
          k.template load_chunk<true>(l, n, k.ahead(p.u, next), k.ahead(p.delta, next));
        k.load_matrices(l, n);
        walk_all<false>(k, n);
      }

      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t l = chunk * length;
        const int n = int(p.L - l < length ? p.L - l : length);
        memcpy(k.h, w->starts + chunk * per_state, per_state * sizeof(A));
        enter(chunk);
        if (chunk < dropped) {
          const int64_t next = chunk ? l - length : p.L;
          k.template load_chunk<true>(l, n, k.ahead(p.u, next), k.ahead(p.delta, next));
        }
        k.load_matrices(l, n);
        if (q.g_y.data) k.load_columns(w->g, q.g_y, l, n);
        w->g_y = &w->g;
        if (p.z.data) {
          w->g_y = &w->gated;
          k.load_columns(k.z, p.z, l, n);
          silu_all(k.tmp[0], k.z[0], n * kLanes);
          each(w->gated, n, product, w->g, k.tmp);
          each(k.y, n, product, k.in->u, k.skip);
        }
        // What is loaded next: g_y again, or the next block.
        const Ahead reads[] = {chunk ? k.ahead(q.g_y, l - length) : k.ahead(p.u, p.L), chunk ? Ahead{} : k.ahead(p.delta, p.L)};
        if (p.S == 0) {
          memset(w->part_du, 0, sizeof(w->part_du));
          memset(w->part_dt, 0, sizeof(w->part_dt));
        }
        for (int64_t s = 0, count; s < p.S; s += count) {
          count = p.S - s < kStatesBack ? 1 : kStatesBack;
          const auto run = [&](auto f1, auto f2) { (count == 1 ? f1 : f2)(*w, s, n, s % kSum == 0, reads); };
          if (p.z.data)
            k.in->bounded ? run(back<true, true, 1, A>, back<true, true, kStatesBack, A>)
                          : run(back<true, false, 1, A>, back<true, false, kStatesBack, A>);
          else
            k.in->bounded ? run(back<false, true, 1, A>, back<false, true, kStatesBack, A>)
                          : run(back<false, false, 1, A>, back<false, false, kStatesBack, A>);
          for (int r = 0; r < count; ++r) {
            sum_channels(g_Bs + (s + r) * p.L + l, w->a[r], w->sums, block == first, n);
            sum_channels(g_Cs + (s + r) * p.L + l, w->h[r] + 1, w->sums, block == first, n);
          }
          if (p.S > kSum && ((s + count) % kSum == 0 || s + count == p.S)) {
            if (s < kSum) {
              memcpy(w->g_du, w->part_du, sizeof(A) * kLanes * n);
              memcpy(w->g_dt, w->part_dt, sizeof(A) * kLanes * n);
            } else {
              each(w->g_du, n, sum, w->g_du, w->part_du);
              each(w->g_dt, n, sum, w->g_dt, w->part_dt);
            }
          }
        }
        Columns<A>&du = p.S > kSum ? w->g_du : w->part_du, &dt = p.S > kSum ? w->g_dt : w->part_dt;
        p.softplus ? finish<true>(*w, du, dt, n) : finish<false>(*w, du, dt, n);
        k.store_columns(q.g_u, du, l, n);
        k.store_columns(q.g_delta, dt, l, n);
        if (p.z.data) {
          silu_slope_all(k.tmp[0], k.z[0], n * kLanes);
          each(k.y, n, [](auto y, auto slope, auto g) { return y * slope * g; }, k.y, k.tmp, w->g);
          k.store_columns(q.g_z, k.y, l, n);
        }
      }
      k.store_states(q.g_A, w->g_A);
      if (q.g_h_init) k.store_states(static_cast<A*>(q.g_h_init), w->carry);
      for (int i = 0; i < k.m; ++i) {
        if (q.g_D) q.g_D[k.channel() + i] = w->g_D[i];
        if (q.g_bias) q.g_bias[k.channel() + i] = w->g_bias[i];
      }
    }
  }
  stream_fence();
  free(w);
  return kOk;
}

// ---- sums over parts

// Elements [begin, end) of out, a stretch of one `o` at a time.
template <class A>
int reduce(const SelectiveScanReduce& p, int64_t begin, int64_t end) {
  constexpr int kBlock = 256;
  A sum[kBlock];
  for (int64_t at = begin; at < end;) {
    const int64_t i = at % p.inner, left = p.inner - i < end - at ? p.inner - i : end - at;
    const int n = left < kBlock ? int(left) : kBlock;
    const A* in = static_cast<const A*>(p.in) + at / p.inner * p.parts * p.inner + i;
    load_row(sum, in, n);
    for (int64_t j = 1; j < p.parts; ++j)
      for (int x = 0; x < n; ++x) sum[x] += in[j * p.inner + x];
    if (p.from == DType::f64 && p.to == DType::f32) {
      for (int j = 0; j < n; ++j) static_cast<float*>(p.out)[at + j] = float(sum[j]);
    } else {
      store_any(p.out, sum, p.to, at, n);
    }
    at += n;
  }
  return kOk;
}

}  // namespace

int selective_scan_fwd(const SelectiveScanFwd& p, int64_t begin, int64_t end) {
  return p.in.dtype == DType::f64 ? forward<double>(p, begin, end) : forward<float>(p, begin, end);
}
int selective_scan_bwd(const SelectiveScanBwd& p, int64_t begin, int64_t end) {
  return p.in.dtype == DType::f64 ? backward<double>(p, begin, end) : backward<float>(p, begin, end);
}
int selective_scan_reduce(const SelectiveScanReduce& p, int64_t begin, int64_t end) {
  return p.from == DType::f64 ? reduce<double>(p, begin, end) : reduce<float>(p, begin, end);
}

}  // namespace SPK_ISA

#ifdef SPK_DISPATCH
SelectiveScanFwdFn* selective_scan_fwd_cpu() {
  static SelectiveScanFwdFn* const f = SPK_PICK(selective_scan_fwd);
  return f;
}
SelectiveScanBwdFn* selective_scan_bwd_cpu() {
  static SelectiveScanBwdFn* const f = SPK_PICK(selective_scan_bwd);
  return f;
}
SelectiveScanReduceFn* selective_scan_reduce_cpu() {
  static SelectiveScanReduceFn* const f = SPK_PICK(selective_scan_reduce);
  return f;
}
#endif

}  // namespace spk
