"""Spikingformer with the CML tokenizer (arXiv 2304.11954, 2305.05954) of SpikingJelly's layers and neurons, as its
model zoo, which lacks it, builds its transformers."""

import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor, nn


def lif(v_threshold: float = 1.0) -> neuron.LIFNode:
    return neuron.LIFNode(2.0, v_threshold=v_threshold, surrogate_function=surrogate.Sigmoid(4.0), detach_reset=True)


def conv_bn(
    in_channels: int, out_channels: int, kernel: int = 1, *, bias: bool = False, pool: bool = False
) -> nn.Module:
    conv = layer.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, layer.BatchNorm2d(out_channels), *([layer.MaxPool2d(3, 2, 1)] if pool else []))


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.lif = heads, lif()
        self.q, self.k, self.v = (nn.Sequential(conv_bn(channels, channels), lif()) for _ in range(3))
        self.attn_lif, self.proj = lif(0.5), conv_bn(channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        s = self.lif(x)
        q, k, v = (f(s).flatten(3).unflatten(2, (self.heads, -1)).mT for f in (self.q, self.k, self.v))
        y = self.attn_lif(0.125 * (q @ (k.mT @ v)))  # [T, B, heads, N, D]
        return self.proj(y.mT.reshape(x.shape))


class Block(nn.Module):
    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(channels, heads)
        self.mlp = nn.Sequential(
            lif(), conv_bn(channels, hidden, bias=True), lif(), conv_bn(hidden, channels, bias=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


def spikingformer(embed_dim: int, heads: int, depth: int, num_classes: int) -> nn.Module:
    """For images of CIFAR's size, ``[T, B, 3, H, W] -> [T, B, num_classes]``."""
    widths = [embed_dim // share for share in (8, 4, 2, 1, 1)]
    pools = (False, False, True, True, False)
    tokenizer: list[nn.Module] = [conv_bn(3, widths[0], 3)]
    for before, width, pool in zip(widths, widths[1:], pools[1:], strict=False):
        tokenizer += [lif(), conv_bn(before, width, 3, pool=pool)]
    blocks = [Block(embed_dim, heads, 4 * embed_dim) for _ in range(depth)]
    return nn.Sequential(*tokenizer, *blocks, Pool(), layer.Linear(embed_dim, num_classes))


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(x, (3, 4))
