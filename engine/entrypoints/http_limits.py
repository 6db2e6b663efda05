"""Bounds of the HTTP service on what clients send and how long they take. The options of `torchrun.sh serve` set them."""

from __future__ import annotations

import msgspec


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes, times in seconds.

    Raises:
        ValueError: a bound is out of range; the message names its flag.
    """

    # None: as many as the limit of open files allows, up to a default.
    max_connections: int | None = None
    max_header_bytes: int = 16 << 10
    header_timeout_s: float = 10.0
    max_body_bytes: int = 64 << 20
    max_inflight_body_bytes: int = 256 << 20
    # JSON values in one field of a body, token ids not counted.
    max_body_values: int = 1 << 18
    body_timeout_s: float = 60.0
    keep_alive_timeout_s: float = 30.0
    write_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_body_bytes", "max_body_values"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_of(name)} {value}: must be at least 1")
        if self.max_header_bytes < 1024:
            raise ValueError(f"--max-header-bytes {self.max_header_bytes}: must be at least 1024")
        if self.max_inflight_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"--max-inflight-body-bytes {self.max_inflight_body_bytes}: must be at least --max-body-bytes "
                f"{self.max_body_bytes}"
            )
        for name in ("header_timeout_s", "body_timeout_s", "keep_alive_timeout_s", "write_timeout_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{flag_of(name)} {value}: must be more than 0 seconds")


def flag_of(name: str) -> str:
    """The command line's name of a field."""
    return "--" + name.removesuffix("_s").replace("_", "-")
