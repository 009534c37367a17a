// bn_lif on the CPU; compiled once per instruction set (core/dispatch.h). Pieces of rows in L1 go through all time steps,
// normalised in the registers that their neurons read them from. Maps are worked on channel by channel: the second pass over
// a channel, after its statistics or sums, finds it in L2.
#include "bn_lif/bn_lif.h"
#include "bn_lif/loops.h"
#include "bn_lif/moments.h"
#include "bn_lif/norm.h"
#include "bn_lif/units.h"
#include "core/simd.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int64_t kStreamBytes = 8 << 20;   // output sequences from this size on bypass the caches
constexpr int kStreamPiece = 128;           // neurons between two bursts of streamed stores: loads go on meanwhile
constexpr int64_t kScratchBytes = 1 << 20;  // of a unit's g, to be kept in L2 until g_x is made of it

template <class T>
bool streamed(const BnShape& s) {
  return s.T * s.N * int64_t(sizeof(T)) >= kStreamBytes;
}

// ---- constants -------------------------------------------------------------------------------------------------------

template <class A>
A of_channel(const void* values, int64_t c, A number) {
  return values ? static_cast<const A*>(values)[c] : number;
}
template <class A>
A scale_of(const BnNorm& p, int64_t c) {
  return of_channel(p.weight, c, A(1)) * inverse_std(static_cast<const A*>(p.var)[c], p.eps);
}

template <class A>
Constants<A> write_constants(const Unit& unit, const BnNorm& norm, const LifNeuron& p, A* rows) {
  const int64_t row = unit.row();
  unit.stretches([&](int64_t at, int n, int64_t c) {
    const A values[] = {static_cast<const A*>(norm.mean)[c], scale_of<A>(norm, c), of_channel(norm.bias, c, A(0)),
                        of_channel(p.decay_c, c, A(p.decay)), of_channel(p.gain_c, c, A(p.gain))};
    for (int k = 0; k < 5; ++k) fill_row(rows + k * row + at, values[k], n);
  });
  return {rows, rows + row, rows + 2 * row, rows + 3 * row, rows + 4 * row};
}

double count_of(const BnShape& s) { return double(s.T) * double(s.N / s.C); }

// ---- statistics ------------------------------------------------------------------------------------------------------

// k of channel c: its first number, or the mean found before.
template <class T, class A>
A centre_of(const BnStats& p, int64_t c) {
  if (p.again) return static_cast<const A*>(p.mean)[c];
  A tmp;
  return *state_row(&tmp, static_cast<const T*>(p.x) + c * p.shape.inner, 1);
}

template <class T, class A>
void set_moments(const BnStats& p, int64_t c, const double* sums) {
  double mean, var;
  moments(double(centre_of<T, A>(p, c)), sums[0], sums[1], count_of(p.shape), &mean, &var);
  static_cast<A*>(p.mean)[c] = A(mean);
  static_cast<A*>(p.var)[c] = A(var);
}

// done(channel, [2] sums) for each channel of a unit; k: room for a row of constants. False: out of memory.
template <class T, class A, class Done>
bool unit_moments(const BnStats& p, const Unit& unit, A* k, const Done& done) {
  const T* const x = static_cast<const T*>(p.x);
  if (unit.maps) {
    for (int64_t c = 0; c < unit.count; ++c) k[c] = centre_of<T, A>(p, unit.first + c);
    return map_moments<T, A>(unit, x, p.x_step, p.shape.T, k, done);
  }
  const Sums sums(unit, 2);
  if (!sums.places.data) return false;
  unit.stretches([&](int64_t at, int n, int64_t c) { fill_row(k + at, centre_of<T, A>(p, c), n); });
  period_moments<T, A>(unit, x, p.x_step, p.shape.T, k, sums);
  sums.finish(done);
  return true;
}

template <class T, class A>
int stats(const BnStats& p, int64_t begin, int64_t end) {
  const Memory<A> k(Unit(p.shape, 0).row());
  for (int64_t u = begin; u < end; ++u) {
    const bool done = k.data && unit_moments<T, A>(p, Unit(p.shape, u), k.data, [&](int64_t c, const double* total) {
                        for (int kind = 0; kind < 2; ++kind) p.sums[(kind * p.parts + u) * p.shape.C + c] = total[kind];
                      });
    if (!done) return kOutOfMemory;
  }
  return kOk;
}

