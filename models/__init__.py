"""Spiking architectures, each a thin file that reads like its paper."""

# Two names for this package would mean two registries, and isinstance that fails between them.
if __name__ != "spikecore.models":
    raise ImportError(f"this package is spikecore.models; write `import spikecore.models`, not `import {__name__}`")

from spikecore.models._base import fold_norms
from spikecore.models._checkpoint import convert_checkpoint, load_checkpoint
from spikecore.models._registry import create_model, list_models, register_model
from spikecore.models._timm import register_in_timm
from spikecore.models.attention_snn import MA
from spikecore.models.ecsnn import ECSNN, Fusion
from spikecore.models.ms_resnet import MSResNet
from spikecore.models.qkformer import QKFormer
from spikecore.models.sdt import SDT, SDTCaption
from spikecore.models.sew_resnet import SEWDVS, SEWResNet
from spikecore.models.sma import SMA, SMAVGG
from spikecore.models.spikformer import Spikformer, Spikingformer
from spikecore.models.svmamba import SpikeLinearAttention, SVMamba
from spikecore.models.vmamba import SS2D, VMamba

__all__ = [
    "ECSNN", "Fusion", "MA", "MSResNet", "QKFormer", "SDT", "SDTCaption", "SEWDVS", "SMA", "SMAVGG", "SS2D",
    "SEWResNet", "SVMamba", "SpikeLinearAttention", "Spikformer", "Spikingformer", "VMamba", "convert_checkpoint",
    "create_model", "fold_norms", "list_models", "load_checkpoint", "register_model",
]  # fmt: skip

register_in_timm(list_models())
