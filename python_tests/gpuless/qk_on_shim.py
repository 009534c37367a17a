"""The attentions for the backends' checks: packed calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from spikecore.ops import pack_spikes


def packed_calls() -> Iterator[tuple[str, dict[str, Any]]]:
    """(operator, arguments) over modes, lengths and layouts."""
    g = torch.Generator().manual_seed(0)
    for T in (1, 8, 11):
        for shape in ((2, 3, 5, 7), (1, 2, 300, 9), (1, 2, 9, 300)):
            q, k, v = (pack_spikes((torch.rand((T, *shape), generator=g) < 0.3).float()) for _ in range(3))
            for turned in (False, True):
                if turned:
                    q, k, v = (x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2) for x in (q, k, v))
                yield "qk_attention", {"q": q, "k": k, "mode": "token", "T": T}
                yield "qk_attention", {"q": q, "k": k, "mode": "channel", "T": T}
                yield "spike_driven_attention", {"q": q, "k": k, "v": v, "T": T}
