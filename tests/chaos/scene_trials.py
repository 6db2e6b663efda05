"""Trials of a scene, that is processes which depend on each other, while callers are in the middle of something: what is
done with each of them, and what callers may see of it."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable, Collection, Container, Mapping
from itertools import groupby
from typing import Any, Protocol

from .kept import Kept, Result
from .service import Answer, GoneError, RefusedError
from .witness import Judge

# Until everything is stopped, as an operator does it, and started anew.
SERVICE_TRIALS = 10


class Scene(Protocol):
    """Lasts for some trials."""

    async def start(self) -> None: ...

    async def run(self, seed: int, kind: str) -> Result: ...

    async def stop(self) -> list[str]:
        """What is wrong then."""

    def clean_up(self) -> None:
        """Whatever is left, also where it was interrupted."""


class Scenes(Protocol):
    """A kind of scene."""

    name: str
    # Of each so many in a row of trials.
    kinds: Mapping[str, int]

    def transport_of(self, seed: int) -> str: ...

    def make(self, transport: str) -> Scene: ...


def kind_of(seed: int, kinds: Mapping[str, int]) -> str:
    deck = [kind for kind, count in kinds.items() for _ in range(count)]
    random.Random(seed // len(deck)).shuffle(deck)
    return deck[seed % len(deck)]


def trials_of(options: argparse.Namespace, kinds: Mapping[str, int], known: Container[int]) -> list[tuple[int, str]]:
    """Those that are asked for, less those whose results are `known`."""
    seeds = options.seed or range(options.first, options.first + options.trials)
    trials = [(seed, options.only if options.seed and options.only else kind_of(seed, kinds)) for seed in seeds]
    return [(seed, kind) for seed, kind in trials if options.only in (None, kind) and seed not in known]


async def campaign(options: argparse.Namespace, scenes: Scenes, kept: Kept) -> list[Result]:
    """The results of this run, each of them kept as soon as it is known."""
    results: list[Result] = []
    until = time.monotonic() + 60 * options.minutes
    trials = trials_of(options, scenes.kinds, kept.seeds(scenes.name))
    for (_, transport), some in groupby(trials, lambda one: (one[0] // SERVICE_TRIALS, scenes.transport_of(one[0]))):
        if time.monotonic() > until:
            break
        scene = scenes.make(transport)
        try:
            await scene.start()
            for seed, kind in some:
                if time.monotonic() > until:
                    break
                results.append(await scene.run(seed, kind))
                kept.add(results[-1])
                print(results[-1].line(), *(f"     {each}" for each in results[-1].faults), sep="\n", flush=True)
        finally:
            try:
                left = await scene.stop()
            finally:
                scene.clean_up()
            if left and results:
                results[-1].faults += left
                kept.add(results[-1])
                print(*(f"     at the end: {each}" for each in left), sep="\n", flush=True)
    return results


async def judge_answer(
    result: Result,
    judge: Judge,
    index: int,
    request: dict[str, Any],
    asking: Awaitable[Answer],
    harmless: Collection[str],
) -> None:
    """What a caller sees while the trial's fault happens: the right answer or, unless the kind is harmless, an error."""
    began = time.monotonic()
    try:
        answer = await asyncio.wait_for(asking, 4 * result.bound_s)
    except (GoneError, RefusedError) as error:
        result.num_errors += 1
        if result.kind in harmless:
            result.faults.append(f"an error: {error}")
    except TimeoutError:
        result.faults.append("no answer at all")
    except asyncio.CancelledError:
        result.num_left += 1
        raise
    else:
        fault = judge.fault(index, request, answer)
        result.num_right += fault is None
        if fault is not None:
            result.faults.append(fault)
    waited = time.monotonic() - began
    result.wait_s = max(result.wait_s, waited)
    if waited > result.bound_s:
        result.faults.append(f"waited {waited:.1f} s")
