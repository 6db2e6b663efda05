"""The reference that tokens, log-probabilities and routes are compared with: `transformers`, in float32, teacher-forced.

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
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .replay.routers import router_weights

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
    """Records one router's logits [T, E] and, where told, replaces its choice."""

    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    # Position -> ids [K] that the router must choose there.
    forced: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, ids = output
        if self.forced:
            positions = torch.tensor(list(self.forced), device=ids.device)
            ids = ids.clone()
            ids[positions] = torch.stack(list(self.forced.values())).to(ids.device)
            weights = router_weights(module, logits, ids)
        self.logits, self.ids = logits.cpu(), ids.cpu()
        return logits, weights, ids


@dataclass(frozen=True)
class Forward:
    """What a forward without forced routes has shown: logits [T, V], and every router's logits [T, E] and choice [T, K]."""

    logits: torch.Tensor
    routers: list[tuple[torch.Tensor, torch.Tensor]]


class Reference:
    """A checkpoint under `transformers`. The last `num_kept` forwards are not computed again for the same tokens."""

    def __init__(self, model_path: str, device: str = "cpu", *, num_kept: int = 0) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval().to(device)
        self._taps: list[RouterTap] = []
        for layer in self._model.model.layers:
            if hasattr(layer.mlp, "gate"):
                self._taps.append(RouterTap())
                layer.mlp.gate.register_forward_hook(self._taps[-1])
        assert self._taps, "the model has no router"
        self._num_kept = num_kept
        self._kept: OrderedDict[tuple[int, ...], Forward] = OrderedDict()

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        """Logits [T, V]; the taps hold the routers'."""
        key = tuple(tokens)
        is_free = not any(tap.forced for tap in self._taps)
        kept = self._kept.get(key) if is_free else None
        if kept is None:
            with torch.inference_mode():
                logits = self._model(torch.tensor([tokens], device=self._model.device)).logits[0].cpu()
            if is_free and self._num_kept:
                self._kept[key] = Forward(logits, [(tap.logits, tap.ids) for tap in self._taps])
                if len(self._kept) > self._num_kept:
                    self._kept.popitem(last=False)
            return logits
        self._kept.move_to_end(key)
        for tap, (router_logits, ids) in zip(self._taps, kept.routers, strict=True):
            tap.logits, tap.ids = router_logits, ids
        return kept.logits

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

    def _differences(self, layer: int, routes: np.ndarray, start: int) -> list[int]:
        """Rows whose ids differ, order within the row included."""
        ours = torch.from_numpy(routes[:, layer].astype(np.int64))
        return (self._taps[layer].ids[start:] != ours).any(dim=-1).nonzero().flatten().tolist()

    def _force(self, layer: int, routes: np.ndarray, start: int) -> int:
        rows = self._differences(layer, routes, start)
        for row in rows:
            ids = torch.from_numpy(routes[row, layer].astype(np.int64))
            scores = self._taps[layer].logits[start + row].float()
            gap = choice_gap(scores, ids)
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
    ) -> Agreement:
        """Compare a greedy generation: routes of every input, every token, every log-probability."""
        tokens = prompt + output
        expected = (len(tokens) - 1, len(self._taps), routes.shape[2])
        if routes.shape != expected:
            raise Difference(f"routes have shape {routes.shape}, not {expected}")
        if len(logprobs) != len(output):
            raise Difference(f"{len(logprobs)} log-probabilities for {len(output)} tokens")
        logits, agreement = self.check_routes(tokens, routes)
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


def choice_gap(scores: torch.Tensor, ids: torch.Tensor) -> float:
    """How far `scores` [E] would have to move for `ids` [K], in this order, to be the top-k: 0 if they are it."""
    chosen = scores[ids]
    out_of_order = float((chosen[1:] - chosen[:-1]).clamp(min=0).max()) if len(ids) > 1 else 0.0
    others = scores.clone()
    others[ids] = float("-inf")
    return max(out_of_order, float(others.max() - chosen.min()), 0.0)


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
