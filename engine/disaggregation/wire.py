"""What the two sides say to each other: the decode's side asks (DEALER), the prefill's answers (ROUTER).

A fetch has one answer: a part of what it asks for, as soon as there is some, or the end. So what is on its way is bounded
by the number of fetches, and a side that dies leaves nothing behind but a question. Bulk bytes are a frame of their own.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..io_struct import FirstToken, Logprobs

# Transports by which keys and values come, as a question names them.
CARRIERS = ("tcp", "shared", "nixl")
# Half-open.
Span = tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message to the bootstrap port: what must be alike on both sides, by name; nothing from who needs no pages."""

    facts: dict[str, str]


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Where pages (by dp and tp rank) and rows are to be had, from the engine of this name, which every fetch repeats."""

    incarnation: str
    pages: list[list[str]]
    routes: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The two sides do not go together."""

    error: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Is anybody there? From who has the pool of that generation mapped; 0: none."""

    pool: int = 0


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """Yes: the engine of this name; another engine has another. `pool` is the generation of its pool, 0 while that is given
    back."""

    incarnation: str
    pool: int = 0


class FetchPositions(msgspec.Struct, frozen=True, tag="fetch_positions"):
    """Keys and values of positions `[start, end)`; the answer brings at least one of them. With `start == end`: what the
    prefill has come to. `heads` of the asked rank, `[first, end)`; None: whatever a position has.

    `lease` is that of the answers so far, 0 for the first question: an answer says that it still lasts. `transport` is how
    they are to come: `tcp`, as bytes of the answer; `shared` or `nixl`, out of the asked rank's pool, of which generation
    `pool` can be reached from here; 0: none yet.
    """

    incarnation: str
    key: str
    attempt: int
    start: int
    end: int
    heads: tuple[int, int] | None
    lease: int = 0
    transport: str = "tcp"
    pool: int = 0


class FetchRoutes(msgspec.Struct, frozen=True, tag="fetch_routes"):
    """What steps have told of a prompt beside its pages: the rows of positions `rows`, half-open, and of its tokens'
    log-probabilities those with the numbers `scores`, likewise; the answer brings some of either, as they are filed.

    `lease` is that of the answers so far, 0 for the first question.
    """

    incarnation: str
    key: str
    attempt: int
    rows: Span
    scores: Span = (0, 0)
    lease: int = 0


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Nothing more will be fetched: it is all there, or (`error`) the request has ended without it."""

    key: str
    error: str = ""
    incarnation: str = ""


class Positions(msgspec.Struct, frozen=True, tag="positions"):
    """A frame with positions `[start, end)` follows, see `page_copy.py`."""

    key: str
    attempt: int
    start: int
    end: int
    lease: int


class PoolPositions(msgspec.Struct, frozen=True, tag="pool_positions"):
    """Positions `[start, end)` may be copied from the pool; `pages` are those that they are on. What was copied is
    worth something once a later question has been answered under the same lease."""

    key: str
    attempt: int
    start: int
    end: int
    lease: int
    pages: bytes  # int32


class HostProof(msgspec.Struct, frozen=True):
    """Who can read `content` at `path` is on the asked rank's host, by its user."""

    path: str
    content: bytes


class HostMemory(msgspec.Struct, frozen=True, tag="host"):
    """A memory file that others on the host can open at `path`."""

    proof: HostProof
    path: str


class DeviceMemory(msgspec.Struct, frozen=True, tag="device"):
    """Memory of a CUDA device: the handle of its allocation, see `cuda_ipc.py`, and where in it the pool begins."""

    proof: HostProof
    handle: bytes
    offset: int


class NixlMemory(msgspec.Struct, frozen=True, tag="nixl"):
    """Memory that an agent of NIXL has registered: `metadata` is what another agent needs to read it, `address` where the
    pool begins in the asked rank's process, `device` the number of its CUDA device there, or None on the host."""

    agent: str
    metadata: bytes
    address: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    device: Annotated[int, msgspec.Meta(ge=0, le=2**15)] | None


PoolMemory = HostMemory | DeviceMemory | NixlMemory


class PoolPlace(msgspec.Struct, frozen=True, tag="pool_place"):
    """In place of positions: where the pool is that they are in. `stacks` are offset and shape of its tensors, as
    `StackPlace` has them."""

    key: str
    attempt: int
    generation: int
    page_size: int
    num_bytes: int
    stacks: list[tuple[int, list[int]]]
    memory: PoolMemory


class Routes(msgspec.Struct, frozen=True, tag="routes"):
    """Rows `[start, end)`: frames follow with the ids and, where they are recorded, the combine weights.
    `weight_versions` are runs of positions. `missing`: why the other side has no rows, though it has the pages; then none
    come. `scores` are the next log-probabilities of the prompt, if there are some."""

    key: str
    attempt: int
    lease: int
    start: int
    end: int
    weight_versions: list[tuple[str, int, int]] = []
    missing: str = ""
    scores: Logprobs | None = None


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """There is no more to come; with an `error` what came before is worth nothing."""

    key: str
    attempt: int
    error: str = ""
    first: FirstToken | None = None


Fetch = FetchPositions | FetchRoutes
Request = Hello | Ping | Fetch | Release
Answer = Positions | PoolPositions | PoolPlace | Routes | Ended
Reply = Welcome | Refused | Pong | Answer


def difference(here: dict[str, str], there: dict[str, str]) -> str:
    """The first fact in which the sides differ, in words; empty if they go together."""
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            return f"{name}: {here.get(name)} on the prefill's side, {there.get(name)} on the decode's"
    return ""
