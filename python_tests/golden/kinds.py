"""Everything that runs cases: importing this registers all runners and the operators' backends."""

from golden import (
    codebooks,  # noqa: F401
    neurons,  # noqa: F401
)
