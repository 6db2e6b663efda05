"""`torchrun.sh encode`: the vision tower of a checkpoint in a process of its own, for engines that are started with
`--encoder`. It holds no state but a cache: any number of engines may ask it."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from importlib.util import find_spec

from ..engine.config import DTYPES
from ..engine.ipc.log_rate import log_to_stderr
from .exchange import listen
from .node_options import RUN_SECRET_VARIABLE, run_secret
from .run_dir import EXIT_USAGE
from .transfers import encoder_keys

NEEDS = "pip install 'waybill[vision]'"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="torchrun.sh encode", description="Encode images for servers that are started with --encoder HOST:PORT."
    )
    made.add_argument("--model", required=True, metavar="FOLDER", help="checkpoint whose vision tower it is")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on")
    made.add_argument("--port", type=int, default=31000, help="port to listen on")
    made.add_argument("--device", default="cpu", help="of the tower: cpu, cuda or cuda:N")
    made.add_argument("--dtype", default="auto", choices=DTYPES, help="of the tower; auto is the checkpoint's")
    made.add_argument("--max-waiting", type=int, default=256, help="images that may wait; more are refused")
    made.add_argument("--cache-bytes", type=int, default=1 << 30, help="bytes of encoded images that are kept")
    made.add_argument("--max-image-bytes", type=int, default=20 << 20, help="bytes of one image's file")
    made.add_argument("--max-image-pixels", type=int, default=1 << 26, help="pixels that one image may be unpacked to")
    return made


def check(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: an option is out of its range, or something is missing.
    """
    if not 0 < options.port < 2**16:
        raise ValueError(f"--port {options.port}: must lie in 1 .. {2**16 - 1}")
    for name in ("max_waiting", "max_image_bytes", "max_image_pixels"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.cache_bytes < 0:
        raise ValueError(f"--cache-bytes {options.cache_bytes}: must be at least 0")
    if run_secret() is None:
        raise ValueError(f"{RUN_SECRET_VARIABLE}: encode needs it, the same as the servers have")
    if find_spec("PIL") is None:
        raise ValueError(f"encode needs Pillow: {NEEDS}")


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    # Ends at once and without a traceback; it has nothing to finish.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    log_to_stderr("warning", logging.Formatter("%(levelname)s encoder %(message)s"))
    try:
        check(options)
        # Both take seconds to import.
        from ..engine.encoder.encoder_server import EncoderLimits, EncoderServer  # noqa: PLC0415
        from ..engine.encoder.tower import ImageLimits, VisionTower  # noqa: PLC0415

        limits = ImageLimits(options.max_image_bytes, options.max_image_pixels)
        # A port that is taken is said before the tower is loaded.
        where = listen(options.host, encoder_keys(), options.port)
        tower = VisionTower(options.model, options.device, options.dtype, limits)
    except ValueError as error:
        print(f"torchrun.sh: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    bounds = EncoderLimits(options.max_waiting, options.cache_bytes, options.max_image_bytes)
    server = EncoderServer(where, tower, bounds)
    print(f"encoding images at {where.address.removeprefix('tcp://')}", file=sys.stderr, flush=True)
    server.run()
    return 0
