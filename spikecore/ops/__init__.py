"""The fused operators; each stands beside its reference in plain PyTorch (`<op>_ref`)."""

from spikecore.ops.lif import LIFParams, lif, lif_ref, pack_spikes, unpack_spikes

__all__ = ["LIFParams", "lif", "lif_ref", "pack_spikes", "unpack_spikes"]
