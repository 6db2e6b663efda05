"""Control operations over HTTP: the trainer's client, the dialect, refusals, and what a server says of its weights."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from support.server_process import ServerProcess

from waybill.client import Client, EngineControl
from waybill.engine.weight_sync.checksum import checksum
from waybill.engine.weight_sync.colocated import FlattenedTensorBucket, MultiprocessingSerializer
from waybill.engine.weight_sync.delta_sender import DeltaSender, MemorySender
from waybill.engine.weight_sync.sender import WeightSender, free_port
from waybill.engine.weight_sync.update_group import UpdateGroup

GREEDY = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
NAME = "model.norm.weight"
JSON = {"content-type": "application/json"}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(checkpoint: str) -> Tensors:
    return load_file(f"{checkpoint}/model.safetensors")


@pytest.fixture(scope="module")
def other(base: Tensors) -> Tensors:
    torch.manual_seed(8)
    return {name: (t + torch.randn(t.shape) * 0.3 * t.float().std()).to(t.dtype) for name, t in base.items()}


@pytest.fixture
def control(server: ServerProcess, checkpoint: str) -> Iterator[EngineControl]:
    """Leaves the server, which other tests share, as it was started."""
    with EngineControl(server.url, timeout_s=60.0) as control:
        yield control
        if control.get_server_info()["blocked"].startswith("memory"):
            control.resume_memory_occupation()
        control.update_weights_from_disk(checkpoint, weight_version="default")
        control.continue_generation()
        control.flush_cache()


def sums(tensors: Tensors) -> dict[str, str]:
    return {name: checksum(tensor.float()) for name, tensor in tensors.items()}


def generate(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/generate", json={"text": "abc", "sampling_params": GREEDY, **fields})


def refusal(reply: httpx.Response) -> str:
    assert reply.status_code == 400, reply.text
    message: str = reply.json()["error"]["message"]
    return message


def test_a_trainer_drives_a_server(control: EngineControl, http: httpx.Client, base: Tensors, other: Tensors) -> None:
    started = generate(http, return_routed_experts=True).json()
    sender = WeightSender([(control, 2)], bucket_bytes=400_000)
    sender.connect()
    control.pause_generation("in_place")
    sender.send(other.items(), weight_version="step-1", flush_cache=False)
    control.continue_generation()
    control.flush_cache()
    assert control.checksum_weights() == sums(other)
    assert http.post("/weights_checker", json={}).json()["checksums"] == sums(other)
    assert http.post("/weights_checker", json={"action": "snapshot", "selector": "all"}).json()["success"]
    assert http.post("/weights_checker", json={"action": "compare", "allow_quant_error": False}).json()["success"]
    answer = generate(http, return_routed_experts=True).json()
    assert answer["output_ids"] != started["output_ids"]
    assert answer["meta_info"]["weight_version"] == "step-1"
    assert answer["meta_info"]["routed_experts_meta"]["weight_versions"] == [["step-1", 0, 3 + 6 - 1]]
    for path in ("/get_model_info", "/model_info", "/get_weight_version"):
        assert http.get(path).json()["weight_version"] == "step-1"
    sender.send(base.items(), weight_version="step-1.5")
    sender.close()
    assert "tensors have changed" in refusal(http.post("/weights_checker", json={"action": "compare"}))
    assert http.post("/end_weight_update", json={}).json()["success"]
    assert http.post("/update_weight_version", json={"new_version": "step-2"}).json()["success"]
    back = generate(http, return_routed_experts=True).json()
    assert back["meta_info"]["weight_version"] == "step-2"
    for key in ("output_ids", "text"):
        assert back[key] == started[key]
    assert back["meta_info"]["routed_experts"] == started["meta_info"]["routed_experts"]
    assert control.get_weights_by_name(NAME, 3) == base[NAME][:3].float().tolist()


def test_tensors_as_bytes_or_as_a_file(
    control: EngineControl, http: httpx.Client, base: Tensors, other: Tensors, tmp_path: Path
) -> None:
    data = base64.b64encode(save(other)).decode()
    reply = http.post("/update_weights_from_tensor", json={"safetensors": data, "weight_version": "bytes"})
    assert reply.status_code == 200 and reply.json()["success"], reply.text
    assert control.checksum_weights() == sums(other)
    save_file(base, tmp_path / "base.safetensors")
    # A header, as of a claim, takes ASCII alone.
    name = "poids-é-重み\n"
    control.update_weights_from_file(str(tmp_path / "base.safetensors"), weight_version=name)
    assert control.checksum_weights() == sums(base)
    assert http.get("/get_weight_version").json() == {"weight_version": name}
    with Client(str(http.base_url)) as client:
        claimed = client.generate([5, 6, 7], GREEDY, delivery="reference")
    assert claimed.meta is not None and {run[0] for run in claimed.meta.weight_versions} == {name}
    control.update_weights_from_file(str(tmp_path / "base.safetensors"))
    assert http.get("/get_weight_version").json()["weight_version"].startswith("update-")


def test_a_colocated_trainer(
    control: EngineControl, http: httpx.Client, base: Tensors, other: Tensors, tmp_path: Path
) -> None:
    """slime's body, with what it imports from here; then a delta, whose base is another after that."""
    bucket = FlattenedTensorBucket(named_tensors=list(other.items()))
    data = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    texts = [MultiprocessingSerializer.serialize(data, output_str=True)] * 2
    body = {"serialized_named_tensors": texts, "load_format": "flattened_bucket", "flush_cache": False}
    reply = http.post("/update_weights_from_tensor", json={**body, "weight_version": "3", "selector": "all"})
    assert reply.status_code == 200 and reply.json()["success"], reply.text
    assert control.checksum_weights() == sums(other)
    assert "must have 1, 2 (tp) or 2" in refusal(
        http.post("/update_weights_from_tensor", json={**body, "serialized_named_tensors": texts * 2})
    )
    floats = {name: tensor.float() for name, tensor in other.items()}
    updates = DeltaSender(MemorySender([control]))
    updates.send(floats.items(), weight_version="4")
    floats[NAME] = floats[NAME] * 2
    updates.send(floats.items(), weight_version="5")
    assert http.get("/get_weight_version").json() == {"weight_version": "5"}
    assert control.checksum_weights() == sums(floats)
    with pytest.raises(RuntimeError, match="base_version='4': the weights here are '5'; send a full update"):
        control.update_weights_from_file(str(tmp_path / "x"), load_format="delta", base_version="4")


