"""Bodies that no client should send, of every endpoint, small and strange or large."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time

import httpx
from support.hostile_bodies import Fuzzer, fault_of

from .scene import Scene

NUM_FUZZED = 60
ANSWER_BOUND_S = 30.0
MIB = 1 << 20
# The server takes 64 MiB.
BEYOND_LIMIT = 65 * MIB


async def fuzzed_bodies(scene: Scene) -> str:
    """Small bodies from the fuzzer, eight at a time."""
    openapi = (await scene.server.http.get("/openapi.json")).json()
    bodies = iter(Fuzzer(openapi, scene.seed))
    some = iter([next(bodies) for _ in range(NUM_FUZZED)])

    async def work() -> None:
        for body in some:
            reply = await post(scene, body.path, body.content, body.content_type)
            if reply is not None and (fault := fault_of(reply)):
                scene.faults.append(f"{fault}: {body}")

    await asyncio.gather(*(work() for _ in range(8)))
    return f"{NUM_FUZZED} bodies"


async def large_bodies(scene: Scene) -> str:
    """Some MiB that cost far more to look at than to send."""
    told = []
    tasks = []
    for _ in range(scene.choose.randint(1, 3)):
        # Not on the loop, on which the witness waits.
        name, path, content = await asyncio.to_thread(large_body, scene.choose)
        told.append(f"{name} of {len(content) / MIB:.0f} MiB to {path}")
        tasks.append(send_large(scene, path, content, told[-1]))
    await asyncio.gather(*tasks)
    return "; ".join(told)


async def send_large(scene: Scene, path: str, content: bytes, what: str) -> None:
    began = time.monotonic()
    reply = await post(scene, path, content, "application/json")
    if reply is None:
        return
    if reply.status_code >= 500 and reply.status_code != 503:
        scene.faults.append(f"{what}: {reply.status_code} {reply.text[:200]}")
    if time.monotonic() - began > ANSWER_BOUND_S:
        scene.faults.append(f"{what}: answered after {time.monotonic() - began:.0f} s")


async def post(scene: Scene, path: str, content: bytes, content_type: str) -> httpx.Response | None:
    try:
        return await scene.server.http.post(path, content=content, headers={"content-type": content_type})
    except httpx.WriteError:
        # A server may close instead of reading a body that it does not want.
        return None
    except httpx.HTTPError as error:
        scene.faults.append(f"{path}, {len(content)} bytes: {error!r}")
        return None


def large_body(choose: random.Random) -> tuple[str, str, bytes]:
    """What it is, its path, and its bytes."""
    size = choose.choice((1, 2, 4, 8)) * MIB
    many = size // 4
    text = ("word " * (size // 5))[:size]
    wrong = choose.choice(('"a"', "[]", "{}", "null", "1.5", "true", "-1", "9e9"))
    items = "[" + ",".join([wrong] * (size // (len(wrong) + 1))) + "]"
    image = "data:image/png;base64," + base64.b64encode(choose.randbytes(size)).decode()
    plain = '"sampling_params":{"max_new_tokens":1'
    bodies = {
        "wrong ids": ("/generate", f'{{"input_ids":{items},{plain}}}}}'),
        "batch of wrong ids": ("/generate", f'{{"input_ids":[[1],{items}],{plain}}}}}'),
        "text": ("/generate", json.dumps({"text": text * 2})),
        "batch of texts": ("/generate", json.dumps({"text": ["ab"] * (many // 2)})),
        "sampling_params": ("/generate", f'{{"text":"a","sampling_params":{items}}}'),
        "stop": ("/generate", f'{{"text":"a",{plain},"stop":{items}}}}}'),
        "stop ids": ("/generate", f'{{"text":"a",{plain},"stop_token_ids":{items}}}}}'),
        "start_len": ("/generate", f'{{"text":"a","routed_experts_start_len":{items},{plain}}}}}'),
        "logit_bias": (
            "/generate",
            json.dumps({"text": "a", "sampling_params": {"logit_bias": {str(i): 1 for i in range(many // 4)}}}),
        ),
        "rid": ("/generate", json.dumps({"text": "a", "rid": text})),
        "depth": ("/generate", '{"text":' + "[" * many + "]" * many + "}"),
        "spaces": ("/generate", '{"text":' + " " * BEYOND_LIMIT + '"a"}'),
        "messages": ("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": text * 2}]})),
        "wrong messages": ("/v1/chat/completions", f'{{"messages":{items}}}'),
        "prompt": ("/v1/completions", json.dumps({"prompt": text * 2})),
        "wrong prompt": ("/v1/completions", f'{{"prompt":{items}}}'),
        "image": ("/generate", json.dumps({"input_ids": [1, 2], "image_data": image})),
        "image of many prompts": ("/generate", json.dumps({"input_ids": [[1, 2]] * 50, "image_data": image})),
        "many images": ("/generate", f'{{"text":"a","image_data":{items}}}'),
        "empty images": ("/generate", json.dumps({"text": ["a"] * 50, "image_data": [[""] * (many // 50)] * 50})),
        "image of a chat": (
            "/v1/chat/completions",
            json.dumps(
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}]}
            ),
        ),
        "text to tokenize": ("/tokenize", json.dumps({"prompt": text * 2})),
        "wrong tokens": ("/detokenize", f'{{"tokens":{items}}}'),
        "tokens": ("/detokenize", json.dumps({"tokens": [65] * many})),
        "rid to abort": ("/abort_request", json.dumps({"rid": "nobody" + text})),
        "no safetensors": (
            "/update_weights_from_tensor",
            json.dumps({"safetensors": base64.b64encode(choose.randbytes(size)).decode()}),
        ),
        "names": ("/update_weights_from_distributed", f'{{"names":{items},"dtypes":{items},"shapes":{items}}}'),
    }
    name = choose.choice(list(bodies))
    path, content = bodies[name]
    return name, path, content.encode()
