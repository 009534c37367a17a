"""Published weights as their authors saved them."""

import hashlib
import json
import os
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["convert_checkpoint", "load_checkpoint", "read_state"]

WRAPPERS = ("state_dict", "model", "net", "model_state_dict", "module")
PREFIXES = ("module.", "_orig_mod.", "model.")
STATE_BUFFERS = (".v", ".spike", ".h")  # what nodes of other packages keep between steps


def read_state(path: str | os.PathLike, ema: bool = False, trusted: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, wrappers and prefixes taken off.

    Args:
        path: safetensors, or a file of torch.save that holds tensors and plain containers alone.
        ema: the exponential moving average, where the file holds one beside the weights.
        trusted: also read a pickled module, which **runs whatever code its author put into the file**; its classes
            must be importable.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that would execute code, that is cut short, or that holds no tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as e:
            raise ValueError(f"checkpoint: {path} is no complete safetensors file ({e})") from e
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=not trusted)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"checkpoint: {path} needs the code it was saved by on PYTHONPATH ({e})") from e
    except pickle.UnpicklingError as e:
        raise ValueError(
            f"checkpoint: {path} holds more than tensors (a pickled module runs code when it is loaded), so it is not "
            "read; where you trust its origin: spikecore convert --trust-pickle, with its code on PYTHONPATH"
        ) from e
    except (RuntimeError, EOFError, ValueError) as e:
        raise ValueError(f"checkpoint: {path} is no complete file of torch.save ({str(e).splitlines()[0]})") from e
    if isinstance(data, nn.Module):
        data = data.state_dict()
    if ema:
        names = [k for k in ("state_dict_ema", "model_ema", "ema") if k in data]
        if not names:
            raise ValueError(f"checkpoint: {path} holds no moving average, only {', '.join(map(str, list(data)[:8]))}")
        data = data[names[0]]
    while isinstance(data, dict) and (inner := next((k for k in WRAPPERS if isinstance(data.get(k), dict)), None)):
        data = data[inner]
    state = {k: v for k, v in data.items() if isinstance(v, Tensor)} if isinstance(data, dict) else {}
    if not state:
        raise ValueError(f"checkpoint: {path} holds no state_dict, but {type(data).__name__}")
    for prefix in PREFIXES:
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike,
    checkpoint_filter: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    ema: bool = False,
    trusted: bool = False,
) -> nn.Module:
    """Load `path` into `model`, every key of both used; returns the model. `ema`, `trusted`: see `read_state`.

    Raises:
        ValueError: keys or shapes that do not fit, each named.
    """
    state = read_state(path, ema, trusted)
    if checkpoint_filter is not None:
        state = checkpoint_filter(state, model)
    own = model.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.endswith(STATE_BUFFERS)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} is {list(state[k].shape)}, not {list(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"checkpoint: {path} does not fit {type(model).__name__}; {'; '.join(problems)}")
    model.load_state_dict(state)
    return model


def convert_checkpoint(
    name: str, path: str | os.PathLike, out: str | os.PathLike, *, ema: bool = False, trusted: bool = False,
    **settings: Any,
) -> pathlib.Path:  # fmt: skip
    """Write the weights in `path` as safetensors with the keys of model `name`, and a JSON card beside them.

    Args:
        out: ends in ``.safetensors``; the card has the same name with ``.json``.
        ema, trusted: see `read_state`.
        settings: of the model, as for `create_model`.

    Returns:
        The card's path.

    Raises:
        ValueError: an unknown model, weights that do not fit, or another suffix of `out`.
    """
    from safetensors.torch import save_file

    from spikecore._backend import __version__
    from spikecore.models._registry import checkpoint_filter_of, create_model

    source, out = pathlib.Path(path), pathlib.Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"convert: out must end in .safetensors, got {out}")
    model = create_model(name, **settings)
    load_checkpoint(model, source, checkpoint_filter_of(name), ema, trusted)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out, {"model": name, "format": "pt"})
    card = {
        "model": name,
        "settings": settings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "moving_average": ema,
        "source": {"file": source.name, "sha256": _sha256(source)},
        "weights": {"file": out.name, "sha256": _sha256(out)},
        "spikecore": __version__,
    }
    path = out.with_suffix(".json")
    path.write_text(json.dumps(card, indent=1) + "\n")
    return path


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