def test_fields_of_the_dialect(control: EngineControl, http: httpx.Client, checkpoint: str) -> None:
    neutral = {"load_format": "auto", "is_async": False, "torch_empty_cache": True, "keep_pause": False}
    unused = {"recapture_cuda_graph": False, "token_step": 0, "manifest": None}
    body = {"model_path": checkpoint, "flush_cache": True, "abort_all_requests": False, **neutral, **unused}
    reply = http.post("/update_weights_from_disk", json=body)
    assert reply.status_code == 200 and reply.json()["success"], reply.text
    for field, value in (("is_async", True), ("keep_pause", True)):
        assert refusal(http.post("/update_weights_from_disk", json={**body, field: value})).startswith(
            f"{field} is not"
        )
    other_format = refusal(http.post("/update_weights_from_disk", json={**body, "load_format": "dummy"}))
    assert other_format == "load_format='dummy': must be one of auto, delta"
    tensors = {"serialized_named_tensors": ["gASV"], "load_format": None}
    assert "pickled tensors are not taken" in refusal(http.post("/update_weights_from_tensor", json=tensors))
    assert "give exactly one" in refusal(http.post("/update_weights_from_tensor", json={}))
    assert "base64" in refusal(http.post("/update_weights_from_tensor", json={"safetensors": "?"}))
    assert "mode" in refusal(http.post("/pause_generation", json={"mode": "colour"}))
    assert http.post("/pause_generation").json()["status"] == "ok"
    assert http.post("/continue_generation", json={"torch_empty_cache": True}).json()["status"] == "ok"
    for body in (
        {"names": [NAME], "dtypes": ["float32"], "shapes": [[2**70]], "group_name": "x"},
        {"names": ["\ud800"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "x"},
        {"names": [NAME], "dtypes": ["float32"], "shapes": [[128]], "group_name": "x", "load_format": "colour"},
    ):
        assert http.post("/update_weights_from_distributed", content=json.dumps(body), headers=JSON).status_code == 400
    with pytest.raises(RuntimeError, match="'nobody' was not joined"):
        control.destroy_weights_update_group("nobody")


def test_a_trainer_crashes(
    control: EngineControl, http: httpx.Client, base: Tensors, other: Tensors, tmp_path: Path
) -> None:
    """Between two buckets of one update: 503 with the reason, until a complete one has come."""
    started = generate(http).json()["output_ids"]
    port, names = free_port("127.0.0.1"), list(other)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        own = pool.submit(UpdateGroup, "127.0.0.1", port, 0, 3, "crash", "gloo", torch.device("cpu"), 30.0)
        control.init_weights_update_group("127.0.0.1", port, 1, 3, "crash")
        group = own.result()

        def bucket(part: list[str]) -> Any:
            shapes = [list(other[name].shape) for name in part]
            return pool.submit(
                control.update_weights_from_distributed,
                part,
                ["float32"] * len(part),
                shapes,
                "crash",
                weight_version="x",
            )

        first = bucket(names[:20])
        for name in names[:20]:
            group.broadcast(other[name].float())
        first.result()
        second = bucket(names[20:])
        for name in names[20:40]:
            group.broadcast(other[name].float())
        group.close()
        with pytest.raises(RuntimeError, match="torn"):
            second.result()
    reply = generate(http)
    assert reply.status_code == 503 and "a transfer was torn" in reply.json()["error"]["message"]
    assert generate(http, stream=True).status_code == 503
    chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
    assert chat.status_code == 503 and "torn" in chat.json()["error"]["message"]
    assert "torn" in refusal(http.post("/continue_generation"))
    assert "torn" in http.get("/get_server_info").json()["blocked"]
    assert "waybill_blocked 1.0" in http.get("/metrics").text
    assert http.get("/health").status_code == 200
    assert http.get("/health_generate").status_code == 503
    save_file(base, tmp_path / "base.safetensors")
    control.update_weights_from_file(str(tmp_path / "base.safetensors"), weight_version="healed")
    assert generate(http).json()["output_ids"] == started
    assert "waybill_blocked 0.0" in http.get("/metrics").text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_rank_alone_can_read(
    server: ServerProcess, control: EngineControl, base: Tensors, other: Tensors, tmp_path: Path, rank: int
) -> None:
    """Its path leads through a thread of that rank's own. All ranks come to the verdict of the other one."""
    save_file(other, tmp_path / "other.safetensors")
    (pid,) = [
        process.pid
        for process in server.descendants()
        if "waybill.launch.worker" in process.cmdline() and process.environ().get("RANK") == str(rank)
    ]
    with pytest.raises(RuntimeError, match=rf"rank {1 - rank}: .*nothing was changed"):
        control.update_weights_from_file(f"/proc/self/task/{pid}/root{tmp_path}/other.safetensors")
    assert control.checksum_weights() == sums(base)


def refusal_of_health(http: httpx.Client) -> str:
    reply = http.get("/health_generate")
    assert reply.status_code == 503
    return str(reply.json()["error"]["message"])


def test_pauses(control: EngineControl, http: httpx.Client) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for mode in ("in_place", "retract", "abort"):
            control.pause_generation(mode)
            assert http.get("/health_generate").status_code == 200, "a pause is no illness"
            assert "waybill_paused 1.0" in http.get("/metrics").text
            waiting = pool.submit(generate, http)
            num_steps = control.get_server_info()["num_steps"]
            with pytest.raises(concurrent.futures.TimeoutError):
                waiting.result(0.2)
            assert control.get_server_info()["num_steps"] == num_steps
            control.continue_generation()
            assert waiting.result().json()["meta_info"]["completion_tokens"] == 6
    assert "waybill_paused 0.0" in http.get("/metrics").text


def test_memory(control: EngineControl, http: httpx.Client, checkpoint: str) -> None:
    control.release_memory_occupation()
    assert "memory" in refusal_of_health(http)
    reply = generate(http)
    assert reply.status_code == 503 and "resume_memory_occupation" in reply.json()["error"]["message"]
    assert "tags" in refusal(http.post("/release_memory_occupation", json={"tags": ["colour"]}))
    assert http.get("/ready").status_code == 503 and http.get("/ping").status_code == 200
    control.resume_memory_occupation(["kv_cache", "cuda_graph"])
    control.resume_memory_occupation(["weights"])
    control.update_weights_from_disk(checkpoint)
    assert generate(http).status_code == 200


def routes_of(choice: dict[str, Any]) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False)


