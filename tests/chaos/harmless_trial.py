"""A fault that no other client may notice: before it, beside it and after it a witness is answered, and nothing grows."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import httpx
import psutil

from .catalogue import SHORT
from .deck import Trial
from .hostile_bodies import fuzzed_bodies, large_bodies
from .hostile_clients import extreme_sampling, flood_of_aborts, leaving_clients, random_names
from .hostile_connections import connection_storm, new_connection_is_served, unfinished_requests, unread_streams
from .hostile_frames import claim_frames
from .hostile_operations import pauses, stop_and_continue, torn_updates
from .outcome import Outcome
from .scene import Scene
from .service import GoneError, RefusedError
from .shared_services import SharedService
from .witness import WITNESS_BOUND_S, Judge, Witness

FAULT_BOUND_S = 60.0
FAULTS: dict[str, Callable[[Scene], Awaitable[str]]] = {
    "fuzzed bodies": fuzzed_bodies,
    "large bodies": large_bodies,
    "unfinished requests": unfinished_requests,
    "connection storm": connection_storm,
    "unread streams": unread_streams,
    "claim frames": claim_frames,
    "extreme sampling": extreme_sampling,
    "leaving clients": leaving_clients,
    "flood of aborts": flood_of_aborts,
    "random names": random_names,
    "torn updates": torn_updates,
    "pauses": pauses,
    "stop and continue": stop_and_continue,
}


async def run_harmless(trial: Trial, shared: SharedService, judge: Judge) -> Outcome:
    began = time.monotonic()
    choose = trial.dice()
    # Dice of its own: how often it asks is a matter of time.
    witness = Witness(shared.service, judge, random.Random(f"{trial.seed}, witness"), SHORT)
    scene = Scene(shared.service, choose, judge, witness, trial.seed)
    outcome = Outcome(trial)
    await witness.ask()
    watching = asyncio.create_task(witness.run())
    try:
        outcome.what = await asyncio.wait_for(FAULTS[trial.kind](scene), FAULT_BOUND_S)
    except TimeoutError:
        scene.faults.append(f"the fault took more than {FAULT_BOUND_S:.0f} s")
    except (GoneError, RefusedError, httpx.HTTPError, psutil.NoSuchProcess, OSError) as error:
        scene.faults.append(f"the service cannot be reached: {error!r}")
    witness.stop.set()
    await watching
    witness.tolerates = set()
    await witness.ask()
    if trial.shape.kind == "server" and not witness.faults:
        await new_connection_is_served(scene)
    outcome.faults = scene.faults + witness.faults + await shared.faults()
    outcome.result = f"the witness has {witness.num_asked} answers"
    outcome.wait_s, outcome.bound_s = witness.worst_s, WITNESS_BOUND_S + witness.allowance_s
    outcome.seconds = time.monotonic() - began
    if outcome.faults:
        outcome.log = shared.service.last_words()
    return outcome