void add_parts(double* total, const double* sums, int kinds, int64_t parts, int64_t C, int64_t c) {
  for (int kind = 0; kind < kinds; ++kind) {
    total[kind] = 0;
    for (int64_t part = 0; part < parts; ++part) total[kind] += sums[(kind * parts + part) * C + c];
  }
}

template <class T, class A>
int stats_finish(const BnStats& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    double total[2];
    add_parts(total, p.sums, 2, p.parts, p.shape.C, c);
    set_moments<T, A>(p, c, total);
  }
  return kOk;
}

constexpr int kPieceRow = kPiece + 16;  // keeps the rows out of each other's cache sets

// ---- forward and backward --------------------------------------------------------------------------------------------

// Where the walk over a piece's time steps reads, converting where x is not of the state type.
template <class T, class A, class Params>
struct Inputs {
  const Params& p;
  alignas(64) A x_tmp[kUnroll][kPieceRow], r_tmp[kUnroll][kPieceRow];

  explicit Inputs(const Params& p) : p(p) {}
  void read(int64_t t, int steps, int64_t first, int n, Rows<A>& rows) {
    for (int r = 0; r < steps; ++r) {
      rows.x[r] = state_row(x_tmp[r], static_cast<const T*>(p.x) + (t + r) * p.x_step + first, n);
      if (p.residual) rows.residual[r] = state_row(r_tmp[r], static_cast<const T*>(p.residual) + (t + r) * p.r_step + first, n);
    }
  }
};

template <class A>
void start_row(A* v, const void* v_init, int64_t first, A rest, int n) {
  if (v_init)
    load_row(v, static_cast<const A*>(v_init) + first, n);
  else
    fill_row(v, rest, n);
}

template <class T, class A>
int forward(const BnLifFwd& p, int64_t begin, int64_t end) {
  const BnShape& s = p.shape;
  const bool stream = streamed<T>(s), residual = p.residual;
  Steps<A>* const four = p.y ? steps_of<true, true, false, kUnroll, A>(p.neuron, residual)
                             : steps_of<true, false, false, kUnroll, A>(p.neuron, residual);
  Steps<A>* const one =
      p.y ? steps_of<true, true, false, 1, A>(p.neuron, residual) : steps_of<true, false, false, 1, A>(p.neuron, residual);
  const Neuron<A> c = constants<A>(p.neuron);
  const bool down = !stream && direction<T>(p.x, p.x_step, p.s, s.N) > 0;
  Inputs<T, A, BnLifFwd> inputs(p);
  alignas(64) A v[kPieceRow], rest[kPieceRow], s_tmp[kUnroll][kPieceRow], y_tmp[kUnroll][kPieceRow];
  fill_row(rest, c.rest, kPiece);
  const Memory<A> memory(5 * Unit(s, 0).row());
  if (!memory.data) return kOutOfMemory;
  Constants<A> table;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t u = bn_maps(s) ? i : end - 1 - (i - begin);  // of periods, what statistics saw last may still be near
    const Unit unit(s, u);
    if (p.take_stats) {
      BnStats of{s, p.x_step, p.x, p.norm.mean, p.norm.var, nullptr, 0, false};
      if (p.x_step == 0) of.shape.T = 1;
      for (int pass = 0; pass < (sizeof(A) == 8 ? 2 : 1); ++pass) {
        of.again = pass > 0;
        const auto set = [&](int64_t channel, const double* total) { set_moments<T, A>(of, channel, total); };
        if (!unit_moments<T, A>(of, unit, memory.data, set)) return kOutOfMemory;
      }
    }
    if (unit.maps || i == begin) table = write_constants(unit, p.norm, p.neuron, memory.data);
    for (int64_t j = 0; j < unit.tiles; ++j) {
      unit.pieces(unit[unit.backwards(j)], stream ? kStreamPiece : kPiece, [&](int64_t first, int64_t at, int n) {
        const Constants<A> k = table.at(at);
        const A* from = rest;
        if (p.v_init) load_row(v, static_cast<const A*>(p.v_init) + first, n), from = v;
        Rows<A> rows;
        for (int64_t t = 0; t < s.T; from = v) {
          const int count = s.T - t >= kUnroll ? kUnroll : 1;
          inputs.read(t, count, first, n, rows);
          T *const s_out = static_cast<T*>(p.s) + t * s.N + first, *const y_out = static_cast<T*>(p.y) + t * s.N + first;
          for (int r = 0; r < count; ++r) {
            rows.s[r] = target_row(s_tmp[r], s_out + r * s.N, stream);
            if (p.y) rows.y[r] = target_row(y_tmp[r], y_out + r * s.N, stream);
          }
          (count == 1 ? one : four)(rows, from, v, k, c, n, down);
          for (int r = 0; r < count; ++r) {
            commit_row(s_out + r * s.N, rows.s[r], stream, n);
            if (p.y) commit_row(y_out + r * s.N, rows.y[r], stream, n);
          }
          t += count;
        }
      });
    }
  }
  if (stream) stream_fence();
  return kOk;
}

