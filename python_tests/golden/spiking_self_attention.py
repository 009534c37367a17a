"""Runners of the self-attention blocks of QKFormer and Spikingformer: projections and norms are torch's, what lies
between them is the fused operator, from currents.
"""

from collections.abc import Callable

import torch
from golden.harness import Case, Report, backends, fill_state, loss_weight, runner
from torch import Tensor, nn

from spikecore.ops import LIFParams, lif
from spikecore.surrogate import Sigmoid
from spikecore.testing.cases import CASES

backends["spiking_self_attention"] = {
    "cpu": CASES["spiking_self_attention"].op,
    "ref": CASES["spiking_self_attention"].ref,
}

QKV, ATTN = LIFParams(surrogate=Sigmoid(4.0)), LIFParams(v_threshold=0.5, surrogate=Sigmoid(4.0))


def spikes(x: Tensor) -> Tensor:
    return lif(x, surrogate=Sigmoid(4.0))[0]


class SelfAttention(nn.Module):
    """`neuron_first`: Spikingformer's block starts with a neuron and ends in a norm; QKFormer's ends in a neuron."""

    def __init__(self, dim: int, heads: int, neuron_first: bool) -> None:
        super().__init__()
        self.heads, self.neuron_first = heads, neuron_first
        self.spikes: dict[str, Tensor] = {}
        for name in ("q", "k", "v", "proj"):
            self.add_module(f"{name}_conv", nn.Conv1d(dim, dim, 1, bias=name == "proj"))
            self.add_module(f"{name}_bn", nn.BatchNorm1d(dim))

    def project(self, name: str, x: Tensor) -> Tensor:
        """[T, B, C, N] through convolution and norm, as [T * B, C, N]."""
        return self.get_submodule(f"{name}_bn")(self.get_submodule(f"{name}_conv")(x.flatten(0, 1)))

    def forward(self, x: Tensor, op: Callable) -> Tensor:
        if self.neuron_first:
            x = self.spikes["proj_lif"] = spikes(x)
        tokens = x.flatten(3)
        heads = (self.project(n, tokens).view_as(tokens).unflatten(2, (self.heads, -1)) for n in "qkv")
        (out,) = op(*heads, 0.125, ATTN, QKV)
        self.spikes["attn_lif"] = attention = out.flatten(2, 3)
        y = self.project("proj", attention)
        if not self.neuron_first:  # published so: this neuron steps through T * B, not T
            y = self.spikes["proj_lif"] = spikes(y)
        return y.view_as(x)


SPIKINGFORMER = "Intelligent-Computing-Research-Group/BKDSNN"


@runner(SPIKINGFORMER, "Spikingformer-CML/imagenet/model.py", "SpikingSelfAttention", op="spiking_self_attention")
@runner(SPIKINGFORMER, "Spikingformer-CML/cifar10/model.py", "SpikingSelfAttention", op="spiking_self_attention")
@runner("zhouchenlin2096/QKFormer", "imagenet/qkformer.py", "Spiking_Self_Attention", op="spiking_self_attention")
def self_attention(case: Case, op: Callable) -> Report:
    block = SelfAttention(case.config["dim"], case.config["num_heads"], case.key[0] == SPIKINGFORMER)
    report, want, results = Report(), case.tensors, case.data["results"]
    for mode in ("eval", "train"):
        fill_state(block, case)
        block.train(mode == "train")
        x = case.input("x").requires_grad_()
        out = block(x, op)
        report.output(f"{mode}.out", out, want[f"{mode}.out"])
        for name, s in block.spikes.items():
            report.counts(f"{mode} {name}", int(s.sum()), case.data["neurons"][name][mode]["spikes"])
            if mode == "eval":
                report.spikes(s, want[f"eval.act.{name}"])
    loss = (out * loss_weight(case, out)).sum()
    loss.backward()
    report.values("loss", loss, torch.tensor(results["train"]["loss"]))
    got = {"input:x": x.grad} | {name: p.grad for name, p in block.named_parameters()}
    stored = {n: want[f"train.grad.{n}"] for n in got if f"train.grad.{n}" in want}
    assert len(stored) > 3
    report.gradients(
        {n: got[n] for n in stored}, stored, max(g["norm"] for g in results["train"]["grads"].values() if g)
    )
    return report
