"""The fused operators; each stands beside its reference in plain PyTorch (`<op>_ref`)."""

from spikecore.ops.lif import LIFParams, lif, lif_ref, pack_spikes, unpack_spikes
from spikecore.ops.selective_scan import selective_scan, selective_scan_ref, selective_scan_step

__all__ = ["LIFParams", "lif", "lif_ref", "pack_spikes", "selective_scan", "selective_scan_ref", "selective_scan_step",
           "unpack_spikes"]  # fmt: skip
