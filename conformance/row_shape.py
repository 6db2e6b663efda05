"""The shape of a server's rows: found out by asking, told by the caller, or read from the checkpoint's configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RowShape:
    """`width` is num_layers times top_k. What is not known is None; `layer_ids` are the layers that have experts."""

    width: int
    num_layers: int | None = None
    top_k: int | None = None
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class KnownSizes:
    """What is known of a model without its rows."""

    num_layers: int | None = None
    top_k: int | None = None
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None

    def or_else(self, other: KnownSizes) -> KnownSizes:
        """The first that is known of each."""
        mine, others = vars(self), vars(other)
        return KnownSizes(**{name: others[name] if value is None else value for name, value in mine.items()})

    def shape(self, width: int) -> RowShape:
        """
        Raises:
            ValueError: rows of this width do not have these layers and experts per token.
        """
        top_k, num_layers = self.top_k, self.num_layers
        if top_k is None and num_layers is not None:
            top_k = width // num_layers
        if top_k is not None and num_layers is None:
            num_layers = width // top_k
        if top_k is not None and num_layers is not None and top_k * num_layers != width:
            raise ValueError(f"a row has {width} ids, not {num_layers} layers times top_k {top_k}")
        return RowShape(width, num_layers, top_k, self.num_experts, self.layer_ids)


def sizes_of_envelope(meta: dict[str, Any]) -> KnownSizes:
    """From `routed_experts_meta`, which describes the compact form."""
    envelope = meta.get("routed_experts_meta")
    if not isinstance(envelope, dict):
        return KnownSizes()
    layer_ids = envelope.get("layer_ids")
    return KnownSizes(top_k=envelope.get("top_k"), layer_ids=None if layer_ids is None else tuple(layer_ids))


def sizes_of_checkpoint(model_path: str) -> KnownSizes:
    """From `config.json`, where the server's checkpoint lies on this machine, too."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
    except (OSError, ValueError):
        return KnownSizes()
    config = config.get("text_config", config)
    experts = [config[name] for name in ("num_experts", "n_routed_experts", "num_local_experts") if config.get(name)]
    return KnownSizes(
        num_layers=config.get("num_hidden_layers"),
        top_k=config.get("num_experts_per_tok"),
        num_experts=experts[0] if experts else None,
    )