def test_a_trainer_of_vllm_drives_a_server(
    control: EngineControl, http: httpx.Client, base: Tensors, other: Tensors
) -> None:
    """As TRL's async GRPO and SkyRL call it: generate with routes, pause, start, update (packed), finish, resume."""
    params = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 1}
    asked = {"model": "default", "token_ids": [5, 6, 7, 8], "sampling_params": params, "cache_salt": "0"}
    started = http.post("/inference/v1/generate", json=asked, headers={"X-Session-ID": "s"}).json()
    (choice,) = started["choices"]
    native = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
    body = {"input_ids": [5, 6, 7, 8], "sampling_params": native, "return_routed_experts": True, "return_logprob": True}
    same = http.post("/generate", json={**body, "logprob_start_len": 0}).json()
    assert choice["token_ids"] == same["output_ids"] and choice["finish_reason"] == "length"
    own = [triple[0] for triple in same["meta_info"]["output_token_logprobs"]]
    assert [one["logprob"] for one in choice["logprobs"]["content"]] == pytest.approx(own, abs=1e-5)
    first, *scored = started["prompt_logprobs"]
    assert first is None
    of_prompt = [triple[0] for triple in same["meta_info"]["input_token_logprobs"][1:]]
    own = [entry[str(token)]["logprob"] for entry, token in zip(scored, [6, 7, 8], strict=True)]
    assert own == pytest.approx(of_prompt, abs=1e-5)
    rows = routes_of(choice)
    int32 = np.frombuffer(base64.b64decode(same["meta_info"]["routed_experts"]), dtype="<i4")
    assert rows.dtype == np.uint8 and len(rows) == 4 + 6 - 1 and np.array_equal(rows.reshape(-1), int32)
    cut = {**params, "routed_experts_prompt_start": 3}
    tail = http.post("/inference/v1/generate", json={**asked, "sampling_params": cut}).json()["choices"][0]
    assert np.array_equal(routes_of(tail), rows[3:])
    packed = http.post("/skyrl/v1/generate", json=asked).json()["choices"][0]["routed_experts"]
    raw = np.frombuffer(base64.b64decode(packed["data"]), dtype=packed["dtype"]).reshape(packed["shape"])
    assert np.array_equal(raw, rows)

    num_ranks = http.get("/get_world_size").json()["world_size"]
    port = free_port("127.0.0.1")
    init = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": num_ranks + 1}
    info = {
        "names": list(other),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in other.values()],
        "shapes": [list(tensor.shape) for tensor in other.values()],
        **{"packed": True, "packed_buffer_size_bytes": 200_000},
    }
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        joined = thread.submit(http.post, "/init_weight_transfer_engine", json={"init_info": init})
        group = UpdateGroup(
            "127.0.0.1", port, 0, num_ranks + 1, "weight_update_group", "gloo", torch.device("cpu"), 30.0
        )
        assert joined.result().json() == {"message": "Weight transfer initialized"}
        assert http.post("/pause", params={"mode": "keep"}).json() == {"status": "paused"}
        assert http.get("/is_paused").json() == {"is_paused": True}
        assert http.post("/start_weight_update", json={"is_checkpoint_format": True}).status_code == 200
        updated = thread.submit(http.post, "/update_weights", json={"update_info": info})
        held: list[torch.Tensor] = []
        for tensor in other.values():
            held.append(tensor)
            if sum(one.nbytes for one in held) > 200_000:
                group.send_bucket(held)
                held = []
        if held:
            group.send_bucket(held)
        assert updated.result().status_code == 200, updated.result().text
        assert http.post("/finish_weight_update", json={"weight_version": "7"}).status_code == 200
    assert http.post("/resume").json() == {"status": "resumed"}
    assert http.get("/is_paused").json() == {"is_paused": False}
    assert http.get("/weight_info").json() == {"weight_version": "7"}
    assert control.checksum_weights() == sums(other)
    after = http.post("/inference/v1/generate", json={**asked, "cache_salt": "7"}).json()["choices"][0]
    fresh = http.post("/generate", json={**body, "cache_salt": "8"}).json()
    assert after["token_ids"] == fresh["output_ids"] != choice["token_ids"]
    assert fresh["meta_info"]["routed_experts_meta"]["weight_versions"] == [["7", 0, 9]]
    group.close()


