"""What a fault finds: a service, dice, and the witness beside it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from .http_service import HttpService
from .service import Service
from .witness import Judge, Witness, request_for


@dataclass
class Scene:
    """`faults` collects what should not have happened."""

    service: Service
    choose: random.Random
    judge: Judge
    witness: Witness
    seed: int
    faults: list[str] = field(default_factory=list)

    @property
    def server(self) -> HttpService:
        assert isinstance(self.service, HttpService), "the kind is for servers alone"
        return self.service

    def request(self, index: int, **fields: Any) -> dict[str, Any]:
        return request_for(self.judge.serial, index, self.service, self.choose, **fields)

    def name(self, suffix: object) -> str:
        """A request's name that no abort of others means."""
        return f"chaos-{self.seed}-{suffix}"
