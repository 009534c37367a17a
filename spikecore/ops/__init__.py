"""The fused operators; each stands beside its reference in plain PyTorch (`<op>_ref`)."""

from spikecore.ops.cross_scan import SCANS, cross_merge, cross_scan
from spikecore.ops.lif import LIFParams, lif, lif_ref, pack_spikes, unpack_spikes
from spikecore.ops.selective_scan_2d import selective_scan_2d, selective_scan_2d_ref

__all__ = [
    "SCANS", "LIFParams", "cross_merge", "cross_scan", "lif", "lif_ref", "pack_spikes", "selective_scan_2d",
    "selective_scan_2d_ref", "unpack_spikes",
]  # fmt: skip
