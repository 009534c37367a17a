"""The same names in `timm.create_model`, where timm is installed."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from spikecore.models._registry import create_model


def register_in_timm(names: Iterable[str]) -> None:
    """Names that timm itself has keep timm's meaning; without timm nothing happens."""
    try:
        from timm.models import is_model, register_model
    except (ImportError, RuntimeError):  # a torchvision built for another torch raises the latter
        return
    for name in names:
        if not is_model(name):
            register_model(_entrypoint(name))


def _entrypoint(name: str) -> Any:
    def build(
        pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, cache_dir: Any = None,
        **kwargs: Any,
    ) -> nn.Module:  # fmt: skip
        if pretrained:
            raise ValueError(f"{name}: there are no weights to download; give checkpoint=PATH instead of pretrained")
        model = create_model(name, **kwargs)
        config = {
            "architecture": name,
            "num_classes": getattr(model, "num_classes", 0),
            "classifier": getattr(model, "classifier_name", None),
        }
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
        return model

    build.__name__ = build.__qualname__ = name
    return build
