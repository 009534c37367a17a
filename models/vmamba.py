"""VMamba: selective scans of a map in four directions (SS2D) instead of attention. No spikes.

Paper: Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024, arXiv 2401.10166.
Origin: github.com/MzeroMiko/VMamba (MIT) and its copy in github.com/para133/SNN_Mamba (no licence); written anew from
the description, the checkpoints of both load (forms ``v0`` and ``v05`` with their suffixes).

Deviations: maps lie channels-first throughout, and the scans read and write the map itself.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikecore.models._base import VisionModel, truncated_normal
from spikecore.models._registry import register_model
from spikecore.ops import SCANS, selective_scan_2d

__all__ = ["SS2D", "VMamba"]


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Linear2d(nn.Linear):
    """A linear layer of the channels of ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class SoftmaxOverMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).softmax(2).view_as(x)


def out_norm(kind: str, channels: int) -> nn.Module:
    if kind == "layer":
        return LayerNorm2d(channels)
    if kind == "dwconv3":
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        return nn.Sequential(nn.Identity(), conv)  # its published place
    if kind == "softmax":
        return SoftmaxOverMap()
    if kind == "sigmoid":
        return nn.Sigmoid()
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"SS2D: norm must be layer, dwconv3, softmax, sigmoid or none, got {kind!r}")


class SS2D(nn.Module):
    """Selective scan of a map between two projections.

    Args:
        channels: C. state: S. ratio: the scanned width, C_i, over C.
        conv_bias: of the depthwise convolution before the scan.
        gate: "silu", "linear" or None: what multiplies the result.
        norm: of the scanned map: "layer", "dwconv3", "softmax", "sigmoid" or "none".
        out_act: GELU behind the norm, before the gate.
        scans: which four directions, a row of `spikecore.ops.SCANS`.

    Shapes: ``[B, C, H, W] -> [B, C, H, W]``.
    """

    def __init__(
        self, channels: int, *, state: int = 16, ratio: float = 2.0, conv_bias: bool = True, gate: str | None = None,
        norm: str = "layer", out_act: bool = False, scans: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if gate not in ("silu", "linear", None):
            raise ValueError(f"SS2D: gate must be silu, linear or None, got {gate!r}")
        inner, rank = int(ratio * channels), math.ceil(channels / 16)
        self.rank, self.state, self.gate, self.directions = rank, state, gate, SCANS[scans]
        K = len(self.directions)
        self.in_proj = Linear2d(channels, inner * (2 if gate else 1), bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.x_proj = Linear2d(inner, K * (rank + 2 * state), bias=False)
        self.dt_projs = nn.Linear(rank, K * inner, bias=False)  # a layer of its own for each direction
        self.dt_projs_bias = nn.Parameter(torch.empty(K, inner))
        self.A_logs = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(K * inner, 1))
        self.Ds = nn.Parameter(torch.ones(K * inner))
        self.out_norm = out_norm(norm, inner)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = Linear2d(inner, channels, bias=False)
        self.reset_steps()

    @torch.no_grad()
    def reset_steps(self) -> None:
        """Step sizes drawn log-uniformly from 0.001 to 0.1, by way of the inverse of softplus."""
        nn.init.uniform_(self.dt_projs.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.exp(torch.empty_like(self.dt_projs_bias).uniform_(math.log(1e-3), math.log(0.1))).clamp(min=1e-4)
        self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        z: Tensor | None = None
        if self.gate:
            x, z = x.chunk(2, 1)
        x = F.silu(self.conv2d(x))
        dt, B, C = self.x_proj(x).unflatten(1, (len(self.directions), -1)).split([self.rank, self.state, self.state], 2)
        dt = F.conv2d(dt.flatten(1, 2), self.dt_projs.weight[:, :, None, None], groups=len(self.directions))
        dt = dt.unflatten(1, (len(self.directions), -1))  # [B, K, C_i, H, W]
        y = selective_scan_2d(x, dt, -self.A_logs.exp(), B, C, self.Ds, self.dt_projs_bias, True, self.directions)
        y = self.out_act(self.out_norm(y))
        if z is not None:
            y = y * (F.silu(z) if self.gate == "silu" else z)
        return self.out_proj(y)


def form(forward_type: str) -> dict[str, Any]:
    """Arguments of `SS2D` from VMamba's name of a form, as in ``v05_noz`` or ``v052d_ondwconv3_oact``."""
    version, *tags = forward_type.split("_")
    scans = {"v0": 0, "v05": 0, "v051d": 1, "v052d": 2, "v052d3": 3}
    norms = {"onnone": "none", "ondwconv3": "dwconv3", "onsoftmax": "softmax", "onsigmoid": "sigmoid"}
    if version not in scans or (unknown := set(tags) - {"no32", "oact", "noz", "nozact", *norms}):
        raise ValueError(
            f"SS2D: the form {forward_type!r} is not known{f' ({sorted(unknown)})' if version in scans else ''}"
        )
    return {
        "scans": scans[version], "out_act": "oact" in tags,
        "gate": None if "noz" in tags else "linear" if "nozact" in tags else "silu",
        "norm": next((norms[t] for t in tags if t in norms), "layer"),
    }  # fmt: skip


class DropPath(nn.Module):
    """In training, a sample's branch is left out with probability `p`, the others weigh more by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.p
        return x * kept.to(x.dtype) / (1 - self.p)


class MLP(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = Linear2d(channels, hidden), nn.GELU(), Linear2d(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, channels: int, mlp_ratio: float, drop_path: float, ss2d: dict[str, Any]) -> None:
        super().__init__()
        self.norm, self.op = LayerNorm2d(channels), SS2D(channels, **ss2d)
        self.norm2, self.mlp = LayerNorm2d(channels), MLP(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Merge(nn.Module):
    """The four places of a 2x2 window side by side: ``[B, C, H, W] -> [B, 4C, H / 2, W / 2]``; odd maps are padded."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return torch.cat([x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)


def patch_embed(version: str, in_channels: int, channels: int) -> nn.Sequential:
    """To a quarter of the image; identities keep the published places."""
    if version == "v1":
        return nn.Sequential(nn.Conv2d(in_channels, channels, 4, 4), nn.Identity(), LayerNorm2d(channels))
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, half, 3, 2, 1), nn.Identity(), LayerNorm2d(half), nn.Identity(), nn.GELU(),
        nn.Conv2d(half, channels, 3, 2, 1), nn.Identity(), LayerNorm2d(channels),
    )  # fmt: skip


