"""MAny (arXiv 2604.14016): one LoRA per task, merged by algebra after training. Own reading of the paper.

There is no public code. The equations are the paper's; the rest of this text is this package's reading.

LPM: each task trains its own LoRA alone. After the task, the recursion of `parts.merge` merges the LoRAs of
every module, in float64 on the CPU. At inference the merged weight acts alone, on every sample and without a
router. Two things are not public: rho, and whether the regression is on the rows of A, on activations or on
B. This file takes the rows of A. In a small experiment the activations were much better, see
docs/results.md. The bundle keeps the tasks' LoRAs. Loading makes the merged weight from them again.

CPM: each task also trains a small LoRA on the projector's linears. (A full copy of a 7B model's projector
would be 21 million values per task.) Visual prototypes mix the outputs of the tasks' projectors per image,
see `parts.projector`. Families whose projector is part of the vision tower (Qwen's) have no CPM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cram.methods.base import Method, MethodState, check_state, uniform_route
from cram.methods.parts.merge import merge
from cram.methods.parts.projector import MixedProjector
from cram.model.attached import AttachedModel
from cram.model.factors import new_lora
from cram.routing.means import CentroidMean
from cram.routing.query import Query, Route

RHO = 1e-2  # small against the squared norm of a fresh row of A, 1 / 3
TEMPERATURE = 0.1


class ManyMethod(Method):
    """One merged LoRA per task, and one mixed projector LoRA per task."""

    name = "many"

    def __init__(self, cram: AttachedModel) -> None:
        super().__init__(cram)
        parts = cram.projector, cram.vision_tower
        self.projector = None if parts[0] is None else MixedProjector(cram, parts[0], parts[1], TEMPERATURE)

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the task's LoRAs."""
        self.cram.add_expert(task, new_lora(self.cram.modules, self.config.rank))
        if self.projector is not None:
            self.projector.begin_task(new_lora(self.projector.modules, self.config.rank))

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the task's LoRAs of the projector."""
        return [] if self.projector is None else self.projector.trainable()

    def training_means(self) -> dict[str, CentroidMean]:
        """Return the mean that the task's visual prototype follows."""
        return {} if self.projector is None else {"prototype": self.projector.mean}

    def end_task(self) -> None:
        """Freeze the task's LoRAs, and merge all LoRAs of the language model."""
        self.cram.freeze()
        if self.projector is not None:
            self.projector.end_task()
        self._merge()

    def route(self, query: Query | None, training: bool) -> Route:
        """Return gates of the newest LoRA alone in training, else gate 1. Merged weights read no gates."""
        route = uniform_route(self.cram)
        if training:
            route.gates[:, :, :-1] = 0
        return route

    def export_state(self) -> MethodState:
        """Return the projector's LoRAs and prototypes, named "projector.<name>"."""
        kept = {} if self.projector is None else self.projector.state()
        return MethodState({f"projector.{name}": tensor for name, tensor in kept.items()}, {})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up the projector's state and merge the loaded experts."""
        shapes = {}
        if self.projector is not None:
            shapes = self.projector.shapes(self.cram.num_experts, self.config.rank)
        check_state(tensors, {f"projector.{name}": shape for name, shape in shapes.items()})
        if self.projector is not None:
            self.projector.load_state({name: tensors[f"projector.{name}"] for name in shapes})
        self._merge()

    def trained_values(self) -> int:
        """Return the number of values of the projector's LoRAs."""
        tensors = self.export_state().tensors
        return sum(tensor.numel() for name, tensor in tensors.items() if name[-2:] in (".a", ".b"))

    def release(self) -> None:
        """Give back the plain projector."""
        if self.projector is not None:
            self.projector.release()

    def _merge(self) -> None:
        """Merge the experts of every module."""
        indices = range(self.cram.num_experts)
        modules = self.cram.modules.items() if indices else ()
        self.cram.set_solo({path: merge(module.factors(indices), RHO) for path, module in modules})