template <class A>
void set_results(const BnLifBwd& p, int64_t c, const double* sums) {
  static_cast<A*>(p.g_bias)[c] = A(sums[kBnG]);
  static_cast<A*>(p.g_weight)[c] = A(sums[kBnGX] * double(inverse_std(static_cast<const A*>(p.norm.var)[c], p.norm.eps)));
  if (p.g_decay) static_cast<A*>(p.g_decay)[c] = A(sums[kBnDecay]);
  if (p.g_gain) static_cast<A*>(p.g_gain)[c] = A(sums[kBnGain]);
}

// g_x of a unit from g and the sums. scratch: g tile by tile, [tiles, T, kBnTile], or null: it lies in p.g.
template <class T, class A>
void back_to_x(const BnLifBwd& p, const Unit& unit, A* memory, bool written, const A* scratch) {
  const BnShape& s = p.shape;
  const bool stream = streamed<T>(s) && (scratch || p.g != p.g_x);  // else the lines are in the caches already
  const int64_t row = unit.row();
  alignas(64) A x_tmp[kPieceRow], g_tmp[kPieceRow], out_tmp[kPieceRow];
  if (!written) {
    const double count = count_of(s);
    unit.stretches([&](int64_t at, int n, int64_t c) {
      const A inverse = inverse_std(static_cast<const A*>(p.norm.var)[c], p.norm.eps);
      const A values[] = {static_cast<const A*>(p.norm.mean)[c], scale_of<A>(p.norm, c),
                          A(double(static_cast<const A*>(p.g_bias)[c]) / count),
                          A(double(static_cast<const A*>(p.g_weight)[c]) * double(inverse) / count)};
      for (int k = 0; k < 4; ++k) fill_row(memory + k * row + at, values[k], n);
    });
  }
  for (int64_t t = s.T - 1; t >= 0; --t) {
    for (int64_t j = 0; j < unit.tiles; ++j) {
      const int64_t i = unit.backwards(j);
      const Tile tile = unit[i];
      unit.pieces(tile, kPiece, [&](int64_t first, int64_t at, int n) {
        const A* const k = memory + at;
        const A* const x = state_row(x_tmp, static_cast<const T*>(p.x) + t * p.x_step + first, n);
        const A* const g = scratch ? scratch + (i * s.T + t) * kBnTile + (first - tile.first)
                                   : state_row(g_tmp, static_cast<const T*>(p.g) + t * s.N + first, n);
        T* const out = static_cast<T*>(p.g_x) + t * s.N + first;
        A* const g_x = target_row(out_tmp, out, stream);
        normalise_back_row(g_x, g, x, k, k + row, k + 2 * row, k + 3 * row, n);
        commit_row(out, g_x, stream, n);
      });
    }
  }
}

