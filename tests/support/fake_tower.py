"""An encoder in this process, whose tower makes a token of each byte of a file."""

from __future__ import annotations

import threading

import numpy as np

from support.engine_pair import free_port
from waybill.engine.encoder.encoder_server import EncoderLimits, EncoderServer
from waybill.engine.encoder.tower import BadImageError, EncodedImage
from waybill.engine.ipc.sockets import CurveKeys, Endpoint

KEYS = CurveKeys.make()
FACTS = {"hidden_size": "4", "deepstack_levels": "0", "image_token_id": "9", "spatial_merge_size": "2"}
# Of a file.
MAX_BYTES = 100


def features_of(file: bytes) -> bytes:
    """A byte of the file is a token."""
    return np.frombuffer(file, dtype=np.uint8).astype(np.float32).repeat(int(FACTS["hidden_size"])).tobytes()


class FakeTower:
    """Waits where it is told to."""

    facts = FACTS

    def __init__(self, weights: str = "some") -> None:
        self.weights = weights
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.num_encoded = 0

    def encode(self, file: bytes) -> EncodedImage:
        self.may_go_on.wait()
        if file == b"bad":
            raise BadImageError("is bad")
        if file == b"fault":
            raise MemoryError("no memory")
        self.num_encoded += 1
        return EncodedImage(1, len(file), "float32", features_of(file))


def serve(tower: FakeTower, max_waiting: int = 8, cache_bytes: int = 1 << 10) -> Endpoint:
    where = Endpoint(f"tcp://127.0.0.1:{free_port()}", KEYS)
    server = EncoderServer(where, tower, EncoderLimits(max_waiting, cache_bytes, MAX_BYTES))
    threading.Thread(target=server.run, daemon=True).start()
    return where
