"""Waybill, routing captured and shipped, beside vLLM, compiled and without routes: `throughput.py --peers`.

Both serve one model with the same cores; rounds are interleaved, and who is not asked is stopped, so that no waiting thread
takes a core. A ratio is made in each round, so that what the machine did in it touches both alike. vLLM runs in its own
Python, which is an argument; so are the libraries that it wants preloaded (its makers recommend tcmalloc and Intel's
OpenMP).
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from machine import describe, write_result
from throughput_rounds import (
    CONCURRENCIES,
    LONG,
    MAX_LENGTH,
    MIB,
    PREFILLS,
    SHORT,
    Bench,
    Contender,
    WaybillContender,
    run_rounds,
)
from transformers import AutoConfig

START_TIMEOUT_S, JOB_TIMEOUT_S = 1800.0, 600.0
KV_CACHE_GIB = 2


def thread_binding(cpus: list[int], tp_size: int) -> str:
    """How vLLM is told the cores of each of its ranks: "0,1|2,3"."""
    each = len(cpus) // tp_size
    return "|".join(",".join(map(str, cpus[i * each : (i + 1) * each])) for i in range(tp_size))


class VllmContender:
    """vLLM's `LLM` in a process group of its own, stopped while it is not asked."""

    def __init__(
        self, python: str, preload: list[str], model: str, tp_size: int, max_running: int, length: int
    ) -> None:
        began = time.perf_counter()
        self._done, told = os.pipe()
        cpus = sorted(os.sched_getaffinity(0))
        env = os.environ | {
            "VLLM_CPU_OMP_THREADS_BIND": thread_binding(cpus, tp_size),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": ":".join(preload),
        }
        # Said for our own ranks; vLLM sets its threads by the binding.
        env.pop("OMP_NUM_THREADS", None)
        script = Path(__file__).with_name("vllm_peer.py")
        sizes = map(str, (tp_size, max_running, length))
        self._process = subprocess.Popen(
            [python, str(script), str(told), model, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=env,
            pass_fds=(told,),
            start_new_session=True,
        )
        os.close(told)
        try:
            self._wait(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - began
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _wait(self, timeout_s: float) -> None:
        """
        Raises:
            TimeoutError: it takes too long.
            RuntimeError: it has ended.
        """
        if not select.select([self._done], [], [], timeout_s)[0]:
            raise TimeoutError(f"vLLM has not answered within {timeout_s:.0f} s")
        if not os.read(self._done, 1):
            raise RuntimeError(f"vLLM has ended with status {self._process.wait()}; its log is above")

    def generate(self, prompts: list[list[int]], num_new: int) -> None:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_new": num_new}) + "\n")
        self._process.stdin.flush()
        self._wait(JOB_TIMEOUT_S)
        self._signal(signal.SIGSTOP)

    def peak_bytes(self) -> int:
        """Of all its processes, by their peaks."""
        peaks = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getpgid(int(status.parent.name)) == self._process.pid:
                    lines = status.read_text().splitlines()
                    peaks += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
            except (ProcessLookupError, FileNotFoundError):
                continue
        return peaks

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._done)


@contextmanager
def contenders_of(options: argparse.Namespace, tp_size: int) -> Iterator[dict[str, Contender]]:
    """Waybill and vLLM at this tp size; where it is not 1, Waybill at 1, too."""
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for size in sorted({1, tp_size}):
            waybill = WaybillContender(options.model, options.threads // size, routing=True, tp_size=size)
            stack.callback(waybill.engine.shutdown)
            contenders[f"waybill, tp {size}"] = waybill
        sizes = (tp_size, max(CONCURRENCIES), MAX_LENGTH)
        vllm = VllmContender(options.vllm_python, options.vllm_preload, os.path.abspath(options.model), *sizes)
        stack.callback(vllm.close)
        contenders[f"vllm, tp {tp_size}"] = vllm
        yield contenders


def ratios(bench: Bench, name: str, base: str) -> dict[str, list[float]]:
    """By workload, the rate of one over that of the other in each round."""
    seconds = bench.measured.seconds
    found = {}
    for length in PREFILLS:
        work = f"prefill {length}"
        found[work] = [b / a for a, b in zip(seconds[name, work], seconds[base, work], strict=True)]
    for count in CONCURRENCIES:
        spent = {
            each: [
                long - short
                for long, short in zip(
                    seconds[each, f"{count} x {LONG}"], seconds[each, f"{count} x {SHORT}"], strict=True
                )
            ]
            for each in (name, base)
        }
        found[f"decode, {count} at once"] = [b / a for a, b in zip(spent[name], spent[base], strict=True)]
    return found


def rate_of(bench: Bench, name: str, workload: str) -> float:
    kind, number = workload.replace(",", "").split()[:2]
    return bench.prefill_rate(name, int(number)) if kind == "prefill" else bench.decode_rate(name, int(number))


def make_rows(bench: Bench, name: str, base: str) -> list[str]:
    rows = []
    for workload, each in ratios(bench, name, base).items():
        rates = (f"{rate_of(bench, who, workload):.1f}" for who in (name, base))
        spread = f"{min(each):.2f} to {max(each):.2f}"
        rows.append(f"| {workload} | {' | '.join(rates)} | **{statistics.median(each):.2f}** | {spread} |")
    return rows


def compare(options: argparse.Namespace) -> None:
    """Measure, print and, if asked to, keep the report."""
    config = AutoConfig.from_pretrained(options.model)
    lines = [
        "# Throughput beside vLLM",
        "",
        f"{describe()}, {options.threads} threads in all. {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_experts} experts, bfloat16.",
        "Waybill captures and ships the routes of every token; vLLM is compiled and has none. Tokens/s are medians of",
        f"{options.rounds} interleaved rounds, ratios of the rounds'; the spread is from the smallest to the largest.",
    ]
    for tp_size in options.tp:
        with contenders_of(options, tp_size) as contenders:
            bench = Bench(config.vocab_size, seed=0)
            run_rounds(bench, contenders, options.rounds)
            own, vllm = f"waybill, tp {tp_size}", f"vllm, tp {tp_size}"
            for base in (vllm, *(["waybill, tp 1"] if tp_size > 1 else [])):
                lines += ["", f"| | {own} | {base} | ratio | spread |", "| --- | ---: | ---: | ---: | ---: |"]
                lines += make_rows(bench, own, base)
            memory = (f"{name} {contender.peak_bytes() / MIB:.0f} MiB" for name, contender in contenders.items())
            lines += ["", f"Peak resident memory: {', '.join(memory)}."]
        print(*lines, sep="\n", flush=True)
    lines += [
        "",
        f"Made by `python bench/throughput.py --peers --model MODEL --rounds {options.rounds} --write`, with vLLM's Python",
    ]
    lines += ["and libraries as arguments; the model by `python bench/make_models.py M`."]
    if options.write:
        write_result("peers.md", "\n".join(lines) + "\n")
