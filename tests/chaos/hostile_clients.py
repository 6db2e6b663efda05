"""Well-formed requests that nobody means well with: extreme values, names, aborts, clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from support.serial_run import VOCAB_SIZE

from .catalogue import SHORT
from .scene import Scene
from .service import GoneError, RefusedError

NUM_MODEL_IDS = 264
HOPELESS = ("no token can be chosen", "not finite numbers")
EXTREMES: dict[str, tuple[Any, ...]] = {
    "temperature": (1e39, 1e38, 1e30, 1e-30, 1e-45, 0.0, 1e6, 5.0),
    "top_p": (1e-30, 1e-9, 0.5, 1.0),
    "top_k": (1, 2, 5, 264, 2**31 - 1),
    "min_p": (0.0, 1.0, 0.999999),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-30, 1e-6, 0.01, 1.0, 2.0, 1e6, 1e30),
    "min_new_tokens": (0, 1, 3),
    "logit_bias": (
        {"5": 1e30},
        {"5": -1e30},
        {str(i): -1e30 for i in range(NUM_MODEL_IDS)},
        {str(i): 1e30 * (-1) ** i for i in range(NUM_MODEL_IDS)},
        {str(i): 3.4e38 for i in range(10)},
    ),
    "stop_token_ids": ([5], list(range(128))),
    "stop": (["\ufffd"], ["<|user|>"], ["a", "b" * 1000]),
    "sampling_seed": (0, 2**31 - 1, 2**63 - 1, -1),
}


async def answered_or_refused(scene: Scene, what: str, asking: Awaitable[Any]) -> Any:
    """The answer; None where the service refused in good form."""
    try:
        return await asking
    except RefusedError as error:
        if error.status >= 500 and error.status != 503:
            # A request whose scores leave no token to choose fails alone, and by that name.
            if any(words in str(error) for words in HOPELESS):
                return None
            scene.faults.append(f"{what}: {error}")
    except GoneError as error:
        scene.faults.append(f"{what}: {error}")
    return None


async def extreme_sampling(scene: Scene) -> str:
    """Values at the ends of their ranges, together."""
    choose = scene.choose
    tasks = []
    for _ in range(12):
        names = choose.sample(list(EXTREMES), choose.randint(1, 4))
        params = {"max_new_tokens": choose.randint(1, 5), **{name: choose.choice(EXTREMES[name]) for name in names}}
        request = {"input_ids": choose.choices(range(VOCAB_SIZE), k=9), "sampling_params": params}
        if choose.random() < 0.5:
            request |= {"return_logprob": True, "top_logprobs_num": choose.choice((0, 5)), "logprob_start_len": 0}
        tasks.append(extreme_request(scene, request))
    await asyncio.gather(*tasks)
    return "12 requests"


async def extreme_request(scene: Scene, request: dict[str, Any]) -> None:
    what = str(request["sampling_params"])[:200]
    answer = await answered_or_refused(scene, what, scene.service.generate(request))
    if answer is not None and not all(0 <= token < NUM_MODEL_IDS for token in answer.output):
        scene.faults.append(f"{what}: tokens beyond the vocabulary: {answer.output}")


async def leaving_clients(scene: Scene) -> str:
    """Streams left after some chunks, and whole requests left unanswered; nobody aborts them by name."""
    choose = scene.choose
    number = choose.randint(6, 16)
    tasks = []
    for index in range(number):
        question = choose.randrange(len(scene.judge.serial.catalogue))
        request = scene.request(question, rid=scene.name(index))
        if choose.random() < 0.7:
            tasks.append(leave_stream(scene, request, question, choose.randint(1, 8)))
        else:
            tasks.append(leave_unanswered(scene, request, choose.uniform(0.0, 0.3)))
    await asyncio.gather(*tasks)
    return f"{number} clients"


async def leave_stream(scene: Scene, request: dict[str, Any], question: int, after: int) -> None:
    answer = await answered_or_refused(scene, "a stream", scene.service.stream(request, leave_after=after))
    if answer is not None and (fault := scene.judge.fault(question, request, answer, whole=False)):
        scene.faults.append(fault)


async def leave_unanswered(scene: Scene, request: dict[str, Any], after_s: float) -> None:
    asking = asyncio.create_task(scene.service.generate(request))
    await asyncio.wait([asking], timeout=after_s)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def flood_of_aborts(scene: Scene) -> str:
    """Requests and aborts at once: of each other, of nobody, again and again; what comes back is a beginning."""
    choose = scene.choose
    number = choose.randint(5, 15)
    rids = [
        choose.choice((scene.name(""), scene.name(choose.randrange(number)), "nobody", "x" * 400)) for _ in range(80)
    ]
    pauses = [choose.uniform(0.0, 0.03) for _ in rids]
    questions = [choose.randrange(len(scene.judge.serial.catalogue)) for _ in range(number)]
    requests = [scene.request(question, rid=scene.name(f"{index}-")) for index, question in enumerate(questions)]

    async def ask(question: int, request: dict[str, Any]) -> None:
        answer = await answered_or_refused(scene, "an aborted request", scene.service.generate(request))
        if answer is not None and (fault := scene.judge.fault(question, request, answer, whole=False)):
            scene.faults.append(fault)

    async def abort(share: slice) -> None:
        for rid, pause in zip(rids[share], pauses[share], strict=True):
            await answered_or_refused(scene, "an abort", scene.service.abort(rid))
            await asyncio.sleep(pause)

    asking = [ask(question, request) for question, request in zip(questions, requests, strict=True)]
    await asyncio.gather(abort(slice(0, 40)), abort(slice(40, 80)), *asking)
    return f"80 aborts over {number} requests"


async def random_names(scene: Scene) -> str:
    """Keys of the prefix cache, sessions and priorities without end; answers are the serial run's all the same."""
    choose = scene.choose
    number = choose.randint(10, 30)

    def some_name() -> str:
        return "".join(choose.choices('ab\u00e9\U0001f600\0\n"{', k=choose.randint(1, 512)))

    def some_request(question: int) -> dict[str, Any]:
        fields: dict[str, Any] = {"extra_key": some_name(), "session_id": some_name()}
        if choose.random() < 0.5:
            fields["priority"] = choose.choice((-(2**31), 2**31 - 1, 0))
        return scene.request(question, **fields)

    async def ask(question: int, request: dict[str, Any]) -> None:
        answer = await answered_or_refused(scene, "a named request", scene.service.generate(request))
        if answer is not None and (fault := scene.judge.fault(question, request, answer)):
            scene.faults.append(fault)

    # Short ones: the keys are what costs.
    questions = [choose.choice(SHORT) for _ in range(number)]
    await asyncio.gather(*(ask(question, some_request(question)) for question in questions))
    return f"{number} requests"
