"""What a CUDA graph of a step reads: written on the host, and computed with, here without a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_families import write_family

from waybill.engine.attention import AttentionBatch, make_attention_backend
from waybill.engine.config import EngineConfig
from waybill.engine.kv_cache.kv_store import KVStore
from waybill.engine.kv_cache.req_to_token_pool import ReqToTokenPool
from waybill.engine.models.checkpoint import Checkpoint
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.registry import build_model, load_model_config
from waybill.engine.models.weight_loader import load_weights
from waybill.engine.plan import ScheduleBatch, ScheduledReq
from waybill.engine.runner.graph_parts import GraphParts
from waybill.engine.runner.step_tensors import lay_out, make_forward_batch, write_graph_inputs
from waybill.engine.vision.placed_image import PlacedImage
from waybill.parallel.dp_attention import ReplicatedTokens
from waybill.parallel.mesh import Axis, ParallelMesh

CPU = torch.device("cpu")
SCRATCH = 9
IMAGE = PlacedImage(1, 4, 3, 5, 4, "/nowhere", 0, "float32")


def decode(row: int, position: int, delta: int = 0) -> ScheduledReq:
    return ScheduledReq(row, position, 1, b"", 0, b"", True, rope_delta=delta)


def written(num_inputs: int, width: int, *reqs: ScheduledReq) -> list[list[int]]:
    host = lay_out(ScheduleBatch(0, list(reqs)))
    # What stands there of an earlier step.
    values = np.full((num_inputs, width), 77)
    write_graph_inputs(values, host, np.repeat(host.req_rows, host.q_lens), SCRATCH)
    return values.tolist()


def test_decodes_beside_and_behind_images() -> None:
    found = written(4, 5, decode(2, 30, -10), decode(0, 7), decode(1, 50, -3))
    assert found == [
        [-1, -1, -1, 0, 0],
        [30, 7, 50, 0, 0],
        [2, 0, 1, SCRATCH, SCRATCH],
        [20, 7, 47, 0, 0],
    ]
    # Nobody has images: positions are those of the sequence. A model that takes none reads no others.
    assert written(4, 2, decode(2, 30))[3] == [30, 0]
    assert written(3, 2, decode(2, 30)) == [[-1, 0], [30, 0], [2, SCRATCH]]


def test_a_chunk_of_text_behind_an_image() -> None:
    ids = np.array([5, 6, 7], dtype="<i4").tobytes()
    chunk = ScheduledReq(1, 19, 3, ids, 0, b"", False, rope_delta=IMAGE.delta_behind)
    assert written(4, 4, chunk, decode(0, 2)) == [[5, 6, 7, -1], [19, 20, 21, 2], [1, 1, 1, 0], [9, 10, 11, 2]]


def test_tokens_of_images_never_go_into_a_graph() -> None:
    """Not even one that looks like a decode: the last token of a prompt that ends in an image."""
    last = ScheduledReq(1, IMAGE.end - 1, 1, bytes(4), 0, b"", True, images=[IMAGE])
    with pytest.raises(AssertionError, match="image"):
        written(4, 4, last)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_moe"])
def test_a_graphs_forward_is_that_of_a_step_without_one(family: str, tmp_path: Path) -> None:
    """Of decodes with other positions for the rotation than those in the sequence, and padding behind them."""
    folder = write_family(family, tmp_path)
    config = load_model_config(EngineConfig(model_path=str(folder), dtype="float32"))
    mesh = ParallelMesh.single(CPU)
    model = build_model(ModelContext(config, mesh), 64)
    load_weights(model.sharded_weights(), Checkpoint(str(folder)), model.ignored_weights, CPU)
    torch.manual_seed(1)
    kv_store = KVStore(config.num_layers, 40, 1, model.kv_specs(), CPU)
    for layer in range(config.num_layers):
        for tensor in kv_store.layer(layer).values():
            tensor.normal_()
    pool = ReqToTokenPool(3, 12, kv_store.scratch_page, CPU)
    pool.write([(row, 0, np.arange(12 * row, 12 * row + 12, dtype="<i4").tobytes()) for row in range(3)])
    last_token_ids = torch.tensor([3, 40, 200, 0])
    backend = make_attention_backend("auto", CPU)
    deltas = (-4, 0, -2) if config.vision is not None else (0, 0, 0)
    reqs = [decode(row, 7 + row, delta) for row, delta in enumerate(deltas)]
    host = lay_out(ScheduleBatch(0, reqs))
    layout = ReplicatedTokens(Axis.single())
    batch = make_forward_batch(host, pool, 1, last_token_ids, backend, layout)
    parts = GraphParts(model, backend, kv_store, pool, 1, last_token_ids, mesh, None)  # type: ignore[arg-type]
    inputs = parts.new_inputs(5)
    assert len(inputs) == (3 if config.vision is None else 4)
    write_graph_inputs(inputs.numpy(), host, host.req_rows, pool.scratch_row)
    tokens = parts.read(inputs)
    plan = backend.plan(AttentionBatch([1] * 5, tokens.kv_lens.tolist(), pool.page_table, inputs[2], 1))
    with torch.inference_mode():
        expected = model(batch, backend, kv_store, None)
        found = parts.forward(inputs, tokens, backend, plan)
    torch.testing.assert_close(found[:3], expected, rtol=0.0, atol=1e-5)
