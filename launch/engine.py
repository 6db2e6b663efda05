"""`Engine`: a Python program is the frontend, and the ranks are its children under torchrun.

with Engine("path/to/checkpoint", tp_size=2, enable_return_routed_experts=True) as engine:
    answer = engine.generate("start with 12", {"temperature": 0}, return_routed_experts=True)
    answer["meta_info"]["routed_experts"]        # uint8 [rows, moe_layers, top_k]
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import queue
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..engine.config import EngineConfig
from ..engine.control.methods import ControlMethods
from ..engine.control.operations import ControlOperation, UpdateWeightsFromDisk, UpdateWeightsFromTensor
from ..engine.frontend.cumulative_answer import cumulative
from ..engine.frontend.engine_connection import EngineDeadError, EngineStartError
from ..engine.frontend.generate_request import GenerateReqInput, parse_generate_request
from ..engine.frontend.request_preparation import PreparedRequest
from ..engine.frontend.tokenizer_manager import TokenizerManager
from ..engine.ipc.critical_thread import start_critical_thread
from ..engine.routing.wire import RoutedExperts
from ..engine.text.tokenizer_file import load_tokenizer
from .supervisor import EngineProcess
from .transfers import encoder_place

logger = logging.getLogger(__name__)

T = TypeVar("T")

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
SHUT_DOWN = "the engine was shut down"

Result = Any
Prompt = str | list[str] | None


class Engine(ControlMethods):
    """An engine and its processes.

    Args:
        model_path: checkpoint folder in Hugging Face format.
        tp_size: ranks that share every layer.
        options: any other field of `EngineConfig`.

    Raises:
        ValueError: an option is wrong, or the checkpoint does not fit.
        EngineStartError: the processes did not come up; the message has their last words.
    """

    def __init__(self, model_path: str, tp_size: int = 2, **options: Any) -> None:
        config = EngineConfig(model_path=str(Path(model_path).resolve()), tp_size=tp_size, **options)
        if not (Path(config.model_path) / "config.json").is_file():
            raise ValueError(f"model_path={model_path!r}: must be a folder with a config.json (Hugging Face format)")
        self._closed = False
        # Why the processes ended, where they did so before there was somebody to tell.
        self._death: str | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = start_critical_thread(self._run_loop, "waybill engine", self._on_exit)
        self._processes = EngineProcess(config, on_exit=self._on_exit)
        atexit.register(self.shutdown)
        try:
            self._manager = self._call(self._connect(config))
            self._call(self._manager.start(START_TIMEOUT_S))
        except EngineStartError as error:
            self.shutdown()
            raise ValueError(str(error)) from None
        except EngineDeadError as error:
            self.shutdown()
            raise EngineStartError(str(error)) from None
        except BaseException:
            self.shutdown()
            raise

    @property
    def run_dir(self) -> str:
        """The folder of the engine's sockets and log; gone after `shutdown`."""
        return self._processes.run_dir

    async def _connect(self, config: EngineConfig) -> TokenizerManager:
        addresses = self._processes.addresses
        manager = TokenizerManager(
            config,
            load_tokenizer(config.tokenizer_path or config.model_path),
            leaders=addresses.leaders,
            frontend=addresses.frontend,
            queries=addresses.queries,
            encoder=encoder_place(config),
            on_failure=self._on_failure,
        )
        if self._death is not None:
            manager.fail_all(self._death)
        return manager

    # --- generation -------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt = None, sampling_params: Any = None, *, stream: bool = False, **fields: Any
    ) -> Result | Iterator[Result]:
        """Answer a prompt, or a list of prompts.

        Takes every request field of the native API: `input_ids` instead of `prompt` (lists or numpy arrays of integers, a
        2-D array or a list of either being a batch), `return_logprob`,
        `logprob_start_len`, `top_logprobs_num`, `return_routed_experts`, `routed_experts_start_len`,
        `routed_experts_format` ("compact", here a numpy array, or "int32"), `routed_experts_delivery`,
        `return_router_weights` (float32 in a numpy array beside compact rows), `rid`, `priority`, `extra_key`. With
        `stream`, returns an iterator of partial answers.

        Raises:
            ValueError: the request is refused; nothing was computed.
            GenerationError: the engine could not go on with a single prompt. In a list, with n > 1 and in streams the
                `finish_reason` of the one concerned says so instead, and the others have their answers.
            EngineDeadError: the engine ended before it answered.
        """
        request = self._parse(prompt, sampling_params, stream, fields)
        return self._iterate(request) if stream else self._call(self._first(request))

    async def async_generate(
        self, prompt: Prompt = None, sampling_params: Any = None, *, stream: bool = False, **fields: Any
    ) -> Result | AsyncIterator[Result]:
        """As `generate`, from any event loop; with `stream`, await it for an async iterator. Cancelling aborts."""
        request = self._parse(prompt, sampling_params, stream, fields)
        if stream:
            return self._iterate_async(request)
        try:
            return await asyncio.wrap_future(self._submit(self._first(request)))
        except asyncio.CancelledError:
            if not self._closed:
                raise
            raise EngineDeadError(SHUT_DOWN) from None

    def _parse(self, prompt: Prompt, sampling_params: Any, stream: bool, fields: dict[str, Any]) -> GenerateReqInput:
        given = {"routed_experts_format": "compact", **fields, "stream": stream}
        if prompt is not None:
            given["text"] = prompt
        if sampling_params is not None:
            given["sampling_params"] = sampling_params
        return parse_generate_request(given)

    async def _first(self, request: GenerateReqInput) -> Result:
        prepared = await self._manager.prepare(request)
        answer = await anext(self._manager.generate(prepared, form="array"))
        prepared.delivered()
        return answer

    async def _pump(self, request: GenerateReqInput, put: Callable[[Any], object]) -> None:
        """Feed a stream's items to `put`, then the request that they answer, or the error that ended it."""
        try:
            prepared = await self._manager.prepare(request)
            async for item in cumulative(self._manager.generate(prepared, form="array")):
                put(item)
            put(prepared)
        except asyncio.CancelledError:
            # By the caller, who takes nothing any more, or by a shutdown.
            put(EngineDeadError(SHUT_DOWN))
            raise
        except Exception as error:
            # Not swallowed: it is raised where the items are taken.
            put(error)

    def _iterate(self, request: GenerateReqInput) -> Iterator[Result]:
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        pump = self._submit(self._pump(request, items.put))
        try:
            while not isinstance(item := items.get(), PreparedRequest):
                if isinstance(item, Exception):
                    raise item
                yield item
            item.delivered()
        finally:
            pump.cancel()

    async def _iterate_async(self, request: GenerateReqInput) -> AsyncIterator[Result]:
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Any] = asyncio.Queue()
        pump = self._submit(self._pump(request, lambda item: loop.call_soon_threadsafe(items.put_nowait, item)))
        try:
            while not isinstance(item := await items.get(), PreparedRequest):
                if isinstance(item, Exception):
                    raise item
                yield item
            item.delivered()
        finally:
            pump.cancel()

    # --- control ----------------------------------------------------------------------------------------------------

    def abort_request(self, rid: str = "", *, abort_all: bool = False) -> None:
        """Abort requests whose rid starts with `rid`, or all of them; their callers get what there is."""

        async def abort() -> None:
            self._manager.abort_request(rid, abort_all=abort_all)

        self._call(abort())

    def update_weights_from_tensor(
        self,
        named_tensors: Mapping[str, Any],
        *,
        flush_cache: bool = True,
        weight_version: str | None = None,
        is_last: bool = False,
    ) -> None:
        """Some torch tensors or all, unsharded, through shared memory. The engine generates again when every tensor of the
        model has come, or after one with `is_last`.

        Raises:
            RuntimeError: as `update_weights_from_disk`.
        """
        # A program that calls an engine needs no torch until it brings tensors.
        from ..engine.weight_sync.shared_file import shared_safetensors  # noqa: PLC0415

        with shared_safetensors(named_tensors) as path:
            self.update_weights_from_file(path, flush_cache=flush_cache, weight_version=weight_version, is_last=is_last)

    def _control(self, operation: ControlOperation) -> Any:
        # The ranks have working directories of their own.
        if isinstance(operation, UpdateWeightsFromDisk):
            operation = msgspec.structs.replace(operation, model_path=str(Path(operation.model_path).resolve()))
        # Not `resolve`, which follows the link that stands for a file in memory.
        if isinstance(operation, UpdateWeightsFromTensor) and operation.path is not None:
            operation = msgspec.structs.replace(operation, path=str(Path(operation.path).absolute()))
        reply = self._call(self._manager.controls.run(operation))
        if not reply.success:
            raise RuntimeError(reply.message)
        return msgspec.json.decode(reply.payload) if reply.payload else None

    def get_server_info(self) -> dict[str, Any]:
        """Sizes, counters and state of the engine."""
        return self._call(self._manager.get_state())

    def fetch_routed_experts(self, claim: str) -> RoutedExperts:
        """Rows that an answer by reference left with the engine.

        Raises:
            ValueError: the claim is unknown or has expired.
        """
        return self._call(self._manager.queries.fetch_routed_experts(claim))

    # --- life -------------------------------------------------------------------------------------------------------

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._closed:
            coroutine.close()
            raise EngineDeadError(SHUT_DOWN)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return self._submit(coroutine).result()
        except concurrent.futures.CancelledError:
            raise EngineDeadError(SHUT_DOWN) from None

    def _run_loop(self) -> None:
        """Whatever ends the loop before its time, such as a `SystemExit` in a callback, ends the engine; the loop goes on
        to tell those who wait."""
        while True:
            try:
                self._loop.run_forever()
                return
            except BaseException as error:
                logger.critical("the engine's event loop was left", exc_info=error)
                reason = f"the engine's event loop was left: {error!r}"
                self._on_exit(reason)
                self._on_failure(reason)

    def _on_failure(self, reason: str) -> None:
        """The frontend's half cannot go on, and callers were told: end the other half, which takes a moment."""
        start_critical_thread(self._processes.terminate, "end engine", lambda _: None)

    def _on_exit(self, message: str) -> None:
        """The processes ended by themselves: whoever waits is told."""

        def fail() -> None:
            self._death = message
            if hasattr(self, "_manager"):
                self._manager.fail_all(message)

        self._loop.call_soon_threadsafe(fail)

    def shutdown(self) -> None:
        """End the engine and everything it started. May be called again."""
        if self._closed:
            return
        if hasattr(self, "_manager"):
            if self._processes.is_running:
                self._call(self._manager.stop_engine())
                self._processes.wait(STOP_TIMEOUT_S)
            self._call(self._close_manager())
        self._closed = True
        asyncio.run_coroutine_threadsafe(end_tasks(), self._loop).result()
        atexit.unregister(self.shutdown)
        self._processes.terminate()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close_manager(self) -> None:
        self._manager.fail_all(SHUT_DOWN)
        self._manager.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


async def end_tasks() -> None:
    """Cancel whatever else the running loop has to do, so that nobody waits for a loop that is gone."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
