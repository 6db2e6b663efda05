"""The vision tower of a checkpoint, from stock `transformers`, with the checkpoint's image processor: from an image's file
to what takes the place of its tokens."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..models.checkpoint import Checkpoint
from ..models.registry import load_model_config_of
from ..routing.hf_config import read_hf_config

PREFIX = "model.visual."
# Of an image processor: what else decides than how large an image is made.
PIXELS = ("rescale_factor", "image_mean", "image_std")
# That Pillow may read. Others have decoders that run programs (EPS), or that nobody looks after.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


class BadImageError(ValueError):
    """What came is no image that can be encoded; the caller's mistake."""


@dataclass(frozen=True)
class ImageLimits:
    """Of one image: its file, and what it is unpacked to."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True)
class EncodedImage:
    """`features` are the bytes of [height * width, 1 + levels, D]."""

    height: int
    width: int
    dtype: str
    features: bytes


class VisionTower:
    """
    Raises:
        ValueError: the checkpoint has no vision tower, or no image processor.
    """

    def __init__(self, model_path: str, device: str, dtype: str, limits: ImageLimits) -> None:
        config = load_model_config_of(model_path, dtype)
        if config.vision is None:
            raise ValueError(f"model_path={model_path!r}: a {config.model_type} model has no vision tower")
        self._vision = config.vision
        self._limits = limits
        self.dtype = config.dtype_name
        self.facts = config.vision_facts
        self._processor = load_processor(model_path)
        # Else a device rounds the inputs of convolutions to 10 bits behind the point, also in float32.
        torch.backends.cudnn.allow_tf32 = False
        model = load_tower(model_path, config.dtype)
        self.weights = weights_of(model, {name: getattr(self._processor, name) for name in PIXELS})
        self._model = model.to(device)
        self._device = device

    def encode(self, file: bytes) -> EncodedImage:
        """
        Raises:
            BadImageError: it is none, or larger than the limits.
        """
        image = open_image(file, self._limits)
        try:
            made = self._processor(images=[image], return_tensors="pt")
        except ValueError as error:
            raise BadImageError(f"is refused by the image processor: {error}") from error
        grid, merge = made["image_grid_thw"], self._vision.spatial_merge_size
        time, height, width = grid[0].tolist()
        assert time == 1, "an image has one frame"
        with torch.inference_mode():
            pixels = made["pixel_values"].to(self._device, self._model.dtype)
            out = self._model(pixels, grid_thw=grid.to(self._device), return_dict=True)
            features = torch.stack([out.pooler_output, *out.deepstack_features], dim=1).cpu().contiguous()
        return EncodedImage(height // merge, width // merge, self.dtype, features.view(torch.uint8).numpy().tobytes())


def open_image(file: bytes, limits: ImageLimits) -> Any:
    """An image in RGB, unpacked and turned upright, as `load_image` of `transformers` makes it: the first frame of several,
    and without transparency.

    Raises:
        BadImageError: see `VisionTower.encode`.
    """
    # The encoder alone needs it.
    from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415

    if len(file) > limits.max_bytes:
        raise BadImageError(f"has {len(file)} bytes, must have at most {limits.max_bytes} (--max-image-bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(file), formats=FORMATS)
            width, height = image.size
            if width * height > limits.max_pixels:
                raise BadImageError(
                    f"is {width} x {height}, must have at most {limits.max_pixels} pixels (--max-image-pixels)"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"is in none of the formats {', '.join(FORMATS)}") from error
    # Decoders raise what they like on a broken file.
    except Exception as error:
        raise BadImageError(f"cannot be read: {error}") from error


def load_processor(model_path: str) -> Any:
    """The checkpoint's image processor, on Pillow.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoImageProcessor  # noqa: PLC0415

    try:
        return AutoImageProcessor.from_pretrained(model_path, backend="pil", local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model_path={model_path!r}: its image processor cannot be loaded: {error}") from error


def load_tower(model_path: str, dtype: torch.dtype) -> Any:
    """The tower alone, of a checkpoint whose other tensors are not read.

    Raises:
        ValueError: tensors are missing, or of another shape.
    """
    from transformers import AutoModel  # noqa: PLC0415

    model = AutoModel.from_config(read_hf_config(model_path).vision_config, dtype=dtype)
    try:
        model.load_state_dict(dict(tower_tensors(model_path)), strict=True)
    except RuntimeError as error:
        raise ValueError(f"model_path={model_path!r}: the vision tower's tensors do not fit: {error}") from error
    return model.eval().requires_grad_(False)


def weights_of(model: torch.nn.Module, pixels: dict[str, Any]) -> str:
    """The SHA-256 of a tower on the CPU, and of how pixels become its inputs: wherever its file is, and on whatever device
    it runs then."""
    digest = hashlib.sha256(json.dumps(pixels, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tower_tensors(model_path: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file, names in Checkpoint(model_path).files:
        wanted = [name for name in names if name.startswith(PREFIX)]
        if not wanted:
            continue
        with safe_open(Path(file.path), framework="pt") as opened:
            for name in wanted:
                yield name.removeprefix(PREFIX), opened.get_tensor(name)
