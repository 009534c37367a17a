"""Runners of the attention blocks: QKFormer's token attention, and the spike-driven transformer's, also for events.

Projections and norms are torch's; from their outputs to the attention's the fused operator takes over.
"""

from collections.abc import Callable
from typing import Any

import torch
from golden.harness import Case, Report, backends, fill_state, loss_weight, runner
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, max_pool3d

from spikecore.ops import LIFParams, lif
from spikecore.surrogate import Sigmoid
from spikecore.testing.cases import CASES

for name in ("qk_attention", "spike_driven_attention"):
    backends[name] = {"cpu": CASES[name].op, "ref": CASES[name].ref}

QKV, ATTN = LIFParams(surrogate=Sigmoid(4.0)), LIFParams(v_threshold=0.5, surrogate=Sigmoid(4.0))


def spikes(x: Tensor) -> Tensor:
    return lif(x, surrogate=Sigmoid(4.0))[0]


class Block(nn.Module):
    """1x1 convolutions with batch norms called NAME_conv, NAME_bn; that of the output has a bias."""

    def __init__(self, names: str, dim: int, heads: int, conv: type[nn.Module]) -> None:
        super().__init__()
        self.heads, self.conv = heads, conv
        self.acts: dict[str, Tensor] = {}
        for name in [*names, "proj"]:
            self.add_module(f"{name}_conv", conv(dim, dim, 1, bias=name == "proj"))
            self.add_module(f"{name}_bn", (nn.BatchNorm1d if conv is nn.Conv1d else nn.BatchNorm2d)(dim))

    def project(self, name: str, x: Tensor) -> Tensor:
        """[T, B, C, h, w] through convolution and norm."""
        y = x.flatten(0, 1)
        y = y.flatten(2) if self.conv is nn.Conv1d else y
        y = self.get_submodule(f"{name}_bn")(self.get_submodule(f"{name}_conv")(y))
        self.acts[f"{name}_bn"] = y
        return y.view_as(x)

    def split(self, x: Tensor) -> Tensor:
        return x.flatten(3).unflatten(2, (self.heads, -1))


class TokenAttention(Block):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__("qk", dim, heads, nn.Conv1d)

    def forward(self, x: Tensor, qk_attention: Callable) -> Tensor:
        (out,) = qk_attention(*(self.split(self.project(n, x)) for n in "qk"), "token", ATTN, QKV)
        self.acts["proj_lif"] = spikes(self.project("proj", out.view_as(x)))
        return self.acts["proj_lif"]


class SpikeDrivenAttention(Block):
    def __init__(self, dim: int, heads: int, events: bool) -> None:
        super().__init__("qkv", dim, heads, nn.Conv2d)
        self.events = events

    def forward(self, x: Tensor, spike_driven_attention: Callable) -> Tensor:
        self.acts["shortcut_lif"] = s = spikes(x)
        q, k, v = (self.project(n, s) for n in "qkv")
        if not self.events:
            (out,) = spike_driven_attention(*(self.split(t) for t in (q, k, v)), ATTN, QKV)
        else:  # pools stand between the neurons and the attention
            q, k, v = spikes(q), *(_pool(spikes(t)) for t in (k, v))
            kv = self._pool_heads(self.split(k) * self.split(v))
            (out,) = spike_driven_attention(self.split(q), kv, torch.ones_like(kv), ATTN)
            out = self._pool_heads(out)
        return x + self.project("proj", out.reshape(x.shape))

    @staticmethod
    def _pool_heads(x: Tensor) -> Tensor:
        """[T, B, H, D, N], over neighbours in N and D."""
        return max_pool3d(x.transpose(3, 4), (1, 3, 3), 1, (0, 1, 1)).transpose(3, 4)


def _pool(x: Tensor) -> Tensor:
    return max_pool2d(x.flatten(0, 1), 3, 1, 1).view_as(x)


@runner("zhouchenlin2096/QKFormer", "imagenet/qkformer.py", "Token_QK_Attention", op="qk_attention")
def token_attention(case: Case, op: Callable) -> Report:
    return check(case, TokenAttention(case.config["dim"], case.config["num_heads"]), op)


SDT = "WenhuiHua-com/Dual-Efficient-Spiking-Neural-Network-Vision-Encoder-for-Partitioned-VLM-Edge-Cloud-Co-Inference"


@runner(SDT, "module/ms_conv.py", "MS_SSA_Conv", op="spike_driven_attention")
@runner(SDT, "module/ms_conv.py", "MS_SSA_Conv(dvs=True)", op="spike_driven_attention")
def spike_driven(case: Case, op: Callable) -> Report:
    events = case.key[2].endswith("(dvs=True)")
    return check(case, SpikeDrivenAttention(case.config["dim"], case.config["num_heads"], events), op)


def check(case: Case, block: Block, op: Any) -> Report:
    report, want, results = Report(), case.tensors, case.data["results"]
    for mode in ("eval", "train"):
        fill_state(block, case)
        block.train(mode == "train")
        x = case.input("x").requires_grad_()
        out = block(x, op)
        report.output(f"{mode}.out", out, want[f"{mode}.out"])
        for name in ("shortcut_lif", "proj_lif"):
            if name in block.acts:
                report.counts(f"{mode} {name}", int(block.acts[name].sum()), case.data["neurons"][name][mode]["spikes"])
        if mode == "eval":
            report.output("proj_bn", block.acts["proj_bn"], want["eval.act.proj_bn"].view_as(block.acts["proj_bn"]))
    loss = (out * loss_weight(case, out)).sum()
    loss.backward()
    report.values("loss", loss, torch.tensor(results["train"]["loss"]))
    got = {"input:x": x.grad} | {name: p.grad for name, p in block.named_parameters()}
    stored = {n: want[f"train.grad.{n}"] for n in got if f"train.grad.{n}" in want}
    assert len(stored) > 3
    largest = max(g["norm"] for g in results["train"]["grads"].values() if g)
    report.gradients({n: got[n] for n in stored}, stored, largest)
    return report
