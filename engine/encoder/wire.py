"""What a frontend (DEALER) and an encoder (ROUTER) say to each other. Each question has one answer; bulk bytes are a frame
of their own."""

from __future__ import annotations

import msgspec

DIGEST_BYTES = 32


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """What must be alike in the engine's model and the encoder's, by name."""

    facts: dict[str, str]


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """They are; the encoder of this name answers, and takes images of so many bytes. Encoders of the same `weights` make
    the same of an image."""

    incarnation: str
    max_image_bytes: int
    weights: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """They are not."""

    error: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Is anybody there?"""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """Yes: the encoder of this name, in which so many images wait or are encoded."""

    incarnation: str
    num_waiting: int = 0


class Encode(msgspec.Struct, frozen=True, tag="encode"):
    """A frame with the image's file follows, of this SHA-256. It is for the encoder of this name, and no other one."""

    number: int
    incarnation: str
    digest: bytes


class Encoded(msgspec.Struct, frozen=True, tag="encoded"):
    """A frame follows with what the tower has made of the image's grid of tokens: [height * width, 1 + levels, D]."""

    number: int
    height: int
    width: int
    dtype: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """`kind`: the image is bad, the encoder has too much to do, or a fault of the encoder's."""

    number: int
    kind: str
    error: str


BAD_IMAGE, OVERLOADED, FAULT = "bad_image", "overloaded", "fault"
# Of an engine, see `ModelConfig.vision_facts`.
FACTS = ("hidden_size", "deepstack_levels", "image_token_id", "spatial_merge_size")
Request = Hello | Ping | Encode
Reply = Welcome | Refused | Pong | Encoded | Failed


def difference(engine: dict[str, str], encoder: dict[str, str]) -> str:
    """The first fact in which they differ, in words; empty if they go together."""
    for name in sorted(engine.keys() | encoder.keys()):
        if engine.get(name) != encoder.get(name):
            return f"{name}: {engine.get(name)} in the engine, {encoder.get(name)} in the encoder"
    return ""
