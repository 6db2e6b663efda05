"""The options of a run over several nodes. Every node is called with the same ones, except for its own rank and address."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from importlib.util import find_spec

import msgspec

from ..engine.config import EngineConfig

LOCAL_ENDPOINT = "127.0.0.1:0"
# Under which torchrun knows `rendezvous.py`.
RENDEZVOUS_BACKEND = "waybill"
# What all nodes know and nobody else, where it is set: the keys of the run come from it, and do not travel.
RUN_SECRET_VARIABLE = "WAYBILL_RUN_SECRET"
MIN_RUN_SECRET_LENGTH = 16


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which of how many nodes this is, and where they meet."""

    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    node_address: str | None = None

    def __post_init__(self) -> None:
        if self.nnodes < 1:
            raise ValueError(f"--nnodes {self.nnodes}: must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(f"--node-rank {self.node_rank}: must lie in 0 .. {self.nnodes - 1}, below --nnodes")
        if self.rdzv_endpoint is None:
            if self.nnodes > 1:
                raise ValueError("--rdzv-endpoint: --nnodes above 1 needs it, the HOST:PORT of node 0")
        elif not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d{1,5}", self.rdzv_endpoint):
            raise ValueError(f"--rdzv-endpoint {self.rdzv_endpoint}: must be HOST:PORT, an IPv6 host in brackets")
        elif not 0 < int(self.rdzv_endpoint.rpartition(":")[2]) < 2**16:
            raise ValueError(f"--rdzv-endpoint {self.rdzv_endpoint}: the port must lie in 1 .. {2**16 - 1}")
        if self.node_address is not None:
            check_node_address(self.node_address)

    @property
    def endpoint(self) -> str:
        """Where the agents meet; on one node at a free port of loopback."""
        return self.rdzv_endpoint or LOCAL_ENDPOINT


def run_secret() -> bytes | None:
    """
    Raises:
        ValueError: it is too short.
    """
    secret = os.environ.get(RUN_SECRET_VARIABLE, "").encode()
    if secret and len(secret) < MIN_RUN_SECRET_LENGTH:
        raise ValueError(
            f"{RUN_SECRET_VARIABLE}: must have at least {MIN_RUN_SECRET_LENGTH} bytes, and be hard to guess"
        )
    return secret or None


def check_partners(config: EngineConfig, num_nodes: int) -> None:
    """What can be said before any rank starts.

    Raises:
        ValueError: the engine cannot be one side of two, or have an encoder.
    """
    if config.encoder is not None:
        if num_nodes > 1:
            raise ValueError(f"--nnodes {num_nodes}: must be 1 with --encoder; ranks share memory with the frontend")
        if run_secret() is None:
            raise ValueError(f"{RUN_SECRET_VARIABLE}: --encoder needs it, the same as the encoder has")
    if config.disaggregation == "none":
        return
    if num_nodes > 1:
        raise ValueError(f"--nnodes {num_nodes}: must be 1 with disaggregation; each side runs on a node of its own")
    if run_secret() is None:
        raise ValueError(f"{RUN_SECRET_VARIABLE}: disaggregation needs it, the same on both sides")
    if config.disaggregation_transport == "nixl" and find_spec("nixl") is None:
        raise ValueError(
            "--disaggregation-transport nixl: needs NIXL, which the extra `nixl` installs: pip install 'waybill[nixl]'"
        )


def check_node_address(address: str) -> None:
    """
    Raises:
        ValueError: it is not an address that others could connect to.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(f"--node-address {address}: must be an IPv4 or IPv6 address") from None
    if parsed.is_unspecified or parsed.is_multicast:
        raise ValueError(f"--node-address {address}: must be one address of this node, not all of them")


def node_parser() -> argparse.ArgumentParser:
    """Options that every command takes, to be given before it or behind."""
    parser = argparse.ArgumentParser(prog="torchrun.sh", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("several nodes", "one call on each node, alike but for --node-rank")
    defaults = NodeOptions()
    group.add_argument("--nnodes", type=int, default=defaults.nnodes, help="how many nodes there are")
    group.add_argument(
        "--node-rank", type=int, default=defaults.node_rank, help="which of them this is; the frontend runs on node 0"
    )
    group.add_argument(
        "--rdzv-endpoint",
        default=None,
        metavar="HOST:PORT",
        help="where the nodes meet: an address and free port of node 0",
    )
    group.add_argument(
        "--node-address",
        default=None,
        metavar="ADDRESS",
        help="this node's own, for the others to connect to; the one it reaches HOST with if not given",
    )
    return parser


def node_options(options: argparse.Namespace) -> NodeOptions:
    """
    Raises:
        ValueError: one is wrong; the message names it and its range.
    """
    return NodeOptions(**{name: getattr(options, name) for name in NodeOptions.__struct_fields__})


def split_command_line(argv: list[str]) -> tuple[list[str], list[str]]:
    """The node options of a command line, wherever they stand, and the rest; that begins with a command."""
    parser = node_parser()
    options, rest = parser.parse_known_args(argv)
    defaults = NodeOptions()
    given = [
        part
        for name in NodeOptions.__struct_fields__
        if (value := getattr(options, name)) != getattr(defaults, name)
        for part in ("--" + name.replace("_", "-"), str(value))
    ]
    if not rest or rest[0].startswith("-"):
        rest = ["rollout", *rest]
    return given, rest
