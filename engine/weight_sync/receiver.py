"""The engine's half of a weight update, on every rank, between two steps.

An update is refused as a whole or taken as a whole: it is checked on all ranks before its first byte, a bucket is put in
place only when all ranks have it, and where that is not possible - it is larger than what may be staged, a file cannot be
read to its end, later buckets fail - the weights count as torn until one complete update has come.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError

from ...parallel.fp8 import scale_names
from ...parallel.mesh import ParallelMesh
from ..control.operations import (
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
    WeightUpdate,
)
from ..models.causal_lm import CausalLM
from ..models.checkpoint import STORED_FP8, Checkpoint, check_dtypes, check_tensors
from ..models.registry import check_update_format
from ..models.weight_loader import Changes
from .bucket_source import bucket_of, bucket_transfer, specs_of
from .delta_file import FILE_PATTERN, DeltaFile, find_delta_files
from .delta_manifest import parse_manifest
from .delta_source import BroadcastDelta, DeltaSource, FilesDelta
from .delta_transfer import DeltaTransfer, KnownSums, check_held
from .group_registry import GroupRegistry
from .manifest import SENT_FP8, TensorSpec, UpdateProgress, check_distinct, check_specs, parse_specs
from .report import Outcome, RankReport, exchange_reports
from .transfer import (
    MAX_STAGED_BYTES,
    TRANSFER_ERRORS,
    BroadcastTransfer,
    Bucket,
    FileTransfer,
    Target,
    Transfer,
    packed,
)
from .update_group import torch_dtype

logger = logging.getLogger(__name__)

MAX_LOGGED = 500


class WeightReceiver:
    """This rank's weights as an update sees them."""

    def __init__(self, model: CausalLM, mesh: ParallelMesh, groups: GroupRegistry) -> None:
        self._mesh = mesh
        self._groups = groups
        self.weights = model.sharded_weights()
        self._fused = model.fused_weights()
        self._ignored = model.ignored_weights
        self._config = model.config
        self.known = self.weights | {name: fused.weight for name, fused in self._fused.items()}
        self._scales = scale_names(self.weights)
        self._sums = KnownSums()
        self.progress = UpdateProgress(frozenset(self.weights), self._scales)
        self.num_updates = 0

    def update_weights(self, op: WeightUpdate) -> Outcome:
        """Check, transfer, put in place. All ranks come to the same outcome."""
        began = time.perf_counter()
        prepared, error = None, None
        try:
            prepared = self._prepare(op)
        except (ValueError, *TRANSFER_ERRORS) as refusal:
            error = str(refusal)
        # Each rank reads files by itself: what it has found there is told, too.
        found = b"" if prepared is None else hashlib.blake2b("\n".join(sorted(prepared[0])).encode()).digest()
        verdict = exchange_reports(RankReport(error, payload=found), self._mesh.world)
        if verdict.error is None and len({report.payload for report in verdict.reports}) > 1:
            return Outcome(False, "path: the ranks find different tensors there; nothing was changed")
        if prepared is None or verdict.error is not None:
            return Outcome(False, f"{verdict.error}; nothing was changed{self.leave_group(op)}")
        names, transfer = prepared
        if op.base_version is None:
            self._sums.clear()
        has_changed, error = self._take(transfer)
        verdict = exchange_reports(RankReport(error, has_changed), self._mesh.world)
        if verdict.error is not None:
            return self._broken_off(verdict.error + self.leave_group(op), verdict.any_changed)
        return self._conclude(names, op, time.perf_counter() - began)

    def void(self) -> None:
        """Nothing is left of the weights."""
        self.progress.void()
        self._sums.clear()

    def leave_group(self, op: WeightUpdate) -> str:
        """After a bucket was refused or broke off: see `GroupRegistry.discard`. In words, if there was a group."""
        if isinstance(op, UpdateWeightsFromDistributed) and self._groups.discard(op.group_name):
            return f"; group {op.group_name!r} is left, join it again"
        return ""

    def _prepare(self, op: WeightUpdate) -> tuple[frozenset[str], Transfer]:
        """
        Raises:
            ValueError: the update does not fit the model; nothing was read.
        """
        if op.base_version is not None:
            return self._prepare_delta(op)
        if isinstance(op, UpdateWeightsFromDistributed):
            specs = parse_specs(op.names, op.dtypes, op.shapes, may_be_empty=op.is_last)
            check_specs([(spec.name, spec.shape) for spec in specs], self.known, self._ignored)
            self._check_dtypes(specs)
            group = self._groups.get(op.group_name)
            transfer: Transfer = BroadcastTransfer(group, buckets_of(op, specs))
            covered = self._covered((spec.name, spec.dtype == SENT_FP8) for spec in specs)
        elif isinstance(op, UpdateWeightsFromTensor) and op.serialized_named_tensors is not None:
            bucket = bucket_of(op.serialized_named_tensors, self._mesh)
            specs = specs_of(bucket)
            check_specs([(spec.name, spec.shape) for spec in specs], self.known, self._ignored)
            self._check_dtypes(specs)
            transfer = bucket_transfer(bucket, self._mesh.device)
            covered = self._covered((spec.name, spec.dtype == SENT_FP8) for spec in specs)
        else:
            checkpoint = open_files(op)
            if isinstance(op, UpdateWeightsFromDisk):
                check_update_format(op.model_path, self._config)
                check_tensors(self.weights, checkpoint, self._ignored, self._fused)
            shapes = [(name, tensor.shape) for name, tensor in checkpoint.tensors.items()]
            check_specs(shapes, self.known, self._ignored)
            check_dtypes(self.known, checkpoint)
            transfer = FileTransfer(checkpoint, self._mesh.device)
            covered = self._covered((name, tensor.dtype == STORED_FP8) for name, tensor in checkpoint.tensors.items())
        return self._checked(covered, op), transfer

    def _prepare_delta(self, op: WeightUpdate) -> tuple[frozenset[str], Transfer]:
        """
        Raises:
            ValueError: the delta does not fit the model; its payload was not read.
        """
        source = self._delta_source(op)
        specs = [part.spec for part in source.parts]
        check_specs([(spec.name, spec.shape) for spec in specs], self.known, self._ignored)
        self._check_dtypes(specs)
        check_held(source.parts, self.known)
        covered = self._covered((spec.name, spec.dtype == SENT_FP8) for spec in specs)
        names = self._checked(covered, op)
        if isinstance(op, UpdateWeightsFromDisk) and (missing := self.weights.keys() - names):
            raise ValueError(f"model_path: the delta lacks {len(missing)} tensors, {min(missing)} among them")
        return names, DeltaTransfer(source, covered, self._sums, self._mesh.world)

    def _delta_source(self, op: WeightUpdate) -> DeltaSource:
        """
        Raises:
            ValueError: there is no delta, or it is too large, or is another one than the request names.
        """
        if not isinstance(op, UpdateWeightsFromDistributed):
            return FilesDelta(open_delta_files(op))
        specs = parse_specs(op.names, op.dtypes, op.shapes)
        manifest = parse_manifest(op.delta or "")
        if [part.spec for part in manifest.parts] != specs:
            raise ValueError("delta: its parts must be the tensors of names, dtypes and shapes, in this order")
        if manifest.num_bytes > MAX_STAGED_BYTES:
            raise ValueError(
                f"delta: {manifest.num_bytes} bytes, must be at most {MAX_STAGED_BYTES}: send more buckets"
            )
        return BroadcastDelta(self._groups.get(op.group_name), manifest)

    def _checked(self, covered: Mapping[str, frozenset[str]], op: WeightUpdate) -> frozenset[str]:
        """All that the tensors of an update stand for.

        Raises:
            ValueError: they cannot be the last ones, and are said to be.
        """
        names = frozenset().union(*covered.values())
        self.progress.check(names, op.weight_version, self._source_of(op), is_last=op.ends_update)
        return names

    def _check_dtypes(self, specs: Sequence[TensorSpec]) -> None:
        for spec in specs:
            if spec.name in self.known:
                try:
                    self.known[spec.name].check_dtype(torch_dtype(spec.dtype))
                except ValueError as error:
                    raise ValueError(f"dtypes: {spec.name}: {error}") from error

    def _covered(self, tensors: Iterable[tuple[str, bool]]) -> dict[str, frozenset[str]]:
        """Names of the checkpoint's tensors that each of these stands for, by whether it comes in FP8: in floating point it
        brings its scales along.

        Raises:
            ValueError: one comes twice.
        """
        covered = {}
        for name, is_fp8 in tensors:
            if name not in self._ignored:
                names = self._fused[name].names if name in self._fused else frozenset({name})
                along = {self._scales[each] for each in names if each in self._scales and not is_fp8}
                covered[name] = names | along
        check_distinct(list(covered.items()))
        return covered

    def _take(self, transfer: Transfer) -> tuple[bool, str | None]:
        """Put tensors in place; whether weights were changed, and why it ended early, if it did."""
        target = Target(self.known, self._ignored, Changes())
        try:
            transfer.load(target, self._all_have_it)
        except (ValueError, *TRANSFER_ERRORS) as error:
            # A value error here: a file is not any more what it was when it was checked.
            return target.changes.any, f"the transfer broke off: {error}"
        return target.changes.any, None

    def _all_have_it(self, error: str | None) -> str | None:
        """Whether a staged bucket is whole on all ranks; else why not."""
        return exchange_reports(RankReport(error), self._mesh.world).error

    def _broken_off(self, error: str, any_changed: bool) -> Outcome:
        if not any_changed and self.progress.is_complete:
            return Outcome(False, f"{error}; nothing was changed")
        self.progress.tear(error)
        return Outcome(False, error if self.progress.blocked is None else self.progress.blocked.message)

    def _source_of(self, op: WeightUpdate) -> str:
        """A trainer that has started again joins another group, be it of the same name."""
        if isinstance(op, UpdateWeightsFromDistributed):
            return f"{op.group_name} {self._groups.serial(op.group_name)}"
        return "files"

    def _conclude(self, names: frozenset[str], op: WeightUpdate, seconds: float) -> Outcome:
        if not names and not op.ends_update:
            return Outcome(True, "the model uses none of these tensors")
        self.progress.receive(names, op.weight_version, self._source_of(op), is_last=op.ends_update)
        text = f"{len(names)} tensors in {seconds:.3f} s"
        if not self.progress.is_complete:
            return Outcome(True, f"{text}; {len(self.progress.missing)} are still to come")
        self.num_updates += 1
        return Outcome(True, text, self.progress.version or f"update-{self.num_updates}")


