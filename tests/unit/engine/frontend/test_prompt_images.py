"""Requests whose images are on their way: one image is asked for once, and an abort, or a caller that leaves, ends them at
once and leaves nothing. The encoder is a real one, behind a socket, but for its tower."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from support.fake_tower import FACTS, FakeTower, features_of, serve

from waybill.engine.config import EngineConfig
from waybill.engine.control.operations import PauseGeneration
from waybill.engine.frontend import prompt_images
from waybill.engine.frontend.admission import OverloadedError
from waybill.engine.frontend.generate_request import parse_generate_request
from waybill.engine.frontend.generation_gate import UnavailableError
from waybill.engine.frontend.tokenizer_manager import TokenizerManager
from waybill.engine.ipc.frontend_messages import AbortReq, ControlReply, FrontendMessage, TokenizedGenerateReqInput
from waybill.engine.ipc.sockets import Receiver
from waybill.engine.vision.image_memory import ImageMemory

WAIT_S = 20.0
ENGINE = {"context_length": 100, "kv_cache_tokens": 100, "vocab_size": 100, "num_layers": 1, **FACTS}
PLACEHOLDER = int(FACTS["image_token_id"])
PROMPT = [1, PLACEHOLDER, 2]
# Memory is counted in them.
PAGE = 4096


def image(file: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(file).decode()


class Wiring:
    """A manager with an encoder, and the socket of the engine's leader."""

    def __init__(self, folder: Path, context: zmq.Context[Any], **options: Any) -> None:
        self.tower = FakeTower()
        where = serve(self.tower)
        self.leader: Receiver[FrontendMessage] = Receiver(context, f"ipc://{folder}/leader", FrontendMessage)
        self.outputs = context.socket(zmq.PUSH)
        self.outputs.connect(f"ipc://{folder}/frontend")
        config = {"model_path": "m", "encoder": where.address.removeprefix("tcp://"), **options}
        self.manager = TokenizerManager(
            EngineConfig(**config),
            None,
            leaders=[f"ipc://{folder}/leader"],
            frontend=f"ipc://{folder}/frontend",
            queries=[f"ipc://{folder}/queries"],
            encoder=where,
        )

    def ask(self, images: Any, **fields: Any) -> asyncio.Task[Any]:
        async def first() -> Any:
            body = {"input_ids": PROMPT, "image_data": images, **fields}
            return await anext(self.manager.generate(parse_generate_request(body)))

        return asyncio.create_task(first())

    async def arrived(self, num: int) -> list[TokenizedGenerateReqInput]:
        """So many requests that the leader gets, and no more."""
        found: list[TokenizedGenerateReqInput] = []
        while len(found) < num:
            await asyncio.sleep(0.01)
            found += self._arrived()
        await asyncio.sleep(0.05)
        return found + self._arrived()

    def _arrived(self) -> list[TokenizedGenerateReqInput]:
        found = []
        while (message := self.leader.receive_nowait()) is not None:
            if isinstance(message, TokenizedGenerateReqInput):
                found.append(message)
            else:
                assert isinstance(message, AbortReq) or "operation" in type(message).__struct_fields__
        return found

    @property
    def state(self) -> dict[str, int | float]:
        assert self.manager.images is not None
        return self.manager.images.counters()

    async def are_encoding(self, num: int) -> None:
        while self.state["num_images_encoding"] != num:
            await asyncio.sleep(0.01)

    def num_pins(self) -> int:
        assert self.manager.images is not None
        return sum(image.num_pins for image in self.manager.images._store._images.values())


def run(folder: Path, check: Callable[[Wiring], Awaitable[None]], **options: Any) -> None:
    async def started() -> None:
        context = zmq.Context()
        wiring = Wiring(folder, context, **options)
        wiring.outputs.send(msgspec.msgpack.encode(ControlReply("ready", True, state=ENGINE)))
        await wiring.manager.start(WAIT_S)
        try:
            async with asyncio.timeout(WAIT_S):
                await check(wiring)
        finally:
            wiring.tower.may_go_on.set()
            wiring.manager.close()
            wiring.leader.close()
            context.destroy(linger=0)

    asyncio.run(started())


