"""Sockets between nodes: encrypted, and closed to who does not have the run's keys."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from waybill.engine.ipc.curve import CurveGuard
from waybill.engine.ipc.frontend_messages import SeqNotice
from waybill.engine.ipc.sockets import AsyncReceiver, CurveKeys, Endpoint, Receiver, Sender

REFUSED_S = 0.4
ARRIVES_S = 5.0


def listening(keys: CurveKeys) -> Endpoint:
    listener = socket.create_server(("127.0.0.1", 0))
    return Endpoint(f"tcp://127.0.0.1:{listener.getsockname()[1]}", keys, listener.detach())


def clients(keys: CurveKeys, address: str) -> dict[str, zmq.Socket[Any]]:
    """Who knows less than the run's keys, and has sent a valid message: nothing, the public keys, another run's."""
    message = msgspec.msgpack.encode(SeqNotice(7))
    other = CurveKeys.make()
    credentials = {
        "no encryption": None,
        "another client key": (keys.server_public, other.client_public, other.client_secret),
        "another server key": (other.server_public, keys.client_public, keys.client_secret),
        "another client secret": (keys.server_public, keys.client_public, other.client_secret),
    }
    sockets = {}
    for name, known in credentials.items():
        client = zmq.Context.instance().socket(zmq.PUSH)
        client.linger = 0
        if known is not None:
            client.curve_serverkey, client.curve_publickey, client.curve_secretkey = known
        client.connect(address)
        # Who is refused before the message is sent has nobody to send it to, and would wait for ever.
        with suppress(zmq.Again):
            client.send(message, zmq.DONTWAIT)
        sockets[name] = client
    return sockets


def test_only_who_has_the_runs_keys_is_heard() -> None:
    keys, context = CurveKeys.make(), zmq.Context()
    endpoint = listening(keys)
    guard = CurveGuard(context, [endpoint])
    inbox: Receiver[SeqNotice] = Receiver(context, endpoint, SeqNotice)
    refused = clients(keys, endpoint.address)
    assert not inbox.wait(REFUSED_S), "a client was heard"
    sender: Sender[SeqNotice] = Sender(context, Endpoint(endpoint.address, keys))
    sender.send(SeqNotice(1))
    assert inbox.wait(ARRIVES_S) and inbox.receive_nowait() == SeqNotice(1)
    assert not inbox.wait(REFUSED_S), "a client was heard"
    for client in refused.values():
        client.close()
    guard.close()
    context.destroy(linger=0)


def test_an_event_loops_sockets_are_guarded_alike() -> None:
    async def run() -> None:
        keys, context = CurveKeys.make(), zmq.asyncio.Context()
        endpoint = listening(keys)
        guard = CurveGuard(context, [endpoint])
        inbox: AsyncReceiver[SeqNotice] = AsyncReceiver(context, endpoint, SeqNotice)
        refused = clients(keys, endpoint.address)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.receive(), REFUSED_S)
        plain = zmq.Context()
        sender: Sender[SeqNotice] = Sender(plain, Endpoint(endpoint.address, keys))
        sender.send(SeqNotice(1))
        message, _ = await asyncio.wait_for(inbox.receive(), ARRIVES_S)
        assert message == SeqNotice(1)
        for client in refused.values():
            client.close()
        guard.close()
        context.destroy(linger=0)
        plain.destroy(linger=0)

    asyncio.run(run())


def test_without_a_guard_nobody_is_heard() -> None:
    keys, context = CurveKeys.make(), zmq.Context()
    endpoint = listening(keys)
    inbox: Receiver[SeqNotice] = Receiver(context, endpoint, SeqNotice)
    sender: Sender[SeqNotice] = Sender(context, Endpoint(endpoint.address, keys))
    sender.send(SeqNotice(1))
    assert not inbox.wait(REFUSED_S)
    context.destroy(linger=0)


def test_tcp_without_keys_is_not_opened() -> None:
    with pytest.raises(AssertionError, match="encrypted"):
        Sender(zmq.Context.instance(), "tcp://127.0.0.1:1")
