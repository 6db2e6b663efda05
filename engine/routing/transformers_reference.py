"""The reference that tokens, log-probabilities and routes are compared with: `transformers`, in float32, teacher-forced.
A checkpoint in FP8 is dequantised for it; an engine's activations must then be exact (`fp8_activations`).

    python -m waybill.engine.routing.transformers_reference --model CHECKPOINT --routes FILE.npz

(an archive of tokens_0, routes_0, tokens_1, ...)

The near-tie rule: everything must be equal. Where a choice differs from the reference's, the first difference must be a
near-tie by the reference's own scores (a gap below `NEAR_TIE`); the reference is then forced to that choice and the
comparison goes on to the end. In a causal forward the first differences are those of the lowest layer that has any.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from .dequantised import floating_point
from .hf_config import read_hf_config
from .replay.layers import find_routed_model
from .replay.routers import RouterKind, router_weights

NEAR_TIE = 1e-5
LOGPROB_TOLERANCE = 1e-4


class Difference(AssertionError):
    """The engine and the reference disagree by more than a near-tie."""


@dataclass
class Agreement:
    """How many choices were compared, and how many of them were near-ties that had to be forced."""

    num_tokens: int = 0
    num_rows: int = 0
    forced_routes: int = 0
    tied_tokens: int = 0

    def __iadd__(self, other: Agreement) -> Agreement:
        self.num_tokens += other.num_tokens
        self.num_rows += other.num_rows
        self.forced_routes += other.forced_routes
        self.tied_tokens += other.tied_tokens
        return self


@dataclass
class RouterTap:
    """Records one router's logits [T, E] and choice [T, K], the best first, with its combine weights [T, K], and, where
    told, replaces the choice."""

    router: Any
    kind: RouterKind
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    # Position -> ids [K] that the router must choose there.
    forced: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, ids = output
        found = self._in_order(module, logits, ids)
        if self.forced:
            positions = torch.tensor(list(self.forced), device=ids.device)
            found = found.clone()
            found[positions] = torch.stack(list(self.forced.values())).to(ids.device)
            weights, ids = router_weights(module, logits, found), found
        self.logits, self.ids = logits.cpu(), found.cpu()
        self.weights = router_weights(module, logits, found).cpu()
        return logits, weights, ids

    def _in_order(self, router: object, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if not self.kind.is_grouped:
            return ids
        scores = self.kind.choice(router, logits).gather(1, ids)
        return ids.gather(1, scores.argsort(dim=-1, descending=True, stable=True))

    def gap(self, position: int, ids: torch.Tensor) -> float:
        """See `choice_gap`."""
        scores = self.kind.choice(self.router, self.logits[position].to(self.router.weight.device)).float().cpu()
        if self.kind.is_grouped:
            return grouped_choice_gap(scores, ids, self.router.num_group, self.router.topk_group)
        return choice_gap(scores, ids)


@dataclass(frozen=True)
class Forward:
    """What a forward without forced routes has shown: logits [T, V], and every router's logits [T, E], choice [T, K] and
    combine weights [T, K]."""

    logits: torch.Tensor
    routers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Reference:
    """A checkpoint under `transformers`. The last `num_kept` forwards are not computed again for the same tokens."""

    def __init__(self, model_path: str, device: str = "cpu", *, num_kept: int = 0) -> None:
        with floating_point(model_path) as folder:
            config = read_hf_config(folder)
            model = auto_class(config).from_pretrained(folder, config=config, dtype=torch.float32)
        self._model = model.eval().to(device)
        self._taps: list[RouterTap] = []
        for layer in find_routed_model(self._model).layers:
            self._taps.append(RouterTap(layer.router, layer.kind))
            layer.router.register_forward_hook(self._taps[-1])
        # What is shown to the model beside the tokens.
        self._images: dict[str, torch.Tensor] = {}
        self._num_kept = num_kept
        self._kept: OrderedDict[tuple[int, ...], Forward] = OrderedDict()

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        """Logits [T, V]; the taps hold the routers'."""
        key = tuple(tokens)
        is_free = not self._images and not any(tap.forced for tap in self._taps)
        kept = self._kept.get(key) if is_free else None
        if kept is None:
            with torch.inference_mode():
                logits = self._model(**self._inputs(tokens)).logits[0].cpu()
            if is_free and self._num_kept:
                self._kept[key] = Forward(logits, [(tap.logits, tap.ids, tap.weights) for tap in self._taps])
                if len(self._kept) > self._num_kept:
                    self._kept.popitem(last=False)
            return logits
        self._kept.move_to_end(key)
        for tap, of_router in zip(self._taps, kept.routers, strict=True):
            tap.logits, tap.ids, tap.weights = of_router
        return kept.logits

    def _inputs(self, tokens: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([tokens], device=self._model.device)
        if not self._images:
            return {"input_ids": ids}
        kinds = (ids == self._model.config.image_token_id).int()
        return {"input_ids": ids, "mm_token_type_ids": kinds, **self._images}

    @contextmanager
    def showing(self, **images: torch.Tensor) -> Iterator[None]:
        """Within the context tokens have these images, as the checkpoint's image processor makes them: `pixel_values` and
        `image_grid_thw`."""
        self._images = {name: tensor.to(self._model.device) for name, tensor in images.items()}
        try:
            yield
        finally:
            self._images = {}

    def check_routes(self, tokens: list[int], routes: np.ndarray, start: int = 0) -> tuple[torch.Tensor, Agreement]:
        """Compare `routes` [rows, moe_layers, top_k], the routing of `tokens[start : start + rows]`, under the rule.

        Returns the logits [rows + start, V] of the forward in which every route is the engine's.
        """
        assert routes.shape[1] == len(self._taps)
        end = start + len(routes)
        agreement = Agreement(num_rows=len(routes))
        for tap in self._taps:
            tap.forced = {}
        for layer in range(len(self._taps) + 1):
            logits = self._forward(tokens[:end])
            differing = [i for i in range(layer, len(self._taps)) if self._differences(i, routes, start)]
            if not differing:
                return logits, agreement
            assert differing[0] >= layer, "a layer that was forced differs again"
            agreement.forced_routes += self._force(differing[0], routes, start)
        raise Difference("forcing every layer did not make the routes equal")

    def check_weights(self, weights: np.ndarray, start: int = 0, tolerance: float = LOGPROB_TOLERANCE) -> None:
        """Compare combine weights [rows, moe_layers, top_k], float32, of the rows that were last found equal: they must be
        those of router logits that differ from the reference's by at most half of `tolerance`, as log-probabilities may,
        relative to the largest of the row if that is above 1. A weight, of a softmax or of sigmoids, changes by at most
        twice that, relative to itself; rounded to bfloat16 it would by up to 4e-3.

        Raises:
            Difference: one is not.
        """
        for layer, tap in enumerate(self._taps):
            ours, theirs = torch.from_numpy(weights[:, layer]), tap.weights[start:].float()
            if ours.shape != theirs.shape:
                raise Difference(f"MoE layer {layer}: {tuple(ours.shape)} weights for {tuple(theirs.shape)} choices")
            distance = ((ours - theirs).abs() / theirs.abs().clamp(min=torch.finfo(torch.float32).tiny)).amax(dim=-1)
            bound = tolerance * tap.logits[start:].float().abs().amax(dim=-1).clamp(min=1.0)
            if not (distance <= bound).all():
                row = int((distance / bound).nan_to_num(nan=float("inf")).argmax())
                raise Difference(
                    f"position {start + row}, MoE layer {layer}: weights {ours[row].tolist()}, reference "
                    f"{theirs[row].tolist()}"
                )

    def _differences(self, layer: int, routes: np.ndarray, start: int) -> list[int]:
        """Rows whose ids differ, order within the row included."""
        ours = torch.from_numpy(routes[:, layer].astype(np.int64))
        return (self._taps[layer].ids[start:] != ours).any(dim=-1).nonzero().flatten().tolist()

    def _force(self, layer: int, routes: np.ndarray, start: int) -> int:
        rows = self._differences(layer, routes, start)
        for row in rows:
            ids = torch.from_numpy(routes[row, layer].astype(np.int64))
            gap = self._taps[layer].gap(start + row, ids)
            if gap >= NEAR_TIE:
                raise Difference(
                    f"position {start + row}, MoE layer {layer}: engine {ids.tolist()}, reference "
                    f"{self._taps[layer].ids[start + row].tolist()}, gap {gap:.3e}"
                )
            self._taps[layer].forced[start + row] = ids
        return len(rows)

    def check_generation(
        self,
        prompt: list[int],
        output: list[int],
        logprobs: list[float],
        routes: np.ndarray,
        logprob_tolerance: float = LOGPROB_TOLERANCE,
        weights: np.ndarray | None = None,
    ) -> Agreement:
        """Compare a greedy generation: routes of every input, their combine weights if they are given, every token, every
        log-probability."""
        tokens = prompt + output
        expected = (len(tokens) - 1, len(self._taps), routes.shape[2])
        if routes.shape != expected:
            raise Difference(f"routes have shape {routes.shape}, not {expected}")
        if len(logprobs) != len(output):
            raise Difference(f"{len(logprobs)} log-probabilities for {len(output)} tokens")
        logits, agreement = self.check_routes(tokens, routes)
        if weights is not None:
            self.check_weights(weights, tolerance=logprob_tolerance)
        for index, token in enumerate(output):
            scores = logits[len(prompt) - 1 + index].float()
            gap = float(scores.max() - scores[token])
            if gap >= NEAR_TIE:
                raise Difference(
                    f"output token {index}: engine {token}, reference {int(scores.argmax())}, gap {gap:.3e}"
                )
            agreement.tied_tokens += int(scores.argmax()) != token
            logprob = float(torch.log_softmax(scores, dim=-1)[token])
            if abs(logprob - logprobs[index]) > logprob_tolerance:
                raise Difference(f"output token {index}: log-probability {logprobs[index]}, reference {logprob}")
        agreement.num_tokens = len(output)
        return agreement


def auto_class(config: Any) -> Any:
    """What makes a model of that configuration: with its vision tower, if it has one."""
    has_images = config.get_text_config() is not config
    return AutoModelForImageTextToText if has_images else AutoModelForCausalLM


def choice_gap(scores: torch.Tensor, ids: torch.Tensor) -> float:
    """How far `scores` [E] would have to move for `ids` [K], in this order, to be the top-k: 0 if they are it."""
    chosen = scores[ids]
    out_of_order = float((chosen[1:] - chosen[:-1]).clamp(min=0).max()) if len(ids) > 1 else 0.0
    others = scores.clone()
    others[ids] = float("-inf")
    return max(out_of_order, float(others.max() - chosen.min()), 0.0)


def grouped_choice_gap(scores: torch.Tensor, ids: torch.Tensor, num_groups: int, num_chosen: int) -> float:
    """The same where groups of experts, as many as `num_chosen`, have been chosen first, by their two best scores."""
    groups = scores.view(num_groups, -1)
    sums = groups.topk(2, dim=-1).values.sum(dim=-1)
    used = (ids // groups.shape[1]).unique()
    if len(used) > num_chosen:
        return float("inf")
    # Those that no chosen expert is of, the best first.
    is_out = torch.ones(num_groups, dtype=torch.bool).index_fill_(0, used, False)
    others = [int(group) for group in sums.argsort(descending=True) if is_out[group]]
    is_out[others[: num_chosen - len(used)]] = False
    gap = float((sums[is_out].max() - sums[~is_out].min()).clamp(min=0)) if is_out.any() else 0.0
    return max(gap, choice_gap(groups.masked_fill(is_out[:, None], float("-inf")).flatten(), ids))


def main() -> int:
    """Check routes that were saved with their tokens; prints what was compared, or the first real difference."""
    parser = argparse.ArgumentParser(description="Compare recorded routes with transformers, under the near-tie rule")
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--routes", required=True, help="npz file: tokens_N [T] and routes_N [T - 1, M, K]")
    args = parser.parse_args()
    saved = np.load(args.routes)
    reference = Reference(args.model)
    agreement = Agreement()
    try:
        for index in range(len(saved.files) // 2):
            agreement += reference.check_routes(saved[f"tokens_{index}"].tolist(), saved[f"routes_{index}"])[1]
    except Difference as difference:
        print(difference)
        return 1
    print(f"{agreement.num_rows} rows agree, {agreement.forced_routes} of them by near-ties")
    return 0


if __name__ == "__main__":
    sys.exit(main())
