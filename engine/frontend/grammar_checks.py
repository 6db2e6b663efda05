"""Whether a caller's grammar can be compiled, as the process says that tries it (`grammar/checker.py`)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
from collections import OrderedDict
from contextlib import suppress

import msgspec

from ..grammar.checker import LENGTH_BYTES, GrammarCheck, GrammarVerdict, framed

logger = logging.getLogger(__name__)

# Verdicts that are remembered.
MAX_VERDICTS = 4096
# With others before it: each has some seconds of processor time, on a machine that may be busy.
CHECK_TIMEOUT_S = 120.0
NO_CHECKER = "cannot be checked: the process that compiles grammars has ended; try again"


class GrammarChecks:
    """Lives on one event loop. The process is started with the first grammar, and again if it has ended."""

    def __init__(self, tokenizer_path: str) -> None:
        self._tokenizer_path = tokenizer_path
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._asked: dict[bytes, asyncio.Future[str]] = {}
        self._by_number: dict[int, asyncio.Future[str]] = {}
        self._num_checks = 0
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def check(self, grammar: str, vocab_size: int) -> str:
        """What is wrong with it; "" if nothing is."""
        key = hashlib.sha256(grammar.encode()).digest()
        known = self._verdicts.get(key)
        if known is not None:
            self._verdicts.move_to_end(key)
            return known
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = asyncio.ensure_future(self._ask(key, grammar, vocab_size))
        # Others may wait for the same one.
        return await asyncio.shield(asked)

    async def _ask(self, key: bytes, grammar: str, vocab_size: int) -> str:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                process = await self._started(vocab_size)
                assert process.stdin is not None
                self._num_checks += 1
                number = self._num_checks
                verdict = self._by_number[number] = asyncio.get_running_loop().create_future()
                try:
                    process.stdin.write(framed(GrammarCheck(number, grammar)))
                    await process.stdin.drain()
                    refusal = await verdict
                finally:
                    self._by_number.pop(number, None)
        except OSError:
            # Time-outs and lost connections are such, too.
            return NO_CHECKER
        finally:
            self._asked.pop(key, None)
        if refusal != NO_CHECKER:
            self._verdicts[key] = refusal
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        return refusal

    async def _started(self, vocab_size: int) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "waybill.engine.grammar.checker", self._tokenizer_path, str(vocab_size)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                )
                self._reading = asyncio.create_task(self._read(self._process), name="grammar checks")
            return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = await process.stdout.readexactly(LENGTH_BYTES)
                body = await process.stdout.readexactly(int.from_bytes(head, "big"))
                verdict = msgspec.msgpack.decode(body, type=GrammarVerdict)
                asked = self._by_number.get(verdict.number)
                if asked is not None and not asked.done():
                    asked.set_result(verdict.refusal)
        logger.warning("the process that compiles grammars has ended")
        await process.wait()
        for asked in list(self._by_number.values()):
            if not asked.done():
                asked.set_result(NO_CHECKER)

    def close(self) -> None:
        """The process ends with its input."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        if self._reading is not None:
            self._reading.cancel()
