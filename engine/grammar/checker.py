"""The process in which grammars of callers are compiled first: each in a child of its own, which has bounds that the system
keeps. What ends beyond them is refused; what does not can be compiled by a leader, in about the same time.

    python -m waybill.engine.grammar.checker TOKENIZER_FOLDER VOCAB_SIZE

It reads `GrammarCheck`s from its standard input and writes a `GrammarVerdict` for each to its standard output, in any
order: msgpack behind four bytes of length, big-endian. It ends when its input does.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import sys
from collections import deque

import msgspec
from llguidance import LLMatcher, LLTokenizer

from .limits import MAX_CHECKS, MAX_COMPILE_BYTES, MAX_COMPILE_S, brief, parser_limits
from .token_trie import load_token_trie

LENGTH_BYTES = 4
# The exit status of a child in which the library has raised something.
CRASHED = 1


class GrammarCheck(msgspec.Struct, frozen=True, array_like=True):
    """One grammar, in llguidance's form."""

    number: int
    grammar: str


class GrammarVerdict(msgspec.Struct, frozen=True, array_like=True):
    """What is wrong with it; empty if nothing is."""

    number: int
    refusal: str


def framed(message: GrammarCheck | GrammarVerdict) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def read_exactly(fd: int, num_bytes: int) -> bytes:
    """b"" where the input ends before."""
    found = bytearray()
    while len(found) < num_bytes:
        piece = os.read(fd, num_bytes - len(found))
        if not piece:
            return b""
        found += piece
    return bytes(found)


class Checker:
    """Children by the pipe that each says its verdict on."""

    def __init__(self, trie: LLTokenizer | None, problem: str) -> None:
        self._trie = trie
        self._problem = problem
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._waiting: deque[GrammarCheck] = deque()
        # Of a running child: the number of its check, and its process.
        self._running: dict[int, tuple[int, int]] = {}

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fd == sys.stdin.fileno():
                    if not self._receive():
                        return
                else:
                    self._conclude(key.fd)
            while self._waiting and len(self._running) < MAX_CHECKS:
                self._begin(self._waiting.popleft())

    def _receive(self) -> bool:
        body = read_exactly(sys.stdin.fileno(), int.from_bytes(read_exactly(sys.stdin.fileno(), LENGTH_BYTES), "big"))
        if not body:
            return False
        self._waiting.append(msgspec.msgpack.decode(body, type=GrammarCheck))
        return True

    def _begin(self, check: GrammarCheck) -> None:
        if self._trie is None:
            answer(check.number, self._problem)
            return
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            code = CRASHED
            try:
                code = check_in_bounds(self._trie, check.grammar, writing)
            finally:
                # Nothing of this process is cleaned up by its child, or goes on in it.
                os._exit(code)
        os.close(writing)
        self._running[reading] = (check.number, pid)
        self._selector.register(reading, selectors.EVENT_READ)

    def _conclude(self, fd: int) -> None:
        number, pid = self._running.pop(fd)
        self._selector.unregister(fd)
        with os.fdopen(fd, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        answer(number, said.decode("utf-8", "replace") if code == 0 else why_ended(code))


def check_in_bounds(trie: LLTokenizer, grammar: str, writing: int) -> int:
    """In the child; its exit status."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (held + MAX_COMPILE_BYTES, held + MAX_COMPILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_COMPILE_S, MAX_COMPILE_S + 1))
    # A library that cannot have memory says so there before it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        matcher = LLMatcher(trie, grammar, limits=parser_limits(), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
    except MemoryError:
        return -signal.SIGABRT
    refusal = brief(matcher.get_error()) if matcher.is_error() else ""
    os.write(writing, refusal.encode())
    return 0


def why_ended(code: int) -> str:
    """Of a child that has no verdict."""
    if code == CRASHED:
        return "the compiler fails on it"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"takes more than {MAX_COMPILE_S} s of processor time to compile"
    return f"takes more than {MAX_COMPILE_BYTES >> 20} MiB of memory to compile"


def answer(number: int, refusal: str) -> None:
    sys.stdout.buffer.write(framed(GrammarVerdict(number, refusal)))
    sys.stdout.buffer.flush()


def main() -> None:
    os.nice(10)
    # Ctrl-C at a terminal is the business of whoever started this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trie, problem = None, ""
    try:
        trie = load_token_trie(sys.argv[1], int(sys.argv[2]))
    except ValueError as error:
        problem = str(error)
    Checker(trie, problem).run()


if __name__ == "__main__":
    main()
