"""What a program tells an engine to do: the same methods for an `Engine` of its own and for a server behind a
`client.EngineControl`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from .operations import (
    DEFAULT_BACKEND,
    DEFAULT_GROUP,
    CheckWeights,
    ContinueGeneration,
    ControlOperation,
    DestroyWeightsUpdateGroup,
    FlushCache,
    GetWeightsByName,
    InitWeightsUpdateGroup,
    PauseGeneration,
    ReleaseMemoryOccupation,
    ResumeMemoryOccupation,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
    UpdateWeightVersion,
)


class ControlMethods(ABC):
    """Signatures for readers and editors, which a test compares with the declarations. Every method raises a RuntimeError
    with the engine's message where it refuses."""

    @abstractmethod
    def _control(self, operation: ControlOperation) -> Any:
        """Have it done; what it asks for, if it asks for anything.

        Raises:
            RuntimeError: it was refused.
        """

    def flush_cache(self) -> None:
        """Empty the prefix cache. Requests that wait hold none of it, also after a pause with "retract".

        Raises:
            RuntimeError: requests run.
        """
        self._control(FlushCache())

    def pause_generation(self, mode: str = "abort") -> None:
        """Launch no step until `continue_generation`: "abort" ends requests, "retract" keeps them and takes their pages,
        "in_place" leaves everything where it is."""
        self._control(PauseGeneration(mode))

    def continue_generation(self) -> None:
        """
        Raises:
            RuntimeError: the weights are not whole, or memory is released.
        """
        self._control(ContinueGeneration())

    def update_weights_from_disk(
        self,
        model_path: str,
        *,
        load_format: str | None = None,
        flush_cache: bool = True,
        weight_version: str | None = None,
        base_version: str | None = None,
        abort_all_requests: bool = False,
    ) -> None:
        """All weights, from a checkpoint folder that every rank can open, or with "delta" what has changed of them since
        `base_version`. Unless the engine is paused, what runs comes to its end first.

        Raises:
            RuntimeError: it was refused, and the old weights serve; or the message says what the engine waits for.
        """
        self._control(
            UpdateWeightsFromDisk(
                model_path,
                load_format,
                flush_cache=flush_cache,
                weight_version=weight_version,
                base_version=base_version,
                abort_all_requests=abort_all_requests,
            )
        )

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = DEFAULT_GROUP,
        backend: str = DEFAULT_BACKEND,
    ) -> None:
        """Join a trainer's group, whose rank 0 the trainer is; waits until it has come together.

        Raises:
            RuntimeError: it has not.
        """
        self._control(InitWeightsUpdateGroup(master_address, master_port, rank_offset, world_size, group_name, backend))

    def update_weights_from_distributed(
        self,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str = DEFAULT_GROUP,
        *,
        load_format: str | None = None,
        delta: str | None = None,
        flush_cache: bool = True,
        weight_version: str | None = None,
        base_version: str | None = None,
        is_last: bool = False,
    ) -> None:
        """Take tensors, or what has changed of them, that the trainer broadcasts at the same time; see
        `engine.weight_sync.sender`.

        Raises:
            RuntimeError: as `update_weights_from_disk`.
        """
        self._control(
            UpdateWeightsFromDistributed(
                names,
                dtypes,
                shapes,
                group_name,
                load_format,
                delta,
                flush_cache=flush_cache,
                weight_version=weight_version,
                base_version=base_version,
                is_last=is_last,
            )
        )

    def update_weights_from_file(
        self,
        path: str,
        *,
        load_format: str | None = None,
        flush_cache: bool = True,
        weight_version: str | None = None,
        base_version: str | None = None,
        is_last: bool = False,
    ) -> None:
        """Some tensors or all, or what has changed of them since `base_version` ("delta"), from one safetensors file on the
        ranks' host, in shared memory for instance.

        Raises:
            RuntimeError: as `update_weights_from_disk`.
        """
        self._control(
            UpdateWeightsFromTensor(
                path=path,
                load_format=load_format,
                flush_cache=flush_cache,
                weight_version=weight_version,
                base_version=base_version,
                is_last=is_last,
            )
        )

    def update_weight_version(self, new_version: str, *, abort_all_requests: bool = True) -> None:
        """Call the weights that are there something else, for rows and answers from now on."""
        self._control(UpdateWeightVersion(new_version, abort_all_requests=abort_all_requests))

    def destroy_weights_update_group(self, group_name: str = DEFAULT_GROUP) -> None:
        """
        Raises:
            RuntimeError: no such group was joined.
        """
        self._control(DestroyWeightsUpdateGroup(group_name))

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The first rows of a tensor, as nested lists of numbers, None where they are not finite.

        Raises:
            RuntimeError: the model has no such tensor.
        """
        rows: list[Any] = self._control(GetWeightsByName(name, truncate_size))
        return rows

    def checksum_weights(self) -> dict[str, str]:
        """A checksum by tensor; `engine.weight_sync.checksum` makes the same of a trainer's.

        Raises:
            RuntimeError: ranks that must hold the same do not.
        """
        checksums: dict[str, str] = self._control(CheckWeights("checksum"))
        return checksums

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Give the memory of "weights" and "kv_cache", or one of them, back to the device, while nothing runs.

        Raises:
            RuntimeError: requests run or wait.
        """
        self._control(ReleaseMemoryOccupation(None if tags is None else list(tags)))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """Take it again. Weights are to be filled by one complete update before the engine generates."""
        self._control(ResumeMemoryOccupation(None if tags is None else list(tags)))
