"""A frontend's line to its encoder, over real sockets: whatever happens there, a question ends."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from chaos.sides import shut
from support.engine_pair import free_port
from support.fake_tower import FACTS, KEYS, FakeTower, features_of, serve

from waybill.engine.encoder import encoder_client
from waybill.engine.encoder.encoder_client import EncoderClient, EncoderError, ImageRefusedError
from waybill.engine.encoder.encoder_server import EncodedCache
from waybill.engine.encoder.tower import EncodedImage
from waybill.engine.ipc.sockets import CurveKeys, Endpoint


def use(where: Endpoint, talk: Callable[[EncoderClient], Any], timeout_s: float = 5.0, **facts: str) -> list[str]:
    """Runs `talk`; the names of the encoders that came."""
    seen: list[str] = []

    async def run() -> None:
        client = EncoderClient(where, facts or FACTS, timeout_s, seen.append)
        client.start()
        try:
            await talk(client)
        finally:
            client.close()

    asyncio.run(run())
    return seen


def ask(client: EncoderClient, file: bytes) -> Any:
    return client.encode(hashlib.sha256(file).digest(), file)


def test_answers_and_refusals() -> None:
    tower = FakeTower()

    async def talk(client: EncoderClient) -> None:
        first, again = await ask(client, b"image"), await ask(client, b"image")
        assert bytes(first.data) == bytes(again.data) == features_of(b"image") and first.width == 5
        assert tower.num_encoded == 1
        with pytest.raises(ImageRefusedError, match="is bad"):
            await ask(client, b"bad")
        with pytest.raises(ImageRefusedError, match="at most 100"):
            await ask(client, b"x" * 101)
        with pytest.raises(EncoderError, match=r"127\.0\.0\.1:\d+: MemoryError: no memory"):
            await ask(client, b"fault")
        with pytest.raises(EncoderError, match="another SHA-256"):
            await client.encode(b"0" * 32, b"image")
        assert client.problem is None and client.num_waiting == 0

    assert len(use(serve(tower), talk)) == 1


def test_a_question_for_an_encoder_that_is_gone_is_none_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come to the next one, which has other weights perhaps, before that is known."""
    tower = FakeTower()

    async def talk(client: EncoderClient) -> None:
        await ask(client, b"image")
        monkeypatch.setattr(client, "_incarnation", "the one before")
        with pytest.raises(EncoderError, match="has been started anew"):
            await ask(client, b"another")
        assert tower.num_encoded == 1

    use(serve(tower), talk)


def test_features_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks would read what is not there, or another token's."""
    tower = FakeTower()
    monkeypatch.setattr(tower, "encode", lambda file: EncodedImage(1, len(file), "float32", features_of(file)[:-4]))

    async def talk(client: EncoderClient) -> None:
        with pytest.raises(EncoderError, match="has sent 76 bytes for Encoded"):
            await ask(client, b"image")

    use(serve(tower), talk)


def test_two_frontends_ask_for_the_same_images_at_once() -> None:
    """As the sides of a request with several do: each is encoded once, also where nothing is kept."""
    tower = FakeTower()
    where = serve(tower, cache_bytes=0)

    async def talk(one: EncoderClient) -> None:
        other = EncoderClient(where, FACTS, 5.0, lambda name: None)
        other.start()
        tower.may_go_on.clear()
        asking = []
        for client in (one, other):
            asking += [asyncio.create_task(ask(client, file)) for file in (b"a", b"bb", b"bad")]
            await asyncio.sleep(0.3)
        tower.may_go_on.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        for a, b, bad in (answers[:3], answers[3:]):
            assert (bytes(a.data), bytes(b.data)) == (features_of(b"a"), features_of(b"bb"))
            assert a.weights == tower.weights and isinstance(bad, ImageRefusedError)
        assert tower.num_encoded == 2
        await ask(one, b"a")
        assert tower.num_encoded == 3
        other.close()

    use(where, talk)


def test_a_slow_tower_and_a_full_queue() -> None:
    tower = FakeTower()
    where = serve(tower, max_waiting=1)

    async def talk(client: EncoderClient) -> None:
        await ask(client, b"first")
        tower.may_go_on.clear()
        running = asyncio.create_task(ask(client, b"running"))
        await asyncio.sleep(0.3)
        waiting = asyncio.create_task(ask(client, b"waiting"))
        await asyncio.sleep(0.3)
        with pytest.raises(EncoderError, match="1 images wait already"):
            await ask(client, b"more")
        # What is known is answered all the same.
        assert bytes((await ask(client, b"first")).data) == features_of(b"first")
        with pytest.raises(EncoderError, match=r"has not encoded an image within 2 s \(--encoder-timeout\)"):
            await running
        waiting.cancel()
        tower.may_go_on.set()
        await asyncio.sleep(0.3)
        assert bytes((await ask(client, b"waiting")).data) == features_of(b"waiting")
        assert client.num_waiting == 0

    use(where, talk, timeout_s=2.0)


def test_a_connection_that_is_cut() -> None:
    """Who waits is told at once; the next one makes another connection."""
    tower = FakeTower()
    where = serve(tower)
    port = int(where.address.rpartition(":")[2])

    async def talk(client: EncoderClient) -> None:
        await ask(client, b"first")
        tower.may_go_on.clear()
        waiting = asyncio.create_task(ask(client, b"waiting"))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        for connection in psutil.Process().net_connections("tcp"):
            if connection.raddr and connection.raddr.port == port:
                shut(os.getpid(), connection.fd)
        with pytest.raises(EncoderError, match="the connection has ended"):
            await waiting
        assert time.monotonic() - began < 2.0
        tower.may_go_on.set()
        assert bytes((await ask(client, b"second")).data) == features_of(b"second")
        assert client.problem is None and client.num_waiting == 0

    assert len(use(where, talk)) == 1


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_client, "DOWN_S", 1.0)
    monkeypatch.setattr(encoder_client, "PING_S", 0.1)

    async def talk(client: EncoderClient) -> None:
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(EncoderError, match="does not answer"):
                await ask(client, b"image")
        assert time.monotonic() - began < 3.0
        assert client.problem is not None

    use(Endpoint(f"tcp://127.0.0.1:{free_port()}", KEYS), talk)


def test_another_model_and_another_key() -> None:
    where = serve(FakeTower())

    async def talk(client: EncoderClient) -> None:
        with pytest.raises(EncoderError, match="hidden_size: 5 in the engine, 4 in the encoder"):
            await ask(client, b"image")

    assert use(where, talk, **{**FACTS, "hidden_size": "5"}) == []

    async def is_refused(client: EncoderClient) -> None:
        with pytest.raises(EncoderError):
            await ask(client, b"image")

    assert use(Endpoint(where.address, CurveKeys.make()), is_refused, timeout_s=1.0) == []


def test_what_is_kept_is_bounded() -> None:
    cache = EncodedCache(10)
    for name in (b"a", b"b", b"c"):
        cache.add(name, EncodedImage(1, 1, "float32", name * 4))
    assert cache.get(b"a") is None and cache.get(b"c") is not None and cache.num_bytes == 8
    cache.add(b"d", EncodedImage(1, 1, "float32", b"d" * 11))
    assert cache.num_bytes == 0
