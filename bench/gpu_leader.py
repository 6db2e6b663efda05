"""The real leader in this process, over a model of random weights on the device; the benchmark drives it step by step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from gpu_host_time import DeviceWait
from gpu_plan import GREEDY, NUM_WARM_UPS, Plan
from model_shapes import config_of
from output_side import Surroundings

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import OutputBatch, OutputOptions, SamplingParams
from waybill.engine.ipc.frontend_messages import TokenizedGenerateReqInput
from waybill.engine.kv_cache.kv_store import KVStore
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.registry import build_model, family_of
from waybill.engine.plan import StopPeers
from waybill.engine.replica import Rank, make_scheduler
from waybill.engine.routing.capturer import RoutedExpertsCapturer
from waybill.engine.routing.ring import RouteRing
from waybill.engine.routing.wire import DTYPES
from waybill.engine.runner.model_runner import ModelRunner
from waybill.engine.scheduler.step_limits import StepLimits
from waybill.launch.args import EMBEDDED_MODEL
from waybill.parallel.fp8 import E4M3
from waybill.parallel.mesh import ParallelMesh
from waybill.parallel.moe.dispatch import SyncClock
from waybill.parallel.weight_format import Fp8Matrix


def fill_with_noise(model: torch.nn.Module) -> None:
    """Matrices that keep the variance of their input, and ones."""
    for parameter in model.parameters():
        if parameter.dtype == E4M3:
            for part in parameter.data if parameter.dim() > 2 else [parameter.data]:
                part.copy_(torch.randn(part.shape, device=part.device))
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.data.fill_(1)
    for module in model.modules():
        if isinstance(module, Fp8Matrix):
            module.scales.data.fill_(module.shape[-1] ** -0.5)


class Bench:
    """A model of random weights on the device, and leaders over it."""

    def __init__(self, plan: Plan, folder: str, mesh: ParallelMesh | None = None, moe_split: str = "ep") -> None:
        self.plan = plan
        self.mesh = mesh or ParallelMesh.single(torch.device(plan.device))
        self.device = self.mesh.device
        hf_config = config_of(plan.shape, None)
        parsed = family_of(hf_config.model_type).parse_config(hf_config, folder, "auto")
        self.model_config = replace(parsed, is_fp8=plan.is_fp8)
        context = ModelContext(self.model_config, self.mesh, moe_split)
        self.model = build_model(context, 16384)
        fill_with_noise(self.model)
        self.config = EngineConfig(
            model_path=str(EMBEDDED_MODEL),
            device=plan.device,
            kv_cache_tokens=plan.kv_tokens,
            context_length=16384,
            max_running_requests=max(plan.batches),
            chunked_prefill_size=max(plan.prefills),
            enable_prefix_cache=False,
            enable_return_routed_experts=True,
        )
        self.limits = StepLimits.resolve(self.config.chunked_prefill_size, 16384, max(plan.batches))
        self.num_pages = self.config.kv_cache_tokens or 0
        specs = self.model.kv_specs()
        self.kv_store = KVStore(self.model_config.num_layers, self.num_pages, 1, specs, self.device)

    @contextmanager
    def spread_routes(self) -> Iterator[None]:
        """Tokens choose their experts independently, as after balanced training: what attention adds to all tokens of a
        prompt alike is small beside what each token is. The factors are powers of two, so that nothing is lost."""
        matrices = [layer.self_attn.o_proj.matrix for layer in self.model.decoder_layers()]
        outputs = [each.scales.data if isinstance(each, Fp8Matrix) else each.data.data for each in matrices]
        factors = [(self.model.embed_tokens.weight.data, 64.0), *((weight, 1 / 16) for weight in outputs)]
        for weight, factor in factors:
            weight.mul_(factor)
        yield
        for weight, factor in factors:
            weight.div_(factor)

    def make_runner(self, ring: RouteRing | None) -> ModelRunner:
        return ModelRunner(
            self.mesh,
            self.model,
            self.kv_store,
            page_size=1,
            max_running=self.limits.max_running,
            max_tokens=self.limits.max_tokens,
            context_length=16384,
            attention_backend="auto",
            capturer=None if ring is None else RoutedExpertsCapturer(ring, self.device),
        )

    @contextmanager
    def leader(self, *, capture: bool, peers: Sequence[str] = ()) -> Iterator[Leader]:
        ring = RouteRing.create(self.model_config.route_geometry(self.limits.max_tokens), 8) if capture else None
        runner = self.make_runner(ring)
        config = self.config if capture else msgspec.structs.replace(self.config, enable_return_routed_experts=False)
        rank = Rank(
            config,
            self.mesh,
            self.model_config,
            self.limits,
            self.num_pages,
            runner,
            None if ring is None else ring.geometry,
            ring,
            SyncClock(),
            {},
        )
        with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
            surroundings = Surroundings(folder, str(EMBEDDED_MODEL), peers)
            yield Leader(make_scheduler(rank, surroundings.endpoints), surroundings, self.plan)
            for peer in surroundings.endpoints.peers:
                peer.send(StopPeers())
            # They leave before the sockets go.
            time.sleep(0.5)
            # NCCL's groups cannot be left while graphs have recorded collectives of theirs.
            runner.drop_graphs()
            surroundings.close()


class Leader:
    """Drives a scheduler step by step. Where there are several dp ranks each has one in its own process; they do the same
    calls, so that their schedulers take the same steps."""

    def __init__(
        self, scheduler: Any, surroundings: Surroundings, plan: Plan, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        self.scheduler = scheduler
        self.plan = plan
        self._surroundings = surroundings
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._rng = np.random.default_rng(dp_rank)
        self._num_sent = 0
        self.prefill_tokens = plan.prefills[0]
        # Of the last decodes' steps, the median of all but the wait for the device.
        self.host_s = 0.0
        # Whether to take another step, by whether this dp rank needs one. Where the dp ranks' numbers of requests differ so
        # do their answers, and all must step as long as one does.
        self.goes_on: Callable[[bool], bool] = bool

    def send(
        self, prompt_tokens: int, max_new_tokens: int, params: SamplingParams = GREEDY, *, routed: bool = True
    ) -> None:
        self._num_sent += 1
        vocab_size = self.plan.shape["vocab_size"]
        params = msgspec.structs.replace(params, max_new_tokens=max_new_tokens, sampling_seed=self._num_sent)
        self._surroundings.outbox.send(
            TokenizedGenerateReqInput(
                seq=self._num_sent,
                rid=f"r{self._dp_rank}-{self._num_sent}",
                input_ids=self._rng.integers(0, vocab_size, prompt_tokens).astype("<i4").tobytes(),
                sampling_params=params,
                output_options=OutputOptions(return_routed_experts=routed),
            )
        )

    def wait_for_requests(self, count: int) -> None:
        while len(self.scheduler.queues) < count:
            self.scheduler.receive()

    def start_decoding(self, batch: int, params: SamplingParams = GREEDY) -> None:
        """`batch` requests, past their prefills and the warm-up steps."""
        for _ in range(batch):
            self.send(self.plan.context, self.plan.decode_tokens(batch), params, routed=False)
        self.wait_for_requests(batch)
        queues = self.scheduler.queues
        while self.goes_on(not all(req.is_decoding for req in queues.running) or queues.num_waiting > 0):
            self.scheduler.step()
        for _ in range(NUM_WARM_UPS):
            self.scheduler.step()

    def decode_seconds(self, batch: int, params: SamplingParams = GREEDY) -> list[float]:
        """Seconds of consecutive steps in which `batch` requests decode, host and device together."""
        self.start_decoding(batch, params)
        seconds, host_seconds, wait = [], [], DeviceWait()
        with wait.counted():
            for _ in range(self.plan.num_steps - 8):
                began, waited = time.perf_counter(), wait.seconds
                self.scheduler.step()
                seconds.append(time.perf_counter() - began)
                host_seconds.append(seconds[-1] - (wait.seconds - waited))
        self.host_s = statistics.median(host_seconds)
        self.drain()
        return seconds

    def prefill_seconds(self, num_tokens: int) -> float:
        """One prompt, from the step's plan to its first token on the host."""
        self.send(num_tokens, 1, routed=False)
        self.wait_for_requests(1)
        began = time.perf_counter()
        self.drain()
        return time.perf_counter() - began

    def sustained_prefill_seconds(self, num_tokens: int, count: int) -> float:
        """Seconds of each of `count` prompts, a step each, launched while the one before it is computed."""
        began = time.perf_counter()
        for number in range(count):
            self.send(num_tokens, 1, routed=False)
            self.wait_for_requests(min(number + 1, 2))
            self.scheduler.step()
        self.drain()
        return (time.perf_counter() - began) / count

    def routes_of(
        self,
        prompt_tokens: int,
        max_new_tokens: int,
        count: int,
        params: SamplingParams = GREEDY,
        total: int | None = None,
    ) -> list[np.ndarray]:
        """Rows of requests that run together, `count` of this dp rank; the leader of dp rank 0 gets all, which are `total`,
        or as many of each dp rank."""
        total = count * self._dp_size if total is None else total
        for _ in range(count):
            self.send(prompt_tokens, max_new_tokens, params)
        self.wait_for_requests(count)
        self.drain()
        found: list[np.ndarray] = []
        while self._dp_rank == 0 and len(found) < total:
            message, frames = self._surroundings.answers.receive()
            if isinstance(message, OutputBatch):
                for output, frame in zip((o for o in message.outputs if o.routed_experts), frames, strict=True):
                    meta = output.routed_experts
                    assert meta is not None
                    found.append(
                        np.frombuffer(frame, DTYPES[meta.dtype]).reshape(meta.rows, meta.num_layers, meta.top_k)
                    )
        return found

    def drain(self) -> None:
        while self.goes_on(not self.scheduler.is_idle):
            self.scheduler.step()
