"""Weight updates of an engine on a GPU, also from another one."""

from __future__ import annotations

import pytest
import torch
from support.weight_updates import OPTIONS, Tensors, answers, assert_serves

from waybill import Engine
from waybill.engine.weight_sync.sender import WeightSender


@pytest.mark.gpu
def test_a_gpu_takes_new_weights_and_gives_its_memory_back(checkpoint: str, base: Tensors, other: Tensors) -> None:
    """Its CUDA graphs hold the addresses of weights and KV pool."""
    with Engine(checkpoint, tp_size=1, device="cuda", **OPTIONS) as engine:
        started = answers(engine)
        engine.update_weights_from_tensor(other, weight_version="other")
        assert_serves(engine, other)
        changed = answers(engine)
        assert changed != started
        engine.update_weights_from_disk(checkpoint)
        assert_serves(engine, base, started)
        engine.release_memory_occupation()
        with pytest.raises(RuntimeError, match="memory: kv_cache, weights is released"):
            engine.generate(input_ids=[1])
        engine.resume_memory_occupation()
        engine.update_weights_from_tensor(other, weight_version="other")
        assert_serves(engine, other, changed)


def on_second_gpu(tensors: Tensors) -> Tensors:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    return {name: tensor.to("cuda:1") for name, tensor in tensors.items()}


@pytest.mark.gpu
def test_a_trainer_sends_from_one_gpu_to_an_engine_on_another(checkpoint: str, base: Tensors, other: Tensors) -> None:
    """By NCCL, in buckets; made on a stream of the trainer's own."""
    there, back = on_second_gpu(other), on_second_gpu(base)
    device, stream = torch.device("cuda", 1), torch.cuda.Stream(1)
    with Engine(checkpoint, tp_size=1, device="cuda", **OPTIONS) as engine:
        started = answers(engine)
        with WeightSender([(engine, 1)], device=device, bucket_bytes=300_000, timeout_s=60.0) as sender:
            with torch.cuda.stream(stream):
                sender.send(((name, tensor * 2 / 2) for name, tensor in there.items()), weight_version="there")
            assert_serves(engine, other)
            assert answers(engine) != started
            sender.send(back.items(), weight_version="back")
            assert_serves(engine, base, started)


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_good", [1, 0])
def test_a_bucket_between_gpus_that_is_refused_ends_the_group(checkpoint: str, base: Tensors, num_good: int) -> None:
    """Also the first one, with which NCCL would only now connect its ends."""
    tensors = on_second_gpu(base)
    with Engine(checkpoint, tp_size=1, device="cuda", **OPTIONS) as engine:
        sender = WeightSender([(engine, 1)], device=torch.device("cuda", 1), timeout_s=20.0)
        sender.connect()
        for _ in range(num_good):
            sender.send(tensors.items())
        with pytest.raises(RuntimeError, match="the model has no model\\.colour"):
            sender.send([("model.colour", torch.zeros(3, device="cuda:1"))])
        sender.connect()
        sender.send(tensors.items())
        assert_serves(engine, base)
        sender.close()
