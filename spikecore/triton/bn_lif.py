"""bn_lif in Triton: the GPU backend where the compiled CUDA kernels cannot run. Formulas: spikecore/ops/bn_lif.py.

Same launchers' signatures as the registered ops. A program owns neurons and walks over time; what it sums over time
goes to one float64 number a neuron, which torch adds up for each channel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikecore.triton.lif import SEGMENT, NeuronNumbers, _charge, _laid_out, _launch, _reset, _surrogate


@triton.jit
def _current(
    p_x, p_residual, t, i, c, mask, x_step, r_step, p_mean, p_scale, p_bias, RESIDUAL: tl.constexpr,
):  # fmt: skip
    # (x, y) of the neurons i, of channels c, at time t.
    b_x = tl.load(p_x + t * x_step + i, mask=mask, other=0.0).to(tl.float32)
    b_mean = tl.load(p_mean + c, mask=mask, other=0.0)
    b_scale = tl.load(p_scale + c, mask=mask, other=0.0)
    b_y = (b_x - b_mean) * b_scale + tl.load(p_bias + c, mask=mask, other=0.0)
    if RESIDUAL:
        b_y += tl.load(p_residual + t * r_step + i, mask=mask, other=0.0).to(tl.float32)
    return b_x, b_y


@triton.jit
def bn_stats_kernel(p_x, p_sum, p_squares, T, N, x_step, C, inner, BN: tl.constexpr):
    # Sums over time of d = x - k and of its square; k: the channel's first number.
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    mask = i < N
    k = tl.load(p_x + (i // inner) % C * inner, mask=mask, other=0.0).to(tl.float64)
    b_sum = tl.zeros([BN], tl.float64)
    b_squares = tl.zeros([BN], tl.float64)
    for step in range(T):
        d = tl.load(p_x + tl.cast(step, tl.int64) * x_step + i, mask=mask, other=0.0).to(tl.float64) - k
        b_sum += d
        b_squares += d * d
    tl.store(p_sum + i, b_sum, mask=mask)
    tl.store(p_squares + i, b_squares, mask=mask)


@triton.jit
def bn_lif_fwd_kernel(
    p_x, p_residual, p_mean, p_scale, p_bias, p_decay, p_gain, p_v_init, p_s, p_y,
    T, N, x_step, r_step, C, inner, rest, fire_at, reset_by,
    HARD: tl.constexpr, RESIDUAL: tl.constexpr, V_INIT: tl.constexpr, SUM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    mask = i < N
    c = (i // inner) % C
    b_decay = tl.load(p_decay + c, mask=mask, other=0.0)
    b_gain = tl.load(p_gain + c, mask=mask, other=0.0)
    if V_INIT:
        b_v = tl.load(p_v_init + i, mask=mask, other=0.0)
    else:
        b_v = tl.zeros([BN], tl.float32) + rest
    for step in range(T):
        t = tl.cast(step, tl.int64)
        _, b_y = _current(p_x, p_residual, t, i, c, mask, x_step, r_step, p_mean, p_scale, p_bias, RESIDUAL)
        b_h = _charge(b_v, b_y, b_decay, b_gain, rest)
        b_v = _reset(b_h, rest, fire_at, reset_by, HARD)
        tl.store(p_s + t * N + i, (b_h >= fire_at).to(tl.float32).to(p_s.dtype.element_ty), mask=mask)
        if SUM:
            tl.store(p_y + t * N + i, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def bn_lif_bwd_kernel(
    p_g_s, p_g_y, p_x, p_residual, p_mean, p_scale, p_bias, p_decay, p_gain, p_v_init,
    p_g, p_g_x, p_g_v_init, p_sum_g, p_sum_gx, p_sum_decay, p_sum_gain, p_starts,
    T, N, x_step, r_step, C, inner, threshold, rest, fire_at, reset_by, a, b,
    HARD: tl.constexpr, DETACH: tl.constexpr, KIND: tl.constexpr, RESIDUAL: tl.constexpr, V_INIT: tl.constexpr,
    G_S: tl.constexpr, G_Y: tl.constexpr, G: tl.constexpr, BATCH: tl.constexpr, NEED_DECAY: tl.constexpr,
    NEED_GAIN: tl.constexpr, NEED_V_INIT: tl.constexpr, SEG: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # As lif_bwd_kernel: potentials at the starts of segments first; then each segment from the last, forward and back.
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    mask = i < N
    c = (i // inner) % C
    b_mean = tl.load(p_mean + c, mask=mask, other=0.0)
    b_scale = tl.load(p_scale + c, mask=mask, other=0.0)
    b_decay = tl.load(p_decay + c, mask=mask, other=0.0)
    b_gain = tl.load(p_gain + c, mask=mask, other=0.0)
    if V_INIT:
        b_first = tl.load(p_v_init + i, mask=mask, other=0.0)
    else:
        b_first = tl.zeros([BN], tl.float32) + rest
    segments = (T + SEG - 1) // SEG
    b_v = b_first
    for step in range((segments - 1) * SEG):
        t = tl.cast(step, tl.int64)
        _, b_y = _current(p_x, p_residual, t, i, c, mask, x_step, r_step, p_mean, p_scale, p_bias, RESIDUAL)
        b_v = _reset(_charge(b_v, b_y, b_decay, b_gain, rest), rest, fire_at, reset_by, HARD)
        if step % SEG == SEG - 1:
            tl.store(p_starts + (t // SEG) * N + i, b_v, mask=mask)
    b_g_v = tl.zeros([BN], tl.float32)
    sum_g = tl.zeros([BN], tl.float64)
    sum_gx = tl.zeros([BN], tl.float64)
    sum_decay = tl.zeros([BN], tl.float64)
    sum_gain = tl.zeros([BN], tl.float64)
    for back in range(segments):
        k = tl.cast(segments - 1 - back, tl.int64)
        b_start = b_first
        if k > 0:
            b_start = tl.load(p_starts + (k - 1) * N + i, mask=mask, other=0.0)
        hs = ()
        b_v = b_start
        for j in tl.static_range(SEG):
            t = k * SEG + j
            live = mask & (t < T)
            _, b_y = _current(p_x, p_residual, t, i, c, live, x_step, r_step, p_mean, p_scale, p_bias, RESIDUAL)
            b_h = _charge(b_v, b_y, b_decay, b_gain, rest)
            b_v = _reset(b_h, rest, fire_at, reset_by, HARD)
            hs = hs + (b_h,)
        for j in tl.static_range(SEG - 1, -1, -1):
            t = k * SEG + j
            live = mask & (t < T)
            b_h = hs[j]
            b_sg = _surrogate(b_h - threshold, a, b, KIND)
            if HARD:
                b_g = tl.where(b_h >= fire_at, 0.0, b_g_v)
                through_s = rest - b_h
            else:
                b_g = b_g_v
                through_s = tl.zeros([BN], tl.float32) - reset_by
            if G_S:
                b_g = tl.load(p_g_s + t * N + i, mask=live, other=0.0).to(tl.float32) * b_sg + b_g
            if not DETACH:
                b_g += b_g_v * tl.where(b_sg == 0, 0.0, through_s * b_sg)
            b_x, b_y = _current(p_x, p_residual, t, i, c, live, x_step, r_step, p_mean, p_scale, p_bias, RESIDUAL)
            if NEED_GAIN:
                sum_gain += tl.where(live, b_g * b_y, 0.0).to(tl.float64)
            if NEED_DECAY:
                if j > 0:
                    b_prev = _reset(hs[j - 1], rest, fire_at, reset_by, HARD)
                else:
                    b_prev = b_start
                sum_decay += tl.where(live, b_g * (b_prev - rest), 0.0).to(tl.float64)
            b_out = b_gain * b_g
            if G_Y:
                b_out += tl.load(p_g_y + t * N + i, mask=live, other=0.0).to(tl.float32)
            sum_g += tl.where(live, b_out, 0.0).to(tl.float64)
            sum_gx += tl.where(live, b_out * (b_x - b_mean), 0.0).to(tl.float64)
            if G:
                tl.store(p_g + t * N + i, b_out.to(p_g.dtype.element_ty), mask=live)
            if not BATCH:
                tl.store(p_g_x + t * N + i, (b_scale * b_out).to(p_g_x.dtype.element_ty), mask=live)
            b_g_v = tl.where(live, b_decay * b_g, b_g_v)
    tl.store(p_sum_g + i, sum_g, mask=mask)
    tl.store(p_sum_gx + i, sum_gx, mask=mask)
    if NEED_DECAY:
        tl.store(p_sum_decay + i, sum_decay, mask=mask)
    if NEED_GAIN:
        tl.store(p_sum_gain + i, sum_gain, mask=mask)
    if NEED_V_INIT:
        tl.store(p_g_v_init + i, b_g_v, mask=mask)


@triton.jit
def bn_lif_bwd_x_kernel(p_g, p_x, p_mean, p_scale, p_g_mean, p_slope, p_g_x, T, N, x_step, C, inner, BN: tl.constexpr):
    # g_x from g (which may be the same memory), x and the means of the channel.
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    mask = i < N
    c = (i // inner) % C
    b_mean = tl.load(p_mean + c, mask=mask, other=0.0)
    b_scale = tl.load(p_scale + c, mask=mask, other=0.0)
    b_g_mean = tl.load(p_g_mean + c, mask=mask, other=0.0)
    b_slope = tl.load(p_slope + c, mask=mask, other=0.0)
    for step in range(T):
        t = tl.cast(step, tl.int64)
        b_g = tl.load(p_g + t * N + i, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + t * x_step + i, mask=mask, other=0.0).to(tl.float32)
        b_g = b_scale * ((b_g - b_g_mean) - (b_x - b_mean) * b_slope)
        tl.store(p_g_x + t * N + i, b_g.to(p_g_x.dtype.element_ty), mask=mask)


class _Call(NeuronNumbers):
    """What both launchers derive from the arguments."""

    def __init__(self, op, x, residual, weight, bias, mean, var, decay_c, gain_c, v_init, neuron, channel_dim, eps):
        from spikecore.ops.bn_lif import _check
        from spikecore.ops.lif import _slice_strides

        super().__init__(neuron)
        _check(op, x, residual, weight, bias, mean, var, decay_c, gain_c, v_init, channel_dim)
        if x.dtype == torch.float64:
            raise RuntimeError(f"{op}: float64 runs on the CPU only, got {list(x.shape)} on {x.device.type}")
        self.x = x if x.stride()[1:] == _slice_strides(x) else x.contiguous()
        self.residual = residual
        if residual is not None and residual.stride()[1:] != self.x.stride()[1:]:
            self.residual = _laid_out(residual, self.x, sequence=True)
        self.v_init = _laid_out(v_init, self.x, sequence=False)
        self.channel_dim, self.eps = channel_dim, eps
        self.T, self.N, self.C = len(x), x[0].numel(), x.shape[channel_dim]
        self.inner = max(self.x.stride(channel_dim) if self.C > 1 else self.N, 1)
        self.count = self.T * (self.N // max(self.C, 1))
        self.weight, self.bias = self._channels(weight, 1.0), self._channels(bias, 0.0)
        self.decay_c, self.gain_c = self._channels(decay_c, self.decay), self._channels(gain_c, self.gain)
        self.mean, self.var = mean, var

    def _channels(self, p: Tensor | None, number: float) -> Tensor:
        p = self.x.new_full((), number, dtype=torch.float32) if p is None else p
        return p.expand(self.C).contiguous()

    @property
    def inverse(self) -> Tensor:
        assert self.var is not None
        return (1 / torch.sqrt(self.var.double() + self.eps)).float()

    @property
    def scale(self) -> Tensor:
        return self.weight * self.inverse

    def slices(self) -> Tensor:
        from spikecore.ops.lif import _empty_slices

        return _empty_slices(self.x, None, torch.float64)

    def sums(self, per_neuron: Tensor) -> Tensor:
        channel = self.channel_dim % self.x.dim() - 1
        others = [d for d in range(per_neuron.dim()) if d != channel]
        return per_neuron.sum(others) if others else per_neuron

    def launch(self, kernel, *args, **constants) -> None:
        _launch(kernel, self.x, self.N, *args, **constants)

    def steps(self) -> tuple[int, ...]:
        """T, N, and elements from slice to slice of x and of the residual."""
        return self.T, self.N, self.x.stride(0), 0 if self.residual is None else self.residual.stride(0)

    def take_stats(self, mean: Tensor, var: Tensor) -> None:
        self.mean, self.var = mean.zero_(), var.zero_()
        if self.N == 0:
            return
        parts = self.slices(), self.slices()
        self.launch(bn_stats_kernel, self.x, *parts, self.T, self.N, self.x.stride(0), self.C, self.inner)
        total, squares = (self.sums(p) for p in parts)
        k = self.x[0].movedim(self.channel_dim % self.x.dim() - 1, 0).reshape(self.C, -1)[:, 0].double()
        shift = total / self.count
        self.mean.copy_(k + shift)
        self.var.copy_(((squares - total * shift) / self.count).clamp_(min=0))


def bn_lif_fwd(
    x, residual, weight, bias, running_mean, running_var, decay_c, gain_c, v_init, neuron, channel_dim, eps, return_sum
):
    from spikecore.ops.bn_lif import _bn_lif_fwd_fake

    call = _Call("bn_lif", x, residual, weight, bias, running_mean, running_var, decay_c, gain_c, v_init, neuron,
                 channel_dim, eps)  # fmt: skip
    s, y, mean, var = _bn_lif_fwd_fake(call.x, residual, weight, bias, running_mean, running_var, decay_c, gain_c,
                                       v_init, neuron, channel_dim, eps, return_sum)  # fmt: skip
    if running_mean is None:
        call.take_stats(mean, var)
    call.launch(
        bn_lif_fwd_kernel, call.x, call.residual, call.mean.contiguous(), call.scale, call.bias, call.decay_c,
        call.gain_c, call.v_init, s, y, *call.steps(), call.C, call.inner, call.rest, call.fire_at, call.reset_by,
        HARD=call.hard, RESIDUAL=residual is not None, V_INIT=v_init is not None, SUM=return_sum,
    )  # fmt: skip
    return s, y, mean, var


def bn_lif_bwd(
    g_s, g_y, x, residual, weight, bias, mean, var, decay_c, gain_c, v_init, neuron, channel_dim, eps, training,
    need_residual, need_decay, need_gain, need_v_init,
):  # fmt: skip
    from spikecore.ops.bn_lif import _bn_lif_bwd_fake

    call = _Call("bn_lif backward", x, residual, weight, bias, mean, var, decay_c, gain_c, v_init, neuron, channel_dim,
                 eps)  # fmt: skip
    g_x, g_residual, g_weight, g_bias, g_decay, g_gain, g_v_init = _bn_lif_bwd_fake(
        g_s, g_y, call.x, residual, weight, bias, mean, var, decay_c, gain_c, v_init, neuron, channel_dim, eps,
        training, need_residual, need_decay, need_gain, need_v_init,
    )  # fmt: skip
    g_s, g_y = (_laid_out(t, call.x, sequence=True) for t in (g_s, g_y))
    g = g_residual if need_residual else g_x if training else None
    per = [call.slices() if need else None for need in (True, True, need_decay, need_gain)]
    starts = x.new_empty(((call.T - 1) // SEGMENT, call.N), dtype=torch.float32)
    mean, scale = call.mean.contiguous(), call.scale
    _launch(  # four neurons a thread, as of float32, in every type: with eight the sums' registers spill
        bn_lif_bwd_kernel, scale, call.N, g_s, g_y, call.x, call.residual, mean, scale, call.bias, call.decay_c,
        call.gain_c, call.v_init, g, g_x, g_v_init, *per, starts, *call.steps(), call.C, call.inner,
        call.threshold, call.rest, call.fire_at, call.reset_by, call.a, call.b,
        HARD=call.hard, DETACH=call.detach, KIND=call.kind, RESIDUAL=residual is not None, V_INIT=v_init is not None,
        G_S=g_s is not None, G_Y=g_y is not None, G=g is not None, BATCH=training, NEED_DECAY=need_decay,
        NEED_GAIN=need_gain, NEED_V_INIT=need_v_init, SEG=min(SEGMENT, triton.next_power_of_2(call.T)),
    )  # fmt: skip
    inverse = call.inverse.double()
    g_bias.copy_(call.sums(per[0]) if call.N else 0)
    g_weight.copy_(call.sums(per[1]) * inverse if call.N else 0)
    for out, sums, parameter, need in ((g_decay, per[2], decay_c, need_decay), (g_gain, per[3], gain_c, need_gain)):
        if need:
            channels = call.sums(sums).float() if call.N else sums.new_zeros(call.C, dtype=torch.float32)
            out.copy_(channels if parameter.dim() else channels.double().sum())
    if training:
        g_mean = (g_bias.double() / max(call.count, 1)).float()
        slope = (g_weight.double() * inverse / max(call.count, 1)).float()
        call.launch(
            bn_lif_bwd_x_kernel, g, call.x, mean, scale, g_mean, slope, g_x,
            call.T, call.N, call.x.stride(0), call.C, call.inner,
        )  # fmt: skip
    return g_x, g_residual, g_weight, g_bias, g_decay, g_gain, g_v_init


def register() -> None:
    """Make these the kernels of torch's CUDA dispatch key."""
    for name, launcher in (("bn_lif_fwd", bn_lif_fwd), ("bn_lif_bwd", bn_lif_bwd)):
        _library.impl(name, launcher, "CUDA")


_library = torch.library.Library("spikecore", "IMPL")
