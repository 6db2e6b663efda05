"""A server for the clients; shared by the tests of this folder."""

from __future__ import annotations

import pytest
from support.fake_routes_server import FakeServer


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()