template <class T, class A>
int backward(const BnLifBwd& p, int64_t begin, int64_t end) {
  const BnShape& s = p.shape;
  const bool stream = streamed<T>(s), residual = p.residual, more = residual || p.g_y;
  const bool by_step = p.g_decay || p.g_gain || sizeof(A) == 8;  // these need a row of every step
  const Neuron<A> c = constants<A>(p.neuron);
  LifStepBack<A>* const step_back = lif_step_back(p.neuron, p.detach, p.surrogate, A(0));
  StepsBack<float>* const four_back = steps_back_of<float>(p.neuron, p.detach, more, p.surrogate);
  Steps<A>* const one = steps_of<false, true, true, 1, A>(p.neuron, residual);
  Steps<A>* const advance = steps_of<false, false, false, kUnroll, A>(p.neuron, residual);
  Inputs<T, A, BnLifBwd> inputs(p);
  alignas(64) A zero[kPieceRow], v[kPieceRow], g_v[kPieceRow], tmp[kPieceRow], g_h[kPieceRow];
  alignas(64) A h[kUnroll][kPieceRow], y[kUnroll][kPieceRow], gs_tmp[kUnroll][kPieceRow], gy_tmp[kUnroll][kPieceRow],
      g_tmp[kUnroll][kPieceRow];
  const int64_t blocks = (s.T + kUnroll - 1) / kUnroll;
  // g of a unit of maps that is wanted for g_x alone
  const Unit longest(s, 0);
  const int64_t scratch_size = longest.tiles * s.T * kBnTile;
  const bool keep =
      sizeof(T) == sizeof(A) && longest.maps && p.batch && p.g == p.g_x && scratch_size * int64_t(sizeof(A)) <= kScratchBytes;
  const Memory<A> memory(5 * longest.row()), starts(blocks * kPieceRow), scratch(keep ? scratch_size : 0);
  if (!memory.data || !starts.data || !scratch.data) return kOutOfMemory;
  fill_row(zero, A(0), kPieceRow);
  Constants<A> table;
  Rows<A> rows;
  BackRows<A> back;
  for (int r = 0; r < kUnroll; ++r) rows.residual[r] = back.g_y[r] = back.g_s[r] = zero;
  back.g_v = g_v;

  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(s, u);
    const Sums sums(unit, p.g_decay || p.g_gain ? kBnSums + 1 : 2);
    if (!sums.places.data) return kOutOfMemory;
    if (unit.maps || u == begin) table = write_constants(unit, p.norm, p.neuron, memory.data);
    for (int64_t i = 0; i < unit.tiles; ++i) {
      const Tile tile = unit[i];
      unit.pieces(tile, stream && p.g && !keep ? kStreamPiece : kPiece, [&](int64_t first, int64_t at, int n) {
        const Constants<A> k = table.at(at);
        const auto start = [&](int64_t b) { return starts.data + b * kPieceRow; };
        start_row(start(0), p.v_init, first, c.rest, n);
        for (int64_t b = 0; b + 1 < blocks; ++b) {
          inputs.read(b * kUnroll, kUnroll, first, n, rows);
          advance(rows, start(b), start(b + 1), k, c, n, false);
        }
        fill_row(g_v, A(0), n);
        for (int64_t b = blocks - 1; b >= 0; --b) {
          const int64_t t0 = b * kUnroll;
          const int count = int(s.T - t0 < kUnroll ? s.T - t0 : kUnroll);
          const auto in = [&](const void* data, int r) { return static_cast<const T*>(data) + (t0 + r) * s.N + first; };
          const auto out = [&](void* data, int r) { return static_cast<T*>(data) + (t0 + r) * s.N + first; };
          inputs.read(t0, count, first, n, rows);
          for (int r = 0; r < count; ++r) {
            if (p.g_s) back.g_s[r] = state_row(gs_tmp[r], in(p.g_s, r), n);
            if (p.g_y) back.g_y[r] = state_row(gy_tmp[r], in(p.g_y, r), n);
            back.g[r] = keep  ? scratch.data + (i * s.T + t0 + r) * kBnTile + (first - tile.first)
                        : p.g ? target_row(g_tmp[r], out(p.g, r), stream)
                              : g_tmp[r];
          }
          back.start = start(b);
          back.sum = sums.of(kBnG) + at;
          back.product = sums.of(kBnGX) + at;
          if constexpr (sizeof(A) == 4) {
            if (!by_step && count == kUnroll) four_back(rows, back, k, c, A(p.a), A(p.b), n, false);
          }
          if (by_step || count < kUnroll) {
            load_row(v, start(b), n);
            const Rows<A> all = rows;
            for (int r = 0; r < count; ++r) {
              Rows<A> row;
              row.x[0] = all.x[r], row.residual[0] = all.residual[r], row.y[0] = y[r], row.h = h[r];
              one(row, v, v, k, c, n, false);
            }
            for (int r = count - 1; r >= 0; --r) {
              step_back(h[r], back.g_s[r], zero, g_v, g_h, back.g[r], k.decay, k.gain, c, A(p.a), A(p.b), n);
              if (p.g_y) add_row(back.g[r], back.g_y[r], n);
              add_products(back.sum, back.product, back.g[r], rows.x[r], k.mean, n);
              if (!p.g_decay && !p.g_gain) continue;
              if (r > 0) reset_row(v, h[r - 1], p.neuron.hard, c, n);  // v[t-1]
              fill_row(tmp, c.rest, n);
              // Of the sum and the product only the product is wanted; the place behind the others takes the sum.
              add_products(sums.of(kBnSums) + at, sums.of(kBnDecay) + at, g_h, r > 0 ? static_cast<const A*>(v) : start(b), tmp, n);
              add_products(sums.of(kBnSums) + at, sums.of(kBnGain) + at, g_h, static_cast<const A*>(y[r]), zero, n);
            }
          }
          for (int r = 0; r < count; ++r) {
            if (p.g && !keep) commit_row(out(p.g, r), back.g[r], stream, n);
            if (p.batch) continue;
            scale_row(tmp, back.g[r], k.scale, n);
            store_row(out(p.g_x, r), tmp, n);
          }
        }
        if (p.g_v_init) store_row(static_cast<A*>(p.g_v_init) + first, g_v, n);
      });
    }
    sums.finish([&](int64_t ch, const double* total) {
      if (unit.maps) return set_results<A>(p, ch, total);
      for (int kind = 0; kind < sums.kinds && kind < kBnSums; ++kind) p.sums[(kind * p.parts + u) * s.C + ch] = total[kind];
    });
    if (unit.maps && p.batch) back_to_x<T>(p, unit, memory.data, false, keep ? scratch.data : nullptr);
  }
  if (stream) stream_fence();
  return kOk;
}

