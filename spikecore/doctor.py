"""`spikecore doctor`: what is installed, what runs, and how to get what is missing."""

import importlib.metadata
import importlib.util
import platform

import torch

from spikecore._backend import backend_info

__all__ = ["doctor_lines"]

# distribution -> module, of the extra [train]
_TRAIN = {
    "librosa": "librosa",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
    "PyYAML": "yaml",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "soundfile": "soundfile",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
}


def doctor_lines() -> list[str]:
    """About a dozen aligned lines; those that begin with "fix" say how to get what is missing."""
    info = backend_info()
    compiled, fixes = " ".join(f"sm_{arch}" for arch in info["cuda_archs"]), []
    if info["torch_cuda"] is None:
        fixes.append("for a GPU, install a CUDA build of torch: https://pytorch.org/get-started/locally")
    elif not torch.cuda.is_available():
        fixes.append("for a GPU, torch must see one: is `nvidia-smi` fine, CUDA_VISIBLE_DEVICES not empty?")
    elif info["gpu_backend"] is None and info["triton"] is None:
        fixes.append("for the GPU, pip install triton, or build spikecore where nvcc is on the PATH")
    elif info["gpu_backend"] == "triton":
        fixes.append("Triton serves the GPU; for the CUDA kernels build spikecore where a fitting nvcc is on the PATH")
    missing = [name for name, module in _TRAIN.items() if importlib.util.find_spec(module) is None]
    if missing:
        fixes.append('pip install "spikecore[train]"')
    extra = [f"{name} {_version(name)}" for name in _TRAIN if name not in missing]
    rows = [
        ("spikecore", info["version"]),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{info['torch']}, {torch.get_num_threads()} threads"),
        ("cpu kernels", f"live, {info['isa']} (usable here: {' '.join(info['isas'])}; SPIKECORE_ISA overrides)"),
        ("cuda kernels", f"{info['cuda']}; compiled for: {compiled or 'none'}"),
        ("triton", f"{info['triton'] or 'not installed'}{', live' if info['gpu_backend'] == 'triton' else ''}"),
        ("gpu", _gpu()),
        ("on the gpu", f"{info['gpu_backend'] or 'nothing runs'} ({info['gpu_reason']})"),
        ("numpy", _version("numpy")),
        ("extra [train]", ", ".join(extra) + (f"; missing: {', '.join(missing)}" if missing else "")),
        *(("fix", fix) for fix in fixes),
    ]
    return [f"{name:<14}{value}" for name, value in rows] + ([] if fixes else ["nothing is missing"])


def _gpu() -> str:
    if not torch.cuda.is_available():
        return f"none visible to torch (its CUDA: {torch.version.cuda or 'none'})"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, torch CUDA {torch.version.cuda}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