def test_fields_of_vllm(server: ServerProcess, http: httpx.Client) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 5, "temperature": 1.0, "ignore_eos": True, "seed": 3}
    plain = {"return_token_ids": True, "logprobs": 0, "kv_transfer_params": None, "use_beam_search": False, "top_k": 0}
    choice = http.post("/v1/completions", json={**body, **plain, "n": 1}).json()["choices"][0]
    assert choice["prompt_token_ids"] == [5, 6, 7] and len(choice["token_ids"]) == 5
    assert len(choice["logprobs"]["token_logprobs"]) == 5
    allowed = {"allowed_token_ids": [11, 12, 13], "routed_experts_prompt_start": 2, "prompt_logprobs": 0}
    choice = http.post("/v1/completions", json={**body, **plain, **allowed}).json()["choices"][0]
    assert set(choice["token_ids"]) <= {11, 12, 13}
    assert len(routes_of(choice)) == 3 + 5 - 1 - 2 and choice["prompt_logprobs"][0] is None
    both = {"allowed_token_ids": [11, 12], "logit_bias": {"11": -1e30}}
    choice = http.post("/v1/completions", json={**body, **both, "return_token_ids": True}).json()["choices"][0]
    assert choice["token_ids"] == [12] * 5
    messages = [{"role": "user", "content": "a"}]
    rendered = http.post("/v1/chat/completions/render", json={"messages": messages, "max_tokens": 4, "seed": 1}).json()
    assert rendered["token_ids"] == http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    answer = http.post("/inference/v1/generate", json=rendered).json()
    chat = {"messages": messages, "max_tokens": 4, "seed": 1, "return_token_ids": True, "bad_words": ["a"]}
    said = http.post("/v1/chat/completions", json={**chat, "bad_words": []}).json()
    assert answer["choices"][0]["token_ids"] == said["choices"][0]["token_ids"]
    banned = http.post("/tokenize", json={"prompt": "a", "add_special_tokens": False}).json()["tokens"]
    chat |= {"max_tokens": 24, "ignore_eos": True}
    assert banned[0] not in http.post("/v1/chat/completions", json=chat).json()["choices"][0]["token_ids"]
    assert "use_beam_search" in refusal(http.post("/v1/completions", json={**body, "use_beam_search": True}))
    trl = {"prompts": [[5, 6], [7]], "n": 2, "max_tokens": 3, "logprobs": 1, "images": None, "top_k": 0}
    batch = http.post("/generate/", json={**trl, "generation_kwargs": {"ignore_eos": True}}).json()
    assert batch["prompt_ids"] == [[5, 6], [7]] and [len(ids) for ids in batch["completion_ids"]] == [3] * 4
    assert all(len(pairs) in (1, 2) for sample in batch["logprobs"] for pairs in sample)
    spoken = http.post("/chat/", json={"messages": [messages], "max_tokens": 2, "chat_template_kwargs": {}}).json()
    assert spoken["prompt_ids"] == [rendered["token_ids"]]
    assert http.get("/health/").status_code == 200