template <class A>
int backward_finish(const BnLifBwd& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    double total[kBnSums];
    add_parts(total, p.sums, p.g_decay || p.g_gain ? kBnSums : 2, p.parts, p.shape.C, c);
    set_results<A>(p, c, total);
  }
  return kOk;
}

template <class T, class A>
int backward_x(const BnLifBwd& p, int64_t begin, int64_t end) {
  const Memory<A> memory(4 * Unit(p.shape, 0).row());
  if (!memory.data) return kOutOfMemory;
  for (int64_t u = end - 1; u >= begin; --u)
    back_to_x<T>(p, Unit(p.shape, u), memory.data, u != end - 1, static_cast<const A*>(nullptr));
  stream_fence();
  return kOk;
}

}  // namespace

#define SPK_EACH_TYPE(F)                                    \
  switch (p.shape.dtype) {                                  \
    case DType::f32: return F<float, float>(p, begin, end); \
    case DType::bf16: return F<bf16, float>(p, begin, end); \
    case DType::f16: return F<f16, float>(p, begin, end);   \
    default: return F<double, double>(p, begin, end);       \
  }
int bn_stats(const BnStats& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(stats) }
int bn_stats_finish(const BnStats& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(stats_finish) }
int bn_lif_fwd(const BnLifFwd& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(forward) }
int bn_lif_bwd(const BnLifBwd& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(backward) }
int bn_lif_bwd_x(const BnLifBwd& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(backward_x) }
int bn_lif_bwd_finish(const BnLifBwd& p, int64_t begin, int64_t end) {
  return p.shape.dtype == DType::f64 ? backward_finish<double>(p, begin, end) : backward_finish<float>(p, begin, end);
}

}  // namespace SPK_ISA

#ifdef SPK_DISPATCH
#define SPK_CHOOSE(fn, type)             \
  type* fn##_cpu() {                     \
    static type* const f = SPK_PICK(fn); \
    return f;                            \
  }
SPK_CHOOSE(bn_stats, BnStatsFn)
SPK_CHOOSE(bn_stats_finish, BnStatsFn)
SPK_CHOOSE(bn_lif_fwd, BnLifFwdFn)
SPK_CHOOSE(bn_lif_bwd, BnLifBwdFn)
SPK_CHOOSE(bn_lif_bwd_finish, BnLifBwdFn)
SPK_CHOOSE(bn_lif_bwd_x, BnLifBwdFn)
#endif

}  // namespace spk
