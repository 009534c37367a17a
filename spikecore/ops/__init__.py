"""The fused operators; each stands beside its reference in plain PyTorch (`<op>_ref`)."""

from spikecore.ops.bn_lif import (
    bn_lif,
    bn_lif_ref,
)
from spikecore.ops.codebook_lookup import (
    codebook_decode,
    codebook_lookup,
    codebook_lookup_ref,
    residual_codebook_lookup,
)
from spikecore.ops.cross_scan import (
    SCANS,
    cross_merge,
    cross_scan,
)
from spikecore.ops.lif import (
    LIFParams,
    lif,
    lif_ref,
    pack_spikes,
    unpack_spikes,
)
from spikecore.ops.qk_attention import (
    qk_attention,
    qk_attention_ref,
    spike_driven_attention,
    spike_driven_attention_ref,
)
from spikecore.ops.selective_scan import (
    selective_scan,
    selective_scan_ref,
    selective_scan_step,
)
from spikecore.ops.selective_scan_2d import (
    selective_scan_2d,
    selective_scan_2d_ref,
)
from spikecore.ops.spiking_self_attention import (
    spiking_self_attention,
    spiking_self_attention_ref,
)

__all__ = [
    "LIFParams",
    "SCANS",
    "bn_lif",
    "bn_lif_ref",
    "codebook_decode",
    "codebook_lookup",
    "codebook_lookup_ref",
    "cross_merge",
    "cross_scan",
    "lif",
    "lif_ref",
    "pack_spikes",
    "qk_attention",
    "qk_attention_ref",
    "residual_codebook_lookup",
    "selective_scan",
    "selective_scan_2d",
    "selective_scan_2d_ref",
    "selective_scan_ref",
    "selective_scan_step",
    "spike_driven_attention",
    "spike_driven_attention_ref",
    "spiking_self_attention",
    "spiking_self_attention_ref",
    "unpack_spikes",
]
