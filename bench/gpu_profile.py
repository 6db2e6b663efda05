"""Where the time of a step goes, kernel by kernel."""

from __future__ import annotations

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
