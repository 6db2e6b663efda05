"""Images of some pixels, and what a checkpoint needs to take them: an image processor, tokens, a template."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

TOKENS = {261: "<|vision_start|>", 262: "<|image_pad|>", 263: "<|vision_end|>"}
PATCH, MERGE = 4, 2
# What stands in place of the content of a message, in the template of text.
CONTENT = "{{ message['content'] }}"
WITH_IMAGES = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)


def add_images(folder: Path) -> None:
    """To a checkpoint with the tokenizer of the tests."""
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "size": {"shortest_edge": 64, "longest_edge": 4096},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    like = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"] += [like | {"id": number, "content": text} for number, text in TOKENS.items()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = folder / "chat_template.jinja"
    source = template.read_text()
    assert CONTENT in source
    template.write_text(source.replace(CONTENT, WITH_IMAGES))


def make_png(width: int, height: int, seed: int = 0) -> bytes:
    """Of random pixels: one that is scaled or read in another order shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
