"""MAny (arXiv 2604.14016): one LoRA per task, merged by algebra after training. Own reading of the paper.

There is no public code. The equations are the paper's; the rest of this text is this package's reading.

LPM: each task trains its own LoRA alone. After the task, the recursion of `parts.merge` merges the LoRAs of
every module, in float64 on the CPU. At inference the merged weight acts alone, on every sample and without a
router. Two things are not public: rho, and whether the regression is on the rows of A, on activations or on
B. The default is the rows of A. With `merge_by_inputs` the regression is on the inputs of the linears, see
`parts.inputs`; in a small experiment that was much better, see docs/results.md. The bundle keeps the tasks'
LoRAs and the inputs' second moments. Loading makes the merged weight from them again.

CPM: each task also trains a small LoRA on the projector's linears. (A full copy of a 7B model's projector
would be 21 million values per task.) Visual prototypes mix the outputs of the tasks' projectors per image,
see `parts.projector`. Families whose projector is part of the vision tower (Qwen's) have no CPM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cram.methods.base import Method, MethodState, check_state, uniform_route
from cram.methods.parts.inputs import InputRegression
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
        self.inputs = InputRegression(cram.modules) if self.config.merge_by_inputs else None

    @property
    def acts_elsewhere(self) -> bool:
        """True if the projector has LoRAs."""
        return self.projector is not None

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the task's LoRAs."""
        self.cram.add_expert(task, new_lora(self.cram.modules, self.config.rank))
        if self.projector is not None:
            self.projector.begin_task(new_lora(self.projector.modules, self.config.rank))
        if self.inputs is not None:
            self.inputs.begin_task()

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
        if self.inputs is not None:
            self.inputs.end_task(self.cram.expert_weights(self.cram.num_experts - 1))
        self._merge()

    def route(self, query: Query | None, training: bool) -> Route:
        """Return gates of the newest LoRA alone in training, else gate 1. Merged weights read no gates."""
        route = uniform_route(self.cram)
        if training:
            route.gates[:, :, :-1] = 0
        return route

    def export_state(self) -> MethodState:
        """Return the projector's LoRAs and prototypes, "projector.<name>", and the inputs' moments."""
        kept = {} if self.projector is None else self.projector.state()
        moments = {} if self.inputs is None else self.inputs.state()
        return MethodState({f"projector.{name}": tensor for name, tensor in kept.items()} | moments, {})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up the projector's state and the inputs' moments, and merge the loaded experts."""
        shapes, moments = {}, {}
        if self.projector is not None:
            shapes = self.projector.shapes(self.cram.num_experts, self.config.rank)
        if self.inputs is not None:
            indices = range(self.cram.num_experts)
            ranks = {p: sum(len(a) for a, _ in m.factors(indices)) for p, m in self.cram.modules.items()}
            moments = self.inputs.shapes(ranks)
        check_state(tensors, {f"projector.{name}": shape for name, shape in shapes.items()} | moments)
        if self.projector is not None:
            self.projector.load_state({name: tensors[f"projector.{name}"] for name in shapes})
        if self.inputs is not None:
            self.inputs.load_state(tensors)
        self._merge()

    def trained_values(self) -> int:
        """Return the number of values of the projector's LoRAs."""
        tensors = self.export_state().tensors
        return sum(tensor.numel() for name, tensor in tensors.items() if name[-2:] in (".a", ".b"))

    def release(self) -> None:
        """Give back the plain projector, and take the hooks out of the model."""
        if self.projector is not None:
            self.projector.release()
        if self.inputs is not None:
            self.inputs.release()

    def export_training(self) -> MethodState:
        """Return the task in training with the inputs that it has seen."""
        tensors, values = super().export_training()
        return MethodState(tensors | ({} if self.inputs is None else self.inputs.training_state()), values)

    def import_training(
        self, task: str, total_steps: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Begin a task again and take up an exported training."""
        super().import_training(task, total_steps, tensors, values)
        if self.inputs is not None:
            self.inputs.load_training(tensors)

    def _merge(self) -> None:
        """Merge the experts of every module."""
        indices = range(self.cram.num_experts)
        parts = {path: m.factors(indices) for path, m in self.cram.modules.items()} if indices else {}
        by_inputs = self.inputs
        if by_inputs is None:
            self.cram.set_solo({path: merge(factors, RHO) for path, factors in parts.items()})
        else:
            self.cram.set_solo({path: by_inputs.merged(path, factors) for path, factors in parts.items()})