def downsample(version: str, channels: int, to: int) -> nn.Sequential:
    if version == "v1":
        return nn.Sequential(Merge(), LayerNorm2d(4 * channels), Linear2d(4 * channels, to, bias=False))
    conv = nn.Conv2d(channels, to, 2, 2) if version == "v2" else nn.Conv2d(channels, to, 3, 2, 1)
    return nn.Sequential(nn.Identity(), conv, nn.Identity(), LayerNorm2d(to))


class VMamba(VisionModel):
    """Stages of SS2D blocks, each of twice the width and half the map of the one before.

    Args:
        depths: blocks of each stage. dims: width of the first stage, or of each.
        state, ratio, conv_bias: see `SS2D`.
        forward_type: VMamba's name of the form of SS2D.
        mlp_ratio: hidden width of an MLP over its channels.
        drop_path: of the last block, rising from 0.
        patches, downsamples: "v1" or "v2"; "v1", "v2" or "v3": VMamba's names.
        pos_size: height and width of a learnt position map after the patches, or None.
        in_chans, num_classes: see `VisionModel`.

    Shapes: ``[B, C, H, W] -> [B, num_classes]``.
    """

    classifier_name = "classifier.head"

    def __init__(
        self, depths: Sequence[int], dims: int | Sequence[int], *, state: int = 1, ratio: float = 1.0,
        conv_bias: bool = False, forward_type: str = "v05_noz", mlp_ratio: float = 4.0, drop_path: float = 0.0,
        patches: str = "v2", downsamples: str = "v3", pos_size: tuple[int, int] | None = None, in_chans: int = 3,
        num_classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__(in_chans, num_classes)
        if patches not in ("v1", "v2") or downsamples not in ("v1", "v2", "v3"):
            raise ValueError(
                f"VMamba: patches must be v1 or v2 and downsamples v1, v2 or v3, got {patches!r} and {downsamples!r}"
            )
        widths = [dims << i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        ss2d = {"state": state, "ratio": ratio, "conv_bias": conv_bias, **form(forward_type)}
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.patch_embed = patch_embed(patches, in_chans, widths[0])
        self.pos_embed = nn.Parameter(torch.zeros(1, widths[0], *pos_size)) if pos_size else None
        self.layers = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            layer = nn.Sequential()
            blocks = (Block(width, mlp_ratio, next(rates), ss2d) for _ in range(depth))
            layer.add_module("blocks", nn.Sequential(*blocks))
            last = i == len(depths) - 1
            layer.add_module("downsample", nn.Identity() if last else downsample(downsamples, width, widths[i + 1]))
            self.layers.append(layer)
        self.stages = tuple(f"layers.{i}.blocks" for i in range(len(depths)))
        self.num_features = widths[-1]
        self.classifier = nn.Sequential()
        self.classifier.add_module("norm", LayerNorm2d(widths[-1]))
        self.classifier.add_module("head", nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity())
        truncated_normal(self)
        for m in self.modules():
            if isinstance(m, SS2D):
                m.reset_steps()
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"VMamba: x must be [B, {self.in_chans}, H, W], got {list(x.shape)}")
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            if x.shape[2:] != self.pos_embed.shape[2:]:
                raise ValueError(
                    f"VMamba: the positions were built for maps {list(self.pos_embed.shape[2:])}, the image gives "
                    f"{list(x.shape[2:])}"
                )
            x = x + self.pos_embed
        for layer in self.layers:
            x = layer(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        norm, head = self.classifier
        x = norm(x).mean((2, 3))
        return x if pre_logits else head(x)


def checkpoint_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The official repository's tensors with a dimension for the directions, as weights of layers."""
    return {
        re.sub(r"(x_proj|dt_projs)_weight$", r"\1.weight", k): (
            v.flatten(0, 1) if k.endswith(("x_proj_weight", "dt_projs_weight")) else v
        )
        for k, v in state.items()
    }


def _variant(name: str, **settings: Any) -> None:
    def build(**kwargs: Any) -> VMamba:
        return VMamba(**{**settings, **kwargs})

    register_model(build, name=name, checkpoint_filter=checkpoint_filter)


_variant("vmamba_tiny_s1l8", depths=(2, 2, 8, 2), dims=96, drop_path=0.2)
_variant("vmamba_small_s2l15", depths=(2, 2, 15, 2), dims=96, ratio=2.0, drop_path=0.3)
_variant("vmamba_base_s2l15", depths=(2, 2, 15, 2), dims=128, ratio=2.0, drop_path=0.6)
_variant("vmamba_mini", depths=(2, 2, 8, 2), dims=96, drop_path=0.2, num_classes=100)  # SNN_Mamba's
_variant("vmamba_test", depths=(1, 1), dims=16, num_classes=10)  # not of the paper: for tests