def buckets_of(op: UpdateWeightsFromDistributed, specs: Sequence[TensorSpec]) -> list[Bucket]:
    """Its broadcasts."""
    if op.packed_bytes:
        return packed(specs, op.packed_bytes)
    if op.load_format == "flattened_bucket":
        return [Bucket(specs, is_flat=True)]
    return [Bucket([spec]) for spec in specs]


def open_files(op: WeightUpdate) -> Checkpoint:
    if isinstance(op, UpdateWeightsFromDisk):
        return open_checkpoint(op.model_path, whole=True)
    assert isinstance(op, UpdateWeightsFromTensor) and op.path is not None
    return open_checkpoint(op.path, whole=False)


def open_delta_files(op: WeightUpdate) -> list[DeltaFile]:
    """As `open_checkpoint`.

    Raises:
        ValueError: there are no files of a delta.
    """
    whole = isinstance(op, UpdateWeightsFromDisk)
    assert isinstance(op, UpdateWeightsFromDisk | UpdateWeightsFromTensor)
    what, path = ("model_path", op.model_path) if isinstance(op, UpdateWeightsFromDisk) else ("path", op.path or "")
    try:
        return [DeltaFile(file) for file in find_delta_files(path, whole=whole)]
    except (ValueError, OSError, SafetensorError) as error:
        logger.warning("%s=%r: %s", what, path, str(error)[:MAX_LOGGED])
        kind = f"folder with {FILE_PATTERN}" if whole else "delta in a safetensors file"
        raise ValueError(
            f"{what}={path!r}: must be a {kind} that every rank can read; the ranks' log says why"
        ) from None


def open_checkpoint(path: str, *, whole: bool) -> Checkpoint:
    """The files of an update, each of which can be read as far as its names. What is wrong with one that is none of an
    update is for the operator alone: a client could look for files with it.

    Raises:
        ValueError: there is nothing of the kind at `path`.
    """
    what = "model_path" if whole else "path"
    try:
        if not whole and not Path(path).is_file():
            raise ValueError("not a regular file")
        return Checkpoint(path)
    except (ValueError, OSError, SafetensorError) as error:
        logger.warning("%s=%r: %s", what, path, str(error)[:MAX_LOGGED])
        kind = "checkpoint folder" if whole else "safetensors file"
        raise ValueError(
            f"{what}={path!r}: must be a {kind} that every rank can read; the ranks' log says why"
        ) from None
