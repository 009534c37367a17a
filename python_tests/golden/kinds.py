"""Everything that runs cases: importing this registers all runners and the operators' backends."""

from golden import (
    captions,  # noqa: F401
    codebooks,  # noqa: F401
    distillation,  # noqa: F401
    models,  # noqa: F401
    neurons,  # noqa: F401
    pruning,  # noqa: F401
    qk_attention,  # noqa: F401
    scans,  # noqa: F401
    spiking_self_attention,  # noqa: F401
)
