"""Everything that runs cases: importing this registers all runners and the operators' backends."""

from golden import (
    neurons,  # noqa: F401
    scans,  # noqa: F401
)
