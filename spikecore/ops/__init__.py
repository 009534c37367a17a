"""The fused operators; each stands beside its reference in plain PyTorch (`<op>_ref`)."""

from spikecore.ops.lif import LIFParams, lif, lif_ref, pack_spikes, unpack_spikes
from spikecore.ops.spiking_self_attention import spiking_self_attention, spiking_self_attention_ref

__all__ = [
    "LIFParams", "lif", "lif_ref", "pack_spikes", "spiking_self_attention", "spiking_self_attention_ref",
    "unpack_spikes",
]  # fmt: skip
