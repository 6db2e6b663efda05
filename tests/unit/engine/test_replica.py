"""What a rank decides when it loads a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from waybill.engine.config import EngineConfig
from waybill.engine.models.registry import load_model_config
from waybill.engine.replica import resolve_context_length

EMBEDDED_MODEL = Path(__file__).parents[3] / "examples" / "tiny_moe" / "checkpoint"


def test_a_context_is_that_of_the_model_or_shorter() -> None:
    model = load_model_config(EngineConfig(model_path=str(EMBEDDED_MODEL)))
    for asked, length in ((None, model.max_position_embeddings), (17, 17), (4096, 4096)):
        assert resolve_context_length(EngineConfig(model_path="", context_length=asked), model) == length
    with pytest.raises(ValueError, match="context_length=4097: must be at most max_position_embeddings=4096"):
        resolve_context_length(EngineConfig(model_path="", context_length=4097), model)
