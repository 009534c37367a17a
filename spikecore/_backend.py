"""Loads the compiled core and decides, once, what runs on a GPU: its CUDA kernels, or Triton where they cannot."""

import importlib
import importlib.metadata
import importlib.util
import warnings
from typing import Any

import torch

__version__ = importlib.metadata.version("spikecore")

try:
    # importlib, because `from spikecore import _C` would blame a circular import where the file is missing.
    _C: Any = importlib.import_module("spikecore._C")
except ModuleNotFoundError as e:
    if e.name != "spikecore._C":
        raise
    raise ImportError(
        "spikecore: the compiled core (spikecore._C) is missing, so the installation was interrupted or this is a bare "
        "source folder; run: pip install --force-reinstall --no-deps <spikecore's folder or wheel>"
    ) from e
if error := _C.isa_error():
    raise ValueError(error)


def _cuda_obstacle() -> str | None:
    """Why the compiled CUDA kernels cannot run here, or None."""
    if not _C.cuda_archs:
        return "built without nvcc"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "no usable NVIDIA GPU or driver"
    if int(_C.cuda_driver().split(".")[0] or 0) < int(_C.cuda_version.split(".")[0]):
        return f"the driver speaks CUDA {_C.cuda_driver() or '?'}, the kernels were built with {_C.cuda_version}"
    major, minor = torch.cuda.get_device_capability()
    archs = [int(a) for a in _C.cuda_archs.split()]
    # A cubin serves its major version from its minor on; the PTX of the last serves everything newer.
    if not any(a // 10 == major and a % 10 <= minor for a in archs) and major * 10 + minor < archs[-1]:
        return f"no kernels compiled for sm_{major}{minor} (only {_C.cuda_archs})"
    return None


def _triton_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no usable GPU or driver"
    return None


def _attach() -> tuple[str | None, str]:
    """Give the GPU dispatch key its one implementation; returns (its name or None, why not the others)."""
    cuda = _cuda_obstacle()
    if cuda is None:
        _C.register_cuda()
        return "cuda", "compiled CUDA kernels"
    triton = _triton_obstacle()
    if triton is None:
        for op in _C.ops.split():
            importlib.import_module(f"spikecore.triton.{op}").register()
        return "triton", f"Triton kernels, because of the CUDA kernels: {cuda}"
    return None, f"CUDA kernels: {cuda}; Triton: {triton}"


def _attach_refusal(reason: str) -> None:
    """A CUDA tensor where no kernel is live gets one line that says why, not the dispatcher's page."""
    library = torch.library.Library("spikecore", "IMPL")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"spikecore: no GPU kernels are live here ({reason}); see `spikecore doctor`")

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("spikecore::"):
            library.impl(name.removeprefix("spikecore::"), refuse, "CUDA")
    _keep.append(library)


_keep: list[Any] = []
gpu_backend, gpu_reason = _attach()
if gpu_backend is None:
    _attach_refusal(gpu_reason)


def backend_info() -> dict[str, Any]:
    """What is installed and what runs: versions, instruction set, CUDA and Triton with the reason where not live."""
    spec = importlib.util.find_spec("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        triton = importlib.metadata.version("triton") if spec else None
    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "build_torch": _C.build_torch,
        "isa": _C.isa(),
        "isas": _C.isas(),
        "cuda_archs": _C.cuda_archs.split(),
        "cuda": _cuda_obstacle() or "live",
        "triton": triton,
        "gpu_backend": gpu_backend,
        "gpu_reason": gpu_reason,
    }
