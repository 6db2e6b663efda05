"""The tables of a report on layouts, from what each of them has printed. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpu_layout_plan import BASE
from gpu_plan import MILLI
from marked_results import Found


def notes(all_found: Sequence[Found], not_run: Sequence[str]) -> list[str]:
    """The limits of each layout's devices, and what is missing, with the reason."""
    lines = []
    for found in all_found:
        for each in found.of("limits"):
            rates = f"copy {each['bytes_per_s'] / 1e12:.2f} TB/s, matrices {each['flops_per_s'] / 1e12:.0f} TFLOP/s"
            lines.append(f"- {found.name}: {rates}")
        for each in found.of("ready"):
            if each["left_out"]:
                totals = ", ".join(f"{total:,}" for total in each["left_out"])
                lines.append(f"- {found.name}: a device has no memory for {totals} requests")
        if found.failure:
            lines.append(f"- {found.name}: {found.failure}; what is below is what came before")
    if not_run:
        lines.append(f"- not run: {', '.join(not_run)}")
    return lines


def over_base(tokens_per_s: float, number: int, base: dict[int, float]) -> str:
    """Over one device with as many requests, or with the most that it has room for."""
    if not base:
        return ""
    if number in base:
        return f"{tokens_per_s / base[number]:.2f}"
    most = max(base)
    return f"{tokens_per_s / base[most]:.2f} (of {most})" if number > most else ""


def decode_table(all_found: Sequence[Found]) -> list[str]:
    lines = [
        "| layout | requests in all | tokens/s | over tp1 | over tp1, as many a group | ms a step | capture on / off "
        "| experts read | busiest rank / mean | bytes allow, ms | collectives, ms | share |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = {
        each["total"]: each["tokens_per_s"] for found in all_found if found.name == BASE for each in found.of("decode")
    }
    for found in all_found:
        off = {each["total"]: each["seconds"] for each in found.of("decode_off")}
        for each in found.of("decode"):
            capture = f"{each['seconds'] / off[each['total']]:.3f}" if each["total"] in off else ""
            over = over_base(each["tokens_per_s"], each["total"], base)
            over_group = over_base(each["tokens_per_s"], each["batch"], base) if each["batch"] in base else ""
            lines.append(
                f"| {found.name} | {each['total']} | {each['tokens_per_s']:,.0f} | {over} | {over_group} "
                f"| {each['seconds'] * MILLI:.2f} | {capture} "
                f"| {each['experts']:.0f} | {each['imbalance']:.2f} | {each['bytes_s'] * MILLI:.2f} "
                f"| {each['wire_s'] * MILLI:.2f} | {each['share']:.1%} |"
            )
    return lines


