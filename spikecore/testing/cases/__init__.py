"""One `Case` per operator: the samples that tests sweep over, the reference they are held against, and the bytes that
must move, for benches. A new operator adds a Case; the sweep (python_tests/test_ops.py) then does the rest.
"""

from spikecore.testing.cases import codebook_lookup, lif
from spikecore.testing.cases._case import LAYOUTS, Case, Sample, values
from spikecore.testing.cases.lif import SURROGATES

__all__ = ["CASES", "LAYOUTS", "SURROGATES", "Case", "Sample", "values"]

CASES: dict[str, Case] = {module.CASE.name: module.CASE for module in (lif, codebook_lookup)}