def test_a_leader_is_told_where_the_images_are(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        asked = wiring.ask([image(b"abcd" * 4)])
        (sent,) = await wiring.arrived(1)
        assert sent.num_prompt_tokens == 2 + 16
        (placed,) = sent.images
        memory = ImageMemory(0, int(FACTS["hidden_size"]))
        assert memory.rows(placed, 0, 16).numpy().tobytes() == features_of(b"abcd" * 4)
        assert memory.rows(placed, 3, 4).flatten().tolist() == [ord("d")] * 4
        memory.close()
        assert wiring.num_pins() == 2
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        # The engine has not told its end.
        assert wiring.num_pins() == 1

    run(tmp_path, check)


@pytest.mark.parametrize("how", ["rid", "prefix", "all", "exactly", "everybody", "pause"])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_an_abort_reaches_who_waits_for_an_image(tmp_path: Path, how: str, num_samples: int) -> None:
    async def check(wiring: Wiring) -> None:
        manager = wiring.manager
        wiring.tower.may_go_on.clear()
        asked = wiring.ask(image(b"one"), rid="one", sampling_params={"n": num_samples})
        other = wiring.ask(image(b"one"), rid="other")
        await wiring.are_encoding(1)
        pause: asyncio.Task[Any] | None = None
        if how in ("rid", "prefix", "all"):
            manager.abort_request(
                {"rid": "one", "prefix": "on", "all": ""}[how], abort_all=how == "all", message="enough"
            )
        elif how == "pause":
            pause = asyncio.create_task(manager.controls.run(PauseGeneration("abort")))
        else:
            told = await manager.abort_exactly(["one"] if how == "exactly" else None)
            assert told == num_samples + (how == "everybody")
        # The tower still works at it.
        answers = await asked
        for answer in [answers] if num_samples == 1 else answers:
            assert answer["meta_info"]["finish_reason"]["type"] == "abort"
            # As it came: how many tokens the image has is not known.
            assert answer["meta_info"]["prompt_tokens"] == 3 and answer["output_ids"] == []
        if how in ("all", "everybody", "pause"):
            assert (await other)["meta_info"]["finish_reason"]["type"] == "abort"
            assert manager.num_unfinished == 0
            wiring.tower.may_go_on.set()
            await wiring.are_encoding(0)
        else:
            await asyncio.sleep(0.05)
            assert not other.done() and manager.num_unfinished == 1
            wiring.tower.may_go_on.set()
            assert [sent.rid for sent in await wiring.arrived(1)] == ["other"]
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)
        assert wiring.num_pins() == (0 if how in ("all", "everybody", "pause") else 1)
        assert wiring.state["num_images_kept"] == 1 and wiring.tower.num_encoded == 1
        assert len(manager._waiting._waiting) == 0
        if pause is not None:
            pause.cancel()

    run(tmp_path, check)


