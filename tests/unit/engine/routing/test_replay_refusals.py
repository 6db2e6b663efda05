"""What cannot replay is refused with its name, and a replay that would not be one does not go unnoticed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from support.replay_models import make_model, make_routes, random_rows, random_tokens
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, LlamaConfig, LlamaForCausalLM

from waybill.engine.routing.replay import ReplayError, RoutedExpertsBatch, leaf_module_classes, replay_routing
from waybill.engine.routing.wire import RoutedExperts

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def batch_of(routes: RoutedExperts, length: int = 4) -> RoutedExpertsBatch:
    return RoutedExpertsBatch.from_padded([routes], torch.ones(1, length))


def refuse(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message), replay_routing(model):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "model",
    [LlamaForCausalLM(LlamaConfig(**TINY)), GraniteMoeForCausalLM(GraniteMoeConfig(**TINY, num_local_experts=4))],
    ids=["dense", "another family"],
)
def test_unknown_models_are_refused_by_name(model: nn.Module) -> None:
    refuse(model, f"{type(model).__name__}: has no router that is known; Qwen3-MoE")


def test_models_that_hold_two_models_are_refused() -> None:
    both = nn.ModuleDict({"policy": make_model("qwen3_moe"), "reference": make_model("qwen3_moe")})
    refuse(both, r"built twice, \['policy.model.layers.2.mlp.gate', 'reference.model.layers.2.mlp.gate'\]")


def test_orphan_and_tied_routers_are_refused() -> None:
    model = make_model("qwen3_moe")
    model.spare = make_model("qwen3_moe").model.layers[1].mlp.gate
    refuse(model, "spare: an orphan router")
    model = make_model("qwen3_moe")
    model.model.layers[2].mlp.gate = model.model.layers[1].mlp.gate
    refuse(model, "layers 1 and 2: their routers are tied")
    model = make_model("qwen3_moe")
    model.model.layers[2].mlp.gate.weight = model.model.layers[1].mlp.gate.weight
    refuse(model, "layers 1 and 2: their routers are tied")


def test_one_context_at_a_time() -> None:
    model = make_model("qwen3_moe")
    with (
        replay_routing(model),
        pytest.raises(ValueError, match="is in a replay_routing context already"),
        replay_routing(model),
    ):
        pass
    with replay_routing(model):
        model(random_tokens(1, 4), routed_experts=None)


def test_batches_that_do_not_fit_are_refused() -> None:
    model, tokens = make_model("qwen3_moe"), random_tokens(1, 4)
    routes = make_routes(model, random_rows(model, 3))
    unknown = routes.rows.copy()
    unknown[1, 0] = (1, 2, 8)
    other_layers = RoutedExperts(routes.rows, msgspec.structs.replace(routes.meta, layer_ids=[0, 1]))
    narrow = RoutedExperts(routes.rows[..., :2], msgspec.structs.replace(routes.meta, top_k=2))
    with replay_routing(model) as replay:
        for message, arguments in (
            ("routed_experts: absent", {}),
            ("is a RoutedExperts, must be a RoutedExpertsBatch", {"routed_experts": routes}),
            (r"is for inputs of shape \(1, 5\), must be \(1, 4\)", {"routed_experts": batch_of(routes, 5)}),
            (r"has layers \(0, 1\) .*must be \(1, 2\)", {"routed_experts": batch_of(other_layers)}),
            (r"top_k 2, must be \(1, 2\) and 3", {"routed_experts": batch_of(narrow)}),
            ("has expert 8, must be below 8", {"routed_experts": batch_of(make_routes(model, unknown))}),
        ):
            with pytest.raises(ValueError, match=message):
                model(tokens, **arguments)
            with pytest.raises(ValueError, match=message):
                model(inputs_embeds=model.get_input_embeddings()(tokens), **arguments)
    assert replay.counts.replayed == 0


def test_a_bypassed_router_is_noticed() -> None:
    """As with a fused kernel, the block's routing is not the router's; in the second forward, the first one was right."""
    model = make_model("qwen3_moe")
    batch = batch_of(make_routes(model, random_rows(model, 3)))
    with replay_routing(model):
        model(random_tokens(1, 4), routed_experts=batch)
        model.model.layers[2].mlp.forward = lambda hidden: hidden
        with pytest.raises(ReplayError, match=r"layers \[2\]: their routers did not run"):
            model(random_tokens(1, 4), routed_experts=batch)


def test_a_layer_that_drops_arguments_is_noticed() -> None:
    model = make_model("qwen3_moe")
    batch = batch_of(make_routes(model, random_rows(model, 3)))
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, routed_experts, **kwargs: forward(*args, **kwargs)
    with replay_routing(model), pytest.raises(ReplayError, match="layer 1: routed_experts did not reach it"):
        model(random_tokens(1, 4), routed_experts=batch)


def test_tokens_that_were_cut_on_the_way_are_noticed() -> None:
    model = make_model("qwen3_moe")
    batch = batch_of(make_routes(model, random_rows(model, 3)))
    block = model.model.layers[1].mlp
    forward = block.forward
    block.forward = lambda hidden: torch.cat([forward(hidden[:, :2]), hidden[:, 2:]], dim=1)
    with replay_routing(model), pytest.raises(ReplayError, match=r"layer 1: 2 tokens reached its router, .* has 4"):
        model(random_tokens(1, 4), routed_experts=batch)


def test_checkpointing_the_block_alone_is_noticed() -> None:
    """Its recomputation does not pass the attention, so that nothing says which batch it belongs to."""
    model = make_model("qwen3_moe")
    batch = batch_of(make_routes(model, random_rows(model, 3)))
    model.model.layers[1].mlp = checkpoint_wrapper(model.model.layers[1].mlp)
    with replay_routing(model):
        logits = model(random_tokens(1, 4), routed_experts=batch).logits
        with pytest.raises(ReplayError, match="layer 1: its router ran without its attention"):
            logits.sum().backward()


def test_a_backward_after_the_context_is_refused() -> None:
    model = make_model("qwen3_moe")
    model.gradient_checkpointing_enable()
    batch = batch_of(make_routes(model, random_rows(model, 3)))
    with replay_routing(model):
        logits = model(random_tokens(1, 4), routed_experts=batch).logits
    with pytest.raises(ReplayError, match="began after its replay_routing context had ended"):
        logits.sum().backward()


def test_hooks_are_gone_after_an_error() -> None:
    model: Any = make_model("qwen3_moe")
    with pytest.raises(RuntimeError, match="the reason"), replay_routing(model):
        raise RuntimeError("the reason")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_leaf_modules_are_the_blocks_with_experts() -> None:
    names = {
        family: [kind.__name__ for kind in leaf_module_classes(make_model(family))] for family in ("mixtral", "olmoe")
    }
    assert names == {"mixtral": ["MixtralSparseMoeBlock"], "olmoe": ["OlmoeSparseMoeBlock"]}