def prefill_table(all_found: Sequence[Found]) -> list[str]:
    lines = [
        "| layout | tokens in all | tokens/s | over tp1 | one behind another | over tp1 | bytes allow, ms | "
        "operations allow, ms | collectives, ms | share |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = {each["tokens"]: each for found in all_found if found.name == BASE for each in found.of("prefill")}
    for found in all_found:
        for each in found.of("prefill"):
            of_base = base.get(each["tokens"])
            over = ["", ""]
            if of_base is not None:
                over = [f"{each[key] / of_base[key]:.2f}" for key in ("tokens_per_s", "behind_tokens_per_s")]
            lines.append(
                f"| {found.name} | {each['total']} | {each['tokens_per_s']:,.0f} | {over[0]} "
                f"| {each['behind_tokens_per_s']:,.0f} | {over[1]} | {each['bytes_s'] * MILLI:.2f} "
                f"| {each['flops_s'] * MILLI:.2f} | {each['wire_s'] * MILLI:.2f} | {each['share']:.1%} |"
            )
    return lines


def profile_table(all_found: Sequence[Found]) -> list[str]:
    lines = [
        "| layout | requests in all | leader's host, ms | launch, slowest rank, ms | ms a step, profiled "
        "| kernels run, ms | none runs, ms | launches | longest kernels, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for found in all_found:
        host_s = {each["total"]: each["host_s"] for each in found.of("decode")}
        launch_s = {each["total"]: each["seconds"] for each in found.of("launch")}
        for each in found.of("profile"):
            kernels = ", ".join(f"`{name}` {ms:.2f}" for name, ms in list(each["kernels"].items())[:6])
            lines.append(
                f"| {found.name} | {each['total']} | {host_s[each['total']] * MILLI:.2f} "
                f"| {launch_s.get(each['total'], math.nan) * MILLI:.2f} | {each['wall_ms']:.2f} | {each['busy_ms']:.2f} "
                f"| {each['idle_ms']:.2f} | {each['launches']} | {kernels} |"
            )
    return lines


def limit_table(all_found: Sequence[Found]) -> list[str]:
    """What holds a decode step: its parts, and the largest of them, which is the next limit."""
    lines = [
        "| layout | requests in all | bytes, ms | collectives, ms | kernels beyond both, ms | no kernel runs, ms "
        "| host beyond the device, ms | next limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for found in all_found:
        profiled = {each["total"]: each for each in found.of("profile")}
        for each in found.of("decode"):
            if each["total"] in profiled:
                parts = parts_of(each, profiled[each["total"]])
                cells = " | ".join(f"{part:.2f}" for part in parts.values())
                lines.append(f"| {found.name} | {each['total']} | {cells} | {max(parts, key=lambda of: parts[of])} |")
    return lines


def parts_of(decode: dict[str, Any], profile: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step. The host works while the step before is computed, and holds the device up by what it takes
    longer."""
    bytes_ms, wire_ms, step_ms = (decode[key] * MILLI for key in ("bytes_s", "wire_s", "seconds"))
    return {
        "bytes": bytes_ms,
        "collectives": wire_ms,
        "kernels": max(0.0, min(profile["busy_ms"], step_ms) - bytes_ms - wire_ms),
        "gaps": profile["idle_ms"],
        "host": max(0.0, decode["host_s"] * MILLI - profile["busy_ms"]),
    }


def route_table(found: Found) -> list[str]:
    lines = [
        "| layout | rows | other bytes than the first | near-ties, routes | near-ties, tokens | against transformers |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in found.of("routes"):
        verdict = f"DIFFERS: {each['failure']}" if each["failure"] else "equal"
        lines.append(
            f"| {each['layout']} | {each['rows']} | {each['differing']} | {each['forced']} | {each['tied_tokens']} "
            f"| {verdict} |"
        )
    return [*lines, *reason(found)]


def stall_table(found: Found) -> list[str]:
    lines = [
        "| variant | dp | finishes | steps | with a finish | median ms | p99 ms | median / off | p99 / off "
        "| lag, median ms | lag, p99 ms | output processor, CPU | caller, CPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in found.of("stall"):
        ratios = " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*each[key]) for key in ("median_over_off", "p99_over_off"))
        lines.append(
            f"| {each['variant']} | {each['dp']} | {each['finishes']} | {each['steps']} | {each['with_finish']:.0%} "
            f"| {each['median_ms']:.2f} | {each['p99_ms']:.2f} | {ratios} | {each['lag_median_ms']:.1f} "
            f"| {each['lag_p99_ms']:.1f} | {each['processor_cpu_ms']:.1f} | {each['caller_cpu_ms']:.1f} |"
        )
    waits = [f"The ring was full {each['ring_waits']} times." for each in found.of("stall")[:1]]
    return [*lines, "", *waits, *reason(found)] if waits else [*lines, *reason(found)]


def processor_table(found: Found) -> list[str]:
    lines = [
        "| setting | dp | requests | tokens/s | ms a step | lag, steps | most | lag, ms | ring was full | CPU of each |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in found.of("processors"):
        shares = ", ".join(f"{share:.1%}" for share in each["cpu_shares"])
        lines.append(
            f"| {each['setting']} | {each['dp']} | {each['requests']} | {each['tokens_per_s']:,.0f} "
            f"| {each['step_ms']:.2f} | {each['lag_steps']:.2f} | {each['lag_steps_max']} "
            f"| {each['lag_steps'] * each['step_ms']:.1f} | {each['ring_waits']} | {shares} |"
        )
    return [*lines, *reason(found)]


def reason(found: Found) -> list[str]:
    """Why a part has no more rows."""
    return ["", f"Incomplete: {found.failure}."] if found.failure else []
