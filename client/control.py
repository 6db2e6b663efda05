"""Control of a server by a trainer: pauses and weight updates. Needs no torch.

`waybill.engine.weight_sync.sender.WeightSender` drives an `EngineControl` as it drives an `Engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import httpx

from .answer import check_status, http_options

DEFAULT_GROUP = "weight_update_group"


class EngineControl:
    """A connection to one server. `timeout_s` bounds every call: transfers, and the requests that an update waits for, too.

    Every method raises `ServerError`, a `RuntimeError` with the server's message, where the server refuses.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**http_options(base_url, api_key, timeout_s), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def pause_generation(self, mode: str = "abort") -> None:
        """Launch no step until `continue_generation`: "abort" ends requests, "retract" keeps them and takes their pages,
        "in_place" leaves everything where it is."""
        self._post("/pause_generation", mode=mode)

    def continue_generation(self) -> None:
        self._post("/continue_generation")

    def flush_cache(self) -> None:
        """Empty the prefix cache, while nothing runs."""
        self._post("/flush_cache")

    def update_weights_from_disk(
        self,
        model_path: str,
        *,
        flush_cache: bool = True,
        weight_version: str | None = None,
        abort_all_requests: bool = False,
    ) -> None:
        """All weights, from a checkpoint folder that every rank can open."""
        self._post(
            "/update_weights_from_disk",
            model_path=model_path,
            flush_cache=flush_cache,
            weight_version=weight_version,
            abort_all_requests=abort_all_requests,
        )

    def update_weights_from_file(
        self, path: str, *, flush_cache: bool = True, weight_version: str | None = None, is_last: bool = False
    ) -> None:
        """Some tensors or all, from one safetensors file on the ranks' host, in shared memory for instance."""
        self._post(
            "/update_weights_from_tensor",
            path=path,
            flush_cache=flush_cache,
            weight_version=weight_version,
            is_last=is_last,
        )

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = DEFAULT_GROUP,
        backend: str = "gloo",
    ) -> None:
        """Join a trainer's group, whose rank 0 the trainer is; waits until all ranks have."""
        self._post(
            "/init_weights_update_group",
            master_address=master_address,
            master_port=master_port,
            rank_offset=rank_offset,
            world_size=world_size,
            group_name=group_name,
            backend=backend,
        )

    def update_weights_from_distributed(
        self,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str = DEFAULT_GROUP,
        *,
        load_format: str | None = None,
        flush_cache: bool = True,
        weight_version: str | None = None,
        is_last: bool = False,
    ) -> None:
        """Take tensors that the trainer broadcasts at the same time."""
        self._post(
            "/update_weights_from_distributed",
            names=names,
            dtypes=dtypes,
            shapes=shapes,
            group_name=group_name,
            load_format=load_format,
            flush_cache=flush_cache,
            weight_version=weight_version,
            is_last=is_last,
        )

    def destroy_weights_update_group(self, group_name: str = DEFAULT_GROUP) -> None:
        self._post("/destroy_weights_update_group", group_name=group_name)

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Give the memory of "weights" and "kv_cache", or one of them, back to the device, while nothing runs."""
        self._post("/release_memory_occupation", tags=None if tags is None else list(tags))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Take it again. Weights are to be filled by one complete update before the server generates."""
        self._post("/resume_memory_occupation", tags=None if tags is None else list(tags))

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The first rows of a tensor, as nested lists of numbers, None where they are not finite."""
        rows: list[Any] = self._post("/get_weights_by_name", name=name, truncate_size=truncate_size).json()
        return rows

    def checksum_weights(self) -> dict[str, str]:
        """A checksum by tensor; see `engine.weight_sync.checksum`."""
        checksums: dict[str, str] = self._post("/weights_checker", action="checksum").json()["checksums"]
        return checksums

    def get_server_info(self) -> dict[str, Any]:
        """Options, sizes, counters and state of the server."""
        response = self._http.get("/get_server_info")
        check_status(response)
        info: dict[str, Any] = response.json()
        return info

    def _post(self, route: str, /, **fields: Any) -> httpx.Response:
        response = self._http.post(route, json=fields)
        check_status(response)
        return response