def test_of_a_batch_the_others_go_on(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        wiring.tower.may_go_on.clear()
        batch = wiring.ask(image(b"one"), input_ids=[PROMPT, PROMPT, PROMPT], rid=["a", "b", "ab"], stream=True)
        await wiring.are_encoding(1)
        assert await wiring.manager.abort_exactly(["a"]) == 1
        wiring.tower.may_go_on.set()
        assert [sent.rid for sent in await wiring.arrived(2)] == ["b", "ab"]
        assert (await batch)["meta_info"]["finish_reason"]["type"] == "abort"

    run(tmp_path, check)


def test_a_caller_that_leaves_leaves_nothing(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        wiring.tower.may_go_on.clear()
        asked = wiring.ask([image(b"one"), image(b"two")])
        await wiring.are_encoding(2)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert wiring.manager.num_unfinished == 0 and len(wiring.manager._waiting._waiting) == 0
        wiring.tower.may_go_on.set()
        # What is encoded is kept.
        await wiring.are_encoding(0)
        assert wiring.state["num_images_kept"] == 2 and wiring.num_pins() == 0
        assert await wiring.arrived(0) == []

    run(tmp_path, check)


def test_an_image_of_a_whole_batch_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    read = prompt_images.read_image
    monkeypatch.setattr(prompt_images, "read_image", lambda source, field: sources.append(field) or read(source, field))

    async def check(wiring: Wiring) -> None:
        batch = wiring.ask(image(b"one"), input_ids=[PROMPT] * 50)
        assert len(await wiring.arrived(50)) == 50
        assert sources == ["image_data.0.0"] and wiring.tower.num_encoded == 1
        batch.cancel()
        await asyncio.gather(batch, return_exceptions=True)
        # Each until its end is told.
        assert wiring.num_pins() == 50

    run(tmp_path, check)


def end(wiring: Wiring, *rids: str) -> None:
    """The engine has told it."""
    for rid in rids:
        wiring.manager._at_engine.end(rid)


async def leave(*asked: asyncio.Task[Any]) -> None:
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


def test_images_take_turns_where_there_is_room_for_one(tmp_path: Path) -> None:
    """In the order in which they came, as their predecessors end; one that is known waits behind those before it."""

    async def check(wiring: Wiring) -> None:
        asked = [wiring.ask(image(b"a"), rid="0")]
        await wiring.arrived(1)
        for number, file in enumerate((b"b", b"c", b"a", b"d"), start=1):
            asked.append(wiring.ask(image(file), rid=str(number)))
            while wiring.state["num_waiting_for_image_room"] != number:
                await asyncio.sleep(0.01)
        assert await wiring.arrived(0) == []
        # One that leaves is no hindrance.
        await leave(asked[2])
        for last, following in (("0", "1"), ("1", "3"), ("3", "4")):
            await leave(asked[int(last)])
            end(wiring, last)
            assert [sent.rid for sent in await wiring.arrived(1)] == [following]
            assert wiring.state["image_memory_used_bytes"] == PAGE
        assert wiring.state["num_waiting_for_image_room"] == 0
        await leave(*asked)
        end(wiring, "4")
        assert wiring.num_pins() == 0

    run(tmp_path, check, image_memory_bytes=PAGE)


def test_requests_with_several_images_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Each of two has one of its images, and there is room for no more: neither may keep it and wait."""

    async def check(wiring: Wiring) -> None:
        wiring.tower.may_go_on.clear()
        asked = [wiring.ask([image(b"%d" % i) for i in (n, n + 1)], rid=str(n), input_ids=TWO) for n in (1, 3, 5)]
        await wiring.are_encoding(6)
        wiring.tower.may_go_on.set()
        arrived = await wiring.arrived(1)
        while len(arrived) < 3:
            end(wiring, arrived[-1].rid)
            await leave(asked[int(arrived[-1].rid) // 2])
            arrived += await wiring.arrived(1)
        assert {sent.rid for sent in arrived} == {"1", "3", "5"}
        await leave(*asked)

    run(tmp_path, check, image_memory_bytes=2 * PAGE)


TWO = [1, PLACEHOLDER, 2, PLACEHOLDER]


def test_who_waits_for_room_does_not_have_images_encoded_meanwhile(tmp_path: Path) -> None:
    """There is room for one of its two: it waits for both, since the first would go for the second, and so on."""

    async def check(wiring: Wiring) -> None:
        running = wiring.ask([image(b"a"), image(b"b")], rid="a", input_ids=TWO)
        await wiring.arrived(1)
        behind = wiring.ask([image(b"c"), image(b"d")], rid="b", input_ids=TWO)
        while not wiring.state["num_waiting_for_image_room"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        # Those that run, and one attempt, or two, of who waits.
        assert wiring.state["num_images_encoded"] <= 6
        await leave(running)
        end(wiring, "a")
        assert [sent.rid for sent in await wiring.arrived(1)] == ["b"]
        await leave(behind)

    run(tmp_path, check, image_memory_bytes=3 * PAGE)


def test_nobody_waits_for_room_for_ever(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        asked = wiring.ask(image(b"a"), rid="a")
        await wiring.arrived(1)
        with pytest.raises(
            OverloadedError, match=r"no room for the request's images within 0.5 s .*--image-memory-bytes"
        ):
            await wiring.ask(image(b"b"))
        # And an abort ends it at once.
        waiting = wiring.ask(image(b"b"), rid="b")
        while not wiring.state["num_waiting_for_image_room"]:
            await asyncio.sleep(0.01)
        wiring.manager.abort_request("b", message="enough")
        assert (await waiting)["meta_info"]["finish_reason"]["type"] == "abort"
        assert wiring.state["num_waiting_for_image_room"] == 0 and wiring.num_pins() == 2
        await leave(asked)

    run(tmp_path, check, image_memory_bytes=PAGE, encoder_timeout_s=0.5)


def test_images_that_never_fit_together_are_the_callers_mistake(tmp_path: Path) -> None:
    """At once, or when its turn comes; the same image twice takes room for one."""

    async def check(wiring: Wiring) -> None:
        three = [image(b"%d" % i) for i in range(3)]
        with pytest.raises(
            ValueError, match=rf"image_data: .* {3 * PAGE} bytes or more .* at most {2 * PAGE} together"
        ):
            await wiring.ask(three, input_ids=[*TWO, PLACEHOLDER])
        assert wiring.num_pins() == 0
        running = wiring.ask(image(b"a"), rid="a")
        await wiring.arrived(1)
        waiting = wiring.ask(three, input_ids=[*TWO, 3, PLACEHOLDER])
        while not wiring.state["num_waiting_for_image_room"]:
            await asyncio.sleep(0.01)
        behind = wiring.ask([image(b"b")] * 2 + [image(b"c")], input_ids=[*TWO, 3, PLACEHOLDER], rid="b")
        await leave(running)
        end(wiring, "a")
        with pytest.raises(ValueError, match="bytes or more when encoded"):
            await waiting
        assert [sent.rid for sent in await wiring.arrived(1)] == ["b"]
        await leave(behind)

    run(tmp_path, check, image_memory_bytes=2 * PAGE)


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        for images, message in (
            (image(b"bad"), "image_data.0: the image is bad"),
            ("", "image_data.0: the image is empty"),
            ([image(b"a"), ""], "image_data.1: the image is empty"),
        ):
            with pytest.raises(ValueError, match=message):
                await wiring.ask(images)
        with pytest.raises(ValueError, match=r"image_data.0: the image has 101 bytes, must have at most 100"):
            await wiring.ask(image(b"a" * 101))
        with pytest.raises(UnavailableError, match="MemoryError: no memory"):
            await wiring.ask(image(b"fault"))
        with pytest.raises(ValueError, match="image_data: has 1 entries, must have one per prompt, 2"):
            await wiring.ask([image(b"a")], input_ids=[PROMPT, PROMPT])
        with pytest.raises(ValueError, match="sampling_params: has 1 entries, must have one per prompt, 2"):
            await wiring.ask(None, input_ids=[PROMPT, PROMPT], sampling_params=[{}])
        assert wiring.manager.num_unfinished == 0 and wiring.num_pins() == 0
        assert len(wiring.manager._waiting._waiting) == 0

    run(tmp_path, check)


def test_an_image_that_can_never_be_kept_is_the_callers_mistake(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        with pytest.raises(ValueError, match=r"image_data.0: the image takes 4096 bytes .*at most 100 .*image-memory"):
            await wiring.ask(image(b"a"))

    run(tmp_path, check, image_memory_bytes=100)
