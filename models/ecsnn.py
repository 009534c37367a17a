"""EC-SNN's spiking VGG and CifarNet.

Paper: "EC-SNN: Splitting Deep Spiking Neural Networks for Edge Devices", IJCAI 2024.
Origin: github.com/AmazingDD/EC-SNN, model.py (Apache-2.0); written anew, with its state-dict keys.

Deviation: the published code walks through the whole network one time step after the other; here each layer sees all
steps at once. Evaluation gives the same numbers; in training, batch norm takes one mean and variance over all T steps
where the published code takes one per step (and updates its running statistics T times).
"""

from torch import Tensor, nn

from spikecore.models._registry import register_model
from spikecore.neurons import LIF, Neuron
from spikecore.surrogate import ATan

__all__ = ["ECSNN"]


class ECSNN(nn.Module):
    """Spiking VGG: Conv-BN-LIF blocks and average pools, then linear layers with nothing between, averaged over time.

    An image is shown unchanged at every step (direct coding), so the first block's convolution is the encoder.

    Args:
        layers: the convolutions' widths in order, "P" for a 2x2 average pool, as in ``"64 P 128 128 P"``.
        hidden: widths of the linear layers before the last.
        in_channels, img_size: channels and height = width (or ``(height, width)``) of the input.
        num_classes: K, width of the output.
        T: time steps an image is shown; event frames bring their own number.
        tau: membrane time constant of every neuron, in steps.
        dropout: probability, before each linear layer.

    Shapes: image ``[B, C, H, W]`` or event frames ``[B, T, C, H, W]`` -> ``[B, K]``.

    Raises:
        ValueError: an unreadable `layers`, an image that the pools leave nothing of, an input of other dimensions.
    """

    def __init__(
        self,
        layers: str,
        hidden: tuple[int, ...],
        *,
        in_channels: int = 3,
        img_size: int | tuple[int, int] = 32,
        num_classes: int = 10,
        T: int = 5,
        tau: float = 4 / 3,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.T = T
        self.conv_fc = nn.Sequential()  # one flat sequence: the published keys are conv_fc.{index}
        channels = in_channels
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        for layer in layers.split():
            if layer == "P":
                self.conv_fc.append(nn.AvgPool2d(2))
                height, width = height // 2, width // 2
            elif layer.isdecimal():
                self.conv_fc.append(nn.Conv2d(channels, int(layer), 3, padding=1, bias=False))
                self.conv_fc.append(nn.BatchNorm2d(int(layer)))
                self.conv_fc.append(LIF(tau, v_reset=None, surrogate=ATan(2.0)))
                channels = int(layer)
            else:
                raise ValueError(f"ECSNN: layers must be numbers and P, as in '64 P 128 128 P', got {layer!r}")
        if not layers or layers.split()[0] == "P":
            raise ValueError(f"ECSNN: layers must begin with a convolution's width, got {layers!r}")
        if not height or not width:
            raise ValueError(f"ECSNN: img_size {img_size} is too small for the {layers.split().count('P')} pools")
        features = channels * height * width
        self.conv_fc.append(nn.Flatten())
        for out_features in (*hidden, num_classes):
            self.conv_fc.append(nn.Dropout(dropout))
            self.conv_fc.append(nn.Linear(features, out_features, bias=False))
            features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x).mean(0)

    def steps(self, x: Tensor) -> Tensor:
        """Output of every time step, ``[T, B, K]``: what losses over single steps take."""
        if x.dim() not in (4, 5):
            raise ValueError(f"ECSNN: x must be [B, C, H, W] or [B, T, C, H, W], got {list(x.shape)}")
        conv, norm, lif, *rest = self.conv_fc
        if x.dim() == 4:
            # The current of a repeated image is the same at each step: computed once, and read T times by the neuron.
            # The batch statistics are those of the T copies; only running_var differs, by (n - 1/T) / (n - 1) with
            # n = B*H*W: less than 1e-3 from n = 1000 on.
            current = norm(conv(x)).expand(self.T, -1, -1, -1, -1)
        else:
            frames = x.transpose(0, 1)
            current = norm(conv(frames.flatten(0, 1))).unflatten(0, frames.shape[:2])
        T, B = current.shape[:2]
        x = lif(current).flatten(0, 1)
        for layer in rest:
            x = layer(x.unflatten(0, (T, B))).flatten(0, 1) if isinstance(layer, Neuron) else layer(x)
        return x.unflatten(0, (T, B))


@register_model
def ecsnn_vgg5(**kwargs) -> ECSNN:
    return ECSNN("64 P 128 128 P", (1024,), **kwargs)


@register_model
def ecsnn_vgg9(**kwargs) -> ECSNN:
    return ECSNN("64 64 P 128 128 P 256 256 256 P", (1024,), **kwargs)


@register_model
def ecsnn_vgg16(**kwargs) -> ECSNN:
    layers = "64 64 P 128 128 P 256 256 256 P 512 512 512 P 512 512 512 P"
    return ECSNN(layers, (4096, 4096), **kwargs)


@register_model
def ecsnn_cifarnet(**kwargs) -> ECSNN:
    return ECSNN("256 256 256 P 256 256 256 P", (384, 192), **kwargs)


@register_model
def ecsnn_vgg_test(**kwargs) -> ECSNN:
    """Not of the paper: 99,232 parameters on 8x8 gray images, for tests and `spikecore quickstart`."""
    return ECSNN("32 32 P 64 64 P", (128,), **{"in_channels": 1, "img_size": 8, "T": 4, **kwargs})
