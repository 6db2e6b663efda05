"""A checkpoint's configuration, as `transformers` reads it, for the engine and for the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Configurations that differ from another family's in name alone, and that `transformers` does not know.
RENAMED = {"kimi_k2": "deepseek_v3"}


def read_config_file(model_path: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: `model_path` is no folder with a config.json that says what kind of model it is.
    """
    file = Path(model_path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model_path={model_path!r}: must be a folder with a config.json (Hugging Face format)")
    fields = json.loads(file.read_bytes())
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"model_path={model_path!r}: config.json has no model_type")
    return fields


def read_hf_config(model_path: str) -> Any:
    """The configuration object of the class that computes it; code that comes with a checkpoint is not run.

    Raises:
        ValueError: there is no configuration, or none that `transformers` knows.
    """
    # One rank reads for all; the others need not spend their start on this import.
    from transformers import CONFIG_MAPPING, AutoConfig  # noqa: PLC0415

    fields = read_config_file(model_path)
    if fields["model_type"] not in RENAMED:
        return AutoConfig.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
    model_type = RENAMED[fields["model_type"]]
    return CONFIG_MAPPING[model_type].from_dict({**fields, "model_type": model_type})
