"""Where the time of a step goes, kernel by kernel."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from gpu_leader import Leader
from gpu_plan import MILLI, Report
from torch.autograd import DeviceType


def profile_step(leader: Leader, name: str, batch: int, report: Report) -> None:
    """Kernels of one step by total time: a decode of `batch` requests, or the prefill of one prompt if it is 0."""
    if batch:
        leader.start_decoding(batch)
    else:
        leader.send(leader.prefill_tokens, 1, routed=False)
        leader.wait_for_requests(1)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        leader.scheduler.step()
        leader.scheduler.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    leader.drain()
    # An operator's time is that of its kernels, which are listed, too.
    events = [event for event in profile.key_averages() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1
    num_steps = 2 if batch else 1
    report.add(
        "", f"| kernel, {name} | launches | ms | share | if it were free |", "| --- | ---: | ---: | ---: | ---: |"
    )
    for event in events[:12]:
        share = event.self_device_time_total / total
        report.add(
            f"| `{event.key[:60]}` | {event.count // num_steps} | {event.self_device_time_total / num_steps / MILLI:.3f} "
            f"| {share:.1%} | {1 / (1 - share):.2f}x |"
        )
    report.add(
        f"| all | {sum(event.count for event in events) // num_steps} | {total / num_steps / MILLI:.3f} | 100% | |"
    )


def profile_decode(leader: Leader, batch: int, num_steps: int = 6) -> dict[str, Any]:
    """Where a decode step's time goes: kernels by their own time, and how long the device has none (milliseconds)."""
    leader.start_decoding(batch)
    # Recording the host's operators, too, would slow it down.
    activity = (
        torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
    )
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        began = time.perf_counter()
        for _ in range(num_steps):
            leader.scheduler.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - began
    leader.drain()
    kernels = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    busy = busy_time(spans)
    by_name: Counter[str] = Counter()
    for event in kernels:
        by_name[event.name[:60]] += event.time_range.end - event.time_range.start
    extent = max((end for _, end in spans), default=0.0) - min((start for start, _ in spans), default=0.0)
    per_step = MILLI * num_steps
    return {
        "wall_ms": wall_s * MILLI / num_steps,
        "busy_ms": busy / per_step,
        "idle_ms": (extent - busy) / per_step,
        "launches": len(kernels) // num_steps,
        "kernels": {name: total / per_step for name, total in by_name.most_common(8)},
    }


def busy_time(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
