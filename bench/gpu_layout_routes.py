"""Routes of the same greedy generations in several layouts, in float32: equal byte by byte, or a near-tie.

`gpu.py --layouts` starts it. Each layout is a whole engine over the same checkpoint, whose answers are compared with those
of the first layout, and with `transformers`: where sums of other lengths round otherwise, the first difference must be a
near-tie by the reference's own scores (see `transformers_reference.py`), for both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_layout_plan import LAYOUTS
from gpu_limits import Share
from gpu_plan import FULL, TOY, Plan
from make_models import write_checkpoint
from marked_results import say

from waybill import Engine
from waybill.engine.routing.transformers_reference import Agreement, Difference, Reference

# Over noise that random weights amplify, logprobs of two right float32 programs differ by this much.
LOGPROB_TOLERANCE = 1e-3
NUM_TOKENS = 24
Answer = dict[str, Any]


def make_prompts(plan: Plan) -> list[list[int]]:
    rng = np.random.default_rng(0)
    longest = 700 if plan.device == "cuda" else 60
    return [rng.integers(0, 250, length).tolist() for length in rng.integers(1, longest, plan.num_prompts)]


def generate(folder: str, share: Share, plan: Plan, prompts: list[list[int]]) -> list[Answer]:
    with Engine(
        folder,
        tp_size=share.tp,
        dp_size=share.dp,
        moe_split=share.moe_split,
        device=plan.device,
        dtype="float32",
        context_length=2048,
        kv_cache_tokens=16384,
        chunked_prefill_size=256,
        enable_return_routed_experts=True,
        **({"num_threads": 1} if plan.device == "cpu" else {}),
    ) as engine:
        answers: Any = engine.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0.0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True},
            return_logprob=True,
            return_routed_experts=True,
        )
    return list(answers)


def num_differing(ours: Answer, theirs: Answer) -> int:
    """Rows whose bytes differ; where a token does, also all behind it."""
    a, b = ours["meta_info"]["routed_experts"], theirs["meta_info"]["routed_experts"]
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(len(a), len(b))
    return int((a != b).any(axis=(1, 2)).sum())


def check(reference: Reference, prompts: list[list[int]], answers: list[Answer]) -> Agreement:
    """
    Raises:
        Difference: an answer is another than the reference's by more than a near-tie.
    """
    agreement = Agreement()
    for prompt, answer in zip(prompts, answers, strict=True):
        meta = answer["meta_info"]
        logprobs = [value for value, _, _ in meta["output_token_logprobs"]]
        agreement += reference.check_generation(
            prompt, answer["output_ids"], logprobs, meta["routed_experts"], LOGPROB_TOLERANCE
        )
    return agreement


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="+", choices=tuple(LAYOUTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    plan = replace(TOY if options.toy else FULL, device=options.device)
    prompts = make_prompts(plan)
    first: list[Answer] | None = None
    failed = False
    with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
        write_checkpoint(plan.route_shape, Path(folder), 0)
        reference = Reference(folder, options.device, num_kept=len(prompts))
        for name in options.layouts:
            answers = generate(folder, LAYOUTS[name], plan, prompts)
            first = first or answers
            differing = sum(map(num_differing, answers, first))
            agreement, failure = Agreement(), ""
            try:
                agreement = check(reference, prompts, answers)
            except Difference as difference:
                failure, failed = str(difference), True
            num_rows = sum(len(answer["meta_info"]["routed_experts"]) for answer in answers)
            say("routes", layout=name, rows=num_rows, differing=differing, forced=agreement.forced_routes,
                tied_tokens=agreement.tied_tokens, failure=failure)  # fmt: skip
    if not failed:
        say("done")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
