"""The fused operators; each stands beside its reference in plain PyTorch (`<op>_ref`)."""

from spikecore.ops.codebook_lookup import (
    codebook_decode,
    codebook_lookup,
    codebook_lookup_ref,
    residual_codebook_lookup,
)
from spikecore.ops.lif import LIFParams, lif, lif_ref, pack_spikes, unpack_spikes

__all__ = [
    "LIFParams",
    "codebook_decode",
    "codebook_lookup",
    "codebook_lookup_ref",
    "lif",
    "lif_ref",
    "pack_spikes",
    "residual_codebook_lookup",
    "unpack_spikes",
]
