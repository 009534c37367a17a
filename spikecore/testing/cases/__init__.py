"""One `Case` per operator: the samples that tests sweep over, the reference they are held against, and the bytes that
must move, for benches. A new operator adds a Case; the sweep (python_tests/test_ops.py) then does the rest.
"""

from spikecore.testing.cases import (
    bn_lif,
    codebook_lookup,
    lif,
    qk_attention,
    selective_scan,
    selective_scan_2d,
    spiking_self_attention,
)
from spikecore.testing.cases._case import LAYOUTS, Case, Sample, values
from spikecore.testing.cases.lif import SURROGATES

__all__ = ["CASES", "LAYOUTS", "SURROGATES", "Case", "Sample", "values"]

_ALL = (
    lif.CASE,
    bn_lif.CASE,
    qk_attention.CASE,
    qk_attention.SPIKE_DRIVEN,
    spiking_self_attention.CASE,
    selective_scan.CASE,
    selective_scan_2d.CASE,
    codebook_lookup.CASE,
)
CASES: dict[str, Case] = {case.name: case for case in _ALL}
