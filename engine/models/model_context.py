"""What every layer of a model is built with."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...parallel.mesh import Axis, ParallelMesh
from ...parallel.moe.all_to_all import AllToAllDispatcher
from ...parallel.moe.dispatch import AllGatherDispatcher, Dispatcher, ReplicatedDispatcher, SyncClock
from ...parallel.weight_format import Fp8Format, WeightFormat
from .model_config import ModelConfig


@dataclass(frozen=True)
class ModelContext:
    """A model's configuration, this rank's place, and the choices that layers make by them."""

    config: ModelConfig
    mesh: ParallelMesh
    moe_split: str = "ep"
    experts_backend: str = "auto"
    dispatcher: str = "all_gather"
    clock: SyncClock = field(default_factory=SyncClock)
    fp8_activations: str = "auto"

    @property
    def weight_format(self) -> WeightFormat:
        if not self.config.is_fp8:
            return WeightFormat(self.config.dtype, self.mesh.device)
        # A CPU has no product of such numbers: there it would only cost.
        default = "exact" if self.mesh.device.type == "cpu" else "e4m3"
        how = default if self.fp8_activations == "auto" else self.fp8_activations
        return Fp8Format(self.config.dtype, self.mesh.device, how == "e4m3")

    @property
    def axis(self) -> Axis:
        """What attention, dense MLPs and the vocabulary are sharded over."""
        return self.mesh.tp

    def make_dispatcher(self) -> Dispatcher:
        if self.mesh.dp.size == 1:
            return ReplicatedDispatcher(self.mesh.ep)
        if self.dispatcher == "all_to_all":
            return AllToAllDispatcher(self.mesh.ep, self.config.moe.num_experts, self.clock)
        return AllGatherDispatcher(self.mesh.ep, self.clock)
