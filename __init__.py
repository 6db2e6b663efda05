"""Waybill: a distributed engine for Mixture-of-Experts models that ships the experts every token was routed to."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that importing the package costs nothing and needs no torch.
_EXPORTS = {
    "Engine": ".launch.engine",
    "EngineConfig": ".engine.config",
    "EngineDeadError": ".engine.frontend.engine_connection",
    "EngineStartError": ".engine.frontend.engine_connection",
    "GenerationError": ".engine.frontend.answer",
    "RoutedExperts": ".engine.routing.wire",
    "SamplingParams": ".engine.io_struct",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
