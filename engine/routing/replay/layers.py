"""Where a model routes: its decoder layers, their attention, and exactly one router for each layer that has experts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from .routers import SUPPORTED, RouterKind, qualified_names, router_kind

# Names that wrappers put into a module's path.
WRAPPERS = re.compile(r"(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")
ROUTER_PATH = re.compile(r"^(?P<backbone>(?:.*\.)?)layers\.(?P<layer>\d+)\.mlp\.(?:gate|router)$")
# DeepSpeed's own layer drops tokens beyond an expert's capacity, which no recorded row can say.
REFUSED = ("deepspeed.moe.layer.MoE", "deepspeed.moe.sharded_moe.TopKGate")


@dataclass(frozen=True)
class RoutingLayer:
    """A decoder layer with experts. `block` holds the router and the experts."""

    layer: int
    block: nn.Module
    router: Any
    kind: RouterKind


@dataclass(frozen=True)
class RoutedModel:
    """`attentions` are those of all decoder layers by layer, dense ones included; `layers` are in order."""

    backbone: nn.Module
    attentions: dict[int, nn.Module]
    layers: list[RoutingLayer]


def find_routed_model(model: nn.Module) -> RoutedModel:
    """Find the one backbone with routers in `model`.

    Raises:
        ValueError: there is none of a kind that is known, there are several, or a router is tied, built twice or not where
            its layer would use it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if any(name in REFUSED for name in qualified_names(module)):
            raise ValueError(f"{path}: a {type(module).__name__} cannot replay routes; {SUPPORTED} can")
    found = {path: (module, kind) for path, module in modules.items() if (kind := router_kind(module)) is not None}
    if not found:
        raise ValueError(f"{type(model).__name__}: has no router that is known; {SUPPORTED} have")
    layers: dict[int, RoutingLayer] = {}
    backbones: dict[str, str] = {}
    for path, (router, kind) in found.items():
        match = ROUTER_PATH.match(WRAPPERS.sub("", path))
        if match is None:
            raise ValueError(f"{path}: an orphan router, must be that of a decoder layer (layers.N.mlp)")
        backbones[match["backbone"]] = path
        layer = int(match["layer"])
        # AutoEP has its router under two names.
        if layer in layers and layers[layer].router is not router and len(backbones) == 1:
            raise ValueError(f"{path}: layer {layer} has two routers, must have one")
        layers[layer] = RoutingLayer(layer, modules[path.rpartition(".")[0]], router, kind)
    if len(backbones) > 1:
        raise ValueError(
            f"{type(model).__name__}: has routers built twice, {sorted(backbones.values())}: pass one model"
        )
    ordered = [layers[layer] for layer in sorted(layers)]
    _refuse_tied(ordered)
    return _locate(model, modules, next(iter(backbones)), ordered)


def _locate(model: nn.Module, modules: dict[str, nn.Module], prefix: str, layers: list[RoutingLayer]) -> RoutedModel:
    """Find the backbone and the attention modules of its layers."""
    plain = {WRAPPERS.sub("", path): module for path, module in modules.items()}
    pattern = re.compile(rf"^{re.escape(prefix)}layers\.(\d+)\.self_attn$")
    attentions = {int(match[1]): module for path, module in plain.items() if (match := pattern.match(path))}
    if without := [layer.layer for layer in layers if layer.layer not in attentions]:
        raise ValueError(f"{type(model).__name__}: layers {without} have a router and no attention (self_attn)")
    return RoutedModel(plain[prefix.removesuffix(".")], attentions, layers)


def _refuse_tied(layers: list[RoutingLayer]) -> None:
    owners: dict[int, int] = {}
    for layer in layers:
        # The router itself as well: under ZeRO-3 or a quantiser a parameter may be another object than it was.
        for part in (layer.router, *layer.router.parameters()):
            owner = owners.setdefault(id(part), layer.layer)
            if owner != layer.layer:
                raise ValueError(f"layers {owner} and {layer.layer}: their routers are tied, each must have its own")


def leaf_module_classes(model: nn.Module) -> list[type[nn.Module]]:
    """Classes of the model's MoE blocks, for `deepspeed.utils.set_z3_leaf_modules`: under ZeRO-3 a block's parameters must
    be fetched together, because which experts run differs from rank to rank.

    Raises:
        ValueError: as `replay_routing`.
    """
    return list(dict.fromkeys(type(layer.block) for layer in find_routed_model(model).layers))
