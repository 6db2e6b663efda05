"""What `transformers` made of a checkpoint's configuration, kept for the next start: the library takes seconds to import,
for which all ranks wait.

An entry lies in the user's cache folder. Its name is made of all that its content follows from - the checkpoint's files,
the options, the libraries, the sources that read it - so it is never out of date, and whatever changes is read anew. What
is refused is not kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from ...parallel.cpu_ops.library import cache_folder
from ..config import EngineConfig
from ..routing.hf_config import read_config_file
from .model_config import ModelConfig
from .registry import load_model_config

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[2]
# Every source that has a say in it.
SOURCES = ("engine/models/*.py", "engine/routing/hf_config.py", "parallel/moe/activation.py", "parallel/moe/router.py")
# All that is read of a checkpoint.
FILES = ("config.json", "generation_config.json")
# Other configurations, for other versions of the library: a checkpoint that has them is read every time.
OTHER_FILES = "configuration_files"
# The least recently made go first.
MAX_ENTRIES = 64


def load_kept_model_config(config: EngineConfig) -> ModelConfig:
    """As `load_model_config`, which is asked where nothing is kept.

    Raises:
        ValueError: as that.
    """
    if OTHER_FILES in read_config_file(config.model_path):
        return load_model_config(config)
    entry = cache_folder() / "model_configs" / f"{digest_of(config)}.msgpack"
    try:
        return msgspec.msgpack.decode(entry.read_bytes(), type=ModelConfig)
    except (OSError, msgspec.DecodeError):
        # There is none yet, or half of one.
        found = load_model_config(config)
    try:
        keep(found, entry)
    except OSError as error:
        logger.info("the model's configuration is not kept for the next start: %s", error)
    return found


def digest_of(config: EngineConfig) -> str:
    """Of everything that a model's configuration follows from."""
    options = [config.dtype, config.fp8_activations, config.encoder is not None]
    digest = hashlib.sha256(json.dumps([options, torch.__version__, version("transformers")]).encode())
    for name in FILES:
        file = Path(config.model_path) / name
        digest.update(hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b"-")
    for pattern in SOURCES:
        for file in sorted(PACKAGE.glob(pattern)):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def keep(found: ModelConfig, entry: Path) -> None:
    """Whole or not at all: another start may do the same, or read.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = entry.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = Path(scratch) / entry.name
        written.write_bytes(msgspec.msgpack.encode(found))
        written.replace(entry)
    kept = sorted(folder.glob("*.msgpack"), key=lambda each: each.stat().st_mtime_ns)
    for old in kept[:-MAX_ENTRIES]:
        old.unlink(missing_ok=True)
