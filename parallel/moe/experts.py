"""The experts of one rank, and the two ways to split them.

"ep": whole experts, E/n a rank. "tp": a slice I/n of every expert's intermediate dim. Either way a rank computes a
partial result for the tokens it is given, and the dispatcher sums. Each expert is a SwiGLU MLP, see activation.py.

Expert placement (expert location): contiguous, by rank; no EPLB, no redundant experts.

Legend: T tokens, D hidden, E experts, F experts on this rank, K experts per token, I intermediate width on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..cpu_ops.experts import ON_ONE_RANK, ExpertsSplit, NativeClamp, experts_native, has_native_experts
from ..linear import shard_size
from ..mesh import Axis
from ..weight_format import Fp8Matrix, Placed, Stack, WeightFormat, product_of_stack
from ..weights import Piece, ShardedWeight, TransposableWeight
from .activation import ClampedExperts, SwigluClamp, activate, add_down_bias

# (hidden [T, D], ids [T, K], weights [T, K], gate_up [F, 2I, D], down [F, D, I]) -> [T, D]; ids of padding, and of experts
# on other ranks, add nothing. Those of torch and C++ count from this rank's first expert, those of Triton from a `first`.
ExpertsFunction = Callable[..., torch.Tensor]
# Up to so many tokens, sorting them does not pay on a GPU; of FP8.
MAX_FEW_TOKENS, MAX_FEW_FP8_TOKENS = 4, 1


def experts_torch_reference(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    *,
    clamped: ClampedExperts | None = None,
) -> torch.Tensor:
    """Expert by expert, as the definition reads."""
    out = torch.zeros_like(hidden)
    for expert in range(gate_up.shape[0]):
        tokens, choice = torch.where(ids == expert)
        activated = activate(product_of_stack(hidden[tokens], gate_up, expert), clamped, expert)
        result = add_down_bias(product_of_stack(activated, down, expert), clamped, expert)
        out.index_add_(0, tokens, (result * weights[tokens, choice, None]).to(out.dtype))
    return out


def experts_by_group(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    *,
    clamped: ClampedExperts | None = None,
) -> torch.Tensor:
    """Tokens sorted by expert, one matrix product per expert that has any; for CPU, where counts cost no sync."""
    num_local = gate_up.shape[0]
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat.clamp(min=-1) + 1, minlength=num_local + 1).tolist()
    tokens = order // ids.shape[1]
    inputs = hidden[tokens]
    results = hidden.new_zeros(inputs.shape)
    first = sizes[0]
    for expert, size in enumerate(sizes[1 : num_local + 1]):
        if size:
            rows = results[first : first + size]
            activated = activate(product_of_stack(inputs[first : first + size], gate_up, expert), clamped, expert)
            product_of_stack(activated, down, expert, out=rows)
            if clamped is not None:
                rows += clamped.down_bias[expert]
        first += size
    return _combine(results, order, weights)


def _combine(results: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows in sorted order back to their tokens, weighted and summed over the choices of each: [T * K, D] -> [T, D]."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    chosen = results[back].view(*weights.shape, results.shape[-1])
    return (chosen * weights[..., None]).to(results.dtype).sum(dim=1)


def select_experts_function(
    backend: str,
    down: torch.Tensor,
    first: int,
    num_experts: int,
    clamped: ClampedExperts | None = None,
    split: ExpertsSplit = ON_ONE_RANK,
) -> ExpertsFunction:
    """The reference where `backend` is "torch_reference", else the fastest for weights like `down` [F, D, I], which are of
    the experts from `first` on of `num_experts`. Where these are spread over ranks results may be in float32."""
    if backend != "torch_reference" and down.device.type != "cpu":
        return _experts_on_gpu(first, num_experts, clamped)
    function: ExpertsFunction = experts_torch_reference
    if backend != "torch_reference" and has_native_experts(down.dtype, *down.shape[1:]):
        function = _native_experts(split, clamped)
    else:
        if backend != "torch_reference":
            function = experts_by_group
        if clamped is not None:
            function = partial(function, clamped=clamped)
    if first == 0:
        return function
    return lambda hidden, ids, *rest: function(hidden, ids - first, *rest)


def _native_experts(split: ExpertsSplit, clamped: ClampedExperts | None) -> ExpertsFunction:
    if clamped is None:
        return experts_native if split == ON_ONE_RANK else partial(experts_native, split=split)
    clamp = NativeClamp(clamped.gate_up_bias, clamped.down_bias, clamped.clamp.alpha, clamped.clamp.limit)
    return partial(experts_native, split=split, clamp=clamp)


def _experts_on_gpu(first: int, num_experts: int, clamped: ClampedExperts | None) -> ExpertsFunction:
    # Triton comes with torch's CUDA builds alone.
    from .experts_few_fp8_triton import experts_few_fp8_triton  # noqa: PLC0415
    from .experts_few_triton import experts_few_triton  # noqa: PLC0415
    from .experts_fp8_triton import experts_fp8_triton  # noqa: PLC0415
    from .experts_triton import experts_triton  # noqa: PLC0415

    def choose(
        hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: Stack, down: Stack
    ) -> torch.Tensor:
        if isinstance(gate_up, Fp8Matrix) and isinstance(down, Fp8Matrix):
            if hidden.shape[0] <= MAX_FEW_FP8_TOKENS:
                return experts_few_fp8_triton(hidden, ids, weights, gate_up, down, first=first)
            return experts_fp8_triton(hidden, ids, weights, gate_up, down, first=first, num_experts=num_experts)
        assert isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor)
        if hidden.shape[0] <= MAX_FEW_TOKENS:
            return experts_few_triton(hidden, ids, weights, gate_up, down, first=first, clamped=clamped)
        return experts_triton(
            hidden, ids, weights, gate_up, down, first=first, num_experts=num_experts, clamped=clamped
        )

    return choose


class Experts(nn.Module):
    """This rank's part of the experts; see the module for `split`."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        axis: Axis,
        *,
        split: str,
        backend: str,
        weight_format: WeightFormat,
        clamp: SwigluClamp | None = None,
    ) -> None:
        super().__init__()
        whole = split == "ep"
        self._num_local = shard_size(num_experts, axis, "num_experts") if whole else num_experts
        self._width = intermediate_size if whole else shard_size(intermediate_size, axis, "moe_intermediate_size")
        self._first_expert = axis.rank * self._num_local if whole else 0
        self._first_column = 0 if whole else axis.rank * self._width
        self._num_experts = num_experts
        self._full = (intermediate_size, hidden_size)
        cuts = () if whole or axis.size == 1 else (self._width,)
        self.gate_up = weight_format.matrix(
            self._num_local, 2 * self._width, hidden_size, row_cuts=(self._width, *cuts)
        )
        self.down = weight_format.matrix(self._num_local, hidden_size, self._width, column_cuts=cuts)
        self.clamped = None
        if clamp is not None:
            self.gate_up_bias = weight_format.empty(self._num_local, 2 * self._width)
            self.down_bias = weight_format.empty(self._num_local, hidden_size)
            # Where the ranks share an expert, one of them brings its last bias.
            self._has_down_bias = whole or axis.rank == 0
            if not self._has_down_bias:
                self.down_bias.data.zero_()
            self.clamped = ClampedExperts(self.gate_up_bias, self.down_bias, clamp)
        self._function = select_experts_function(
            backend,
            self.down.data,
            self._first_expert,
            num_experts,
            self.clamped,
            ExpertsSplit(axis.size, whole),
        )

    def sharded_weight(self, expert_id: int, part: str) -> ShardedWeight:
        """One projection of one expert: `part` is "gate" [I, D], "up" [I, D] or "down" [D, I]."""
        shape = self._full if part != "down" else self._full[::-1]
        local = expert_id - self._first_expert
        if not 0 <= local < self._num_local:
            return self.down.sharded(shape)
        columns = slice(self._first_column, self._first_column + self._width)
        every = slice(0, self._full[1])
        if part == "down":
            return self.down.sharded(shape, Placed((every, columns), every, (local,)))
        half = 0 if part == "gate" else self._width
        return self.gate_up.sharded(shape, Placed((columns, every), slice(half, half + self._width), (local,)))

    def fused_weight(self, part: str) -> ShardedWeight:
        """One projection of all experts, as `transformers` holds them: "gate_up" [E, 2I, D] or "down" [E, D, I]."""
        width, hidden = self._full
        experts = slice(self._first_expert, self._first_expert + self._num_local)
        columns = slice(self._first_column, self._first_column + self._width)
        every, all_local = slice(0, hidden), (slice(None),)
        if part == "down":
            index = (experts, every, columns)
            return self.down.sharded((self._num_experts, hidden, width), Placed(index, every, all_local))
        halves = [
            Placed(
                (experts, slice(half * width + columns.start, half * width + columns.stop), every),
                slice(half * self._width, (half + 1) * self._width),
                all_local,
            )
            for half in (0, 1)
        ]
        return self.gate_up.sharded((self._num_experts, 2 * width, hidden), *halves, num_fused=2)

    def stacked_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        """The same two, by their names; a checkpoint's file may have their matrices transposed."""
        stacks = {part: self.fused_weight(part) for part in ("gate_up", "down")}
        return {
            f"{prefix}.{part}_proj": TransposableWeight(weight.shape, weight.pieces) for part, weight in stacks.items()
        }

    def transposed_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        """Of clamped experts, as checkpoints hold them: [E, D, 2I], gate and up side by side for each of the I, and
        [E, I, D], with their biases."""
        width, hidden = self._full
        experts = slice(self._first_expert, self._first_expert + self._num_local)
        rows = slice(self._first_column, self._first_column + self._width)
        pairs = slice(2 * rows.start, 2 * rows.stop)
        every, of_all = slice(0, hidden), self._num_experts
        gate_up, down = self.gate_up.data.data.transpose(1, 2), self.down.data.data.transpose(1, 2)
        down_bias = (Piece((experts, every), self.down_bias.data),) if self._has_down_bias else ()
        return {
            f"{prefix}.gate_up_proj": ShardedWeight(
                (of_all, hidden, 2 * width), (Piece((experts, every, pairs), gate_up),)
            ),
            f"{prefix}.gate_up_proj_bias": ShardedWeight(
                (of_all, 2 * width), (Piece((experts, pairs), self.gate_up_bias.data),)
            ),
            f"{prefix}.down_proj": ShardedWeight((of_all, width, hidden), (Piece((experts, rows, every), down),)),
            f"{prefix}.down_proj_bias": ShardedWeight((of_all, hidden), down_bias),
        }

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Partial results [T, D] of the local experts, maybe in float32."""
        if hidden.shape[0] == 0 and hidden.device.type != "cpu":
            return torch.zeros_like(hidden)
        # On a CPU also of no tokens: ranks that exchange results must agree on their dtype.
        return self._function(hidden, ids, weights, self.gate_up.stored, self.down.stored)
