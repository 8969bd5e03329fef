"""SAME (ICML 2026): one LoRA per task, mixed by a router in every module. Each task trains all of them.

    y = W0 x + b + sum_e g_e scale B_e A_e x             g: `parts.task.mixing`, one mixture per sample

While a task is trained, three things keep the older ones:

* The router's gradient is shortened along the directions in which the task's inputs vary most.
* The gradient G of every A becomes G (U diag(1 / (S + mu)) U^T + (I - U U^T) / mu). U holds the leading
  directions of the last task's inputs, and S the deviations along them.
* An older expert that matters more than it is used gets gate 0 in the next step, so it is not trained there.

Faithful to the released code: all constants, the order of the steps, and what a test takes: the two largest
gates of a softmax of temperature E.

Own readings:
* The released code knows the number of tasks beforehand and mixes the experts of tasks to come; here the
  experts are those of the tasks so far.
* Its mixture is a mean over a batch, here over the real tokens of a sample. It multiplies a mixed A with a
  mixed B, so that experts meet crosswise; here each expert has its own A and B.
* The deviations S are those of the step after the one that found U. So a step may have several forwards.
* Rank, scale and projections are the configuration's. The released code adapts the feed-forward projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cram.methods.base import Method, MethodState, check_state
from cram.methods.parts.task.curvature import damped, preconditioned
from cram.methods.parts.task.mixing import MixingRouter
from cram.model.attached import AttachedModel
from cram.model.factors import new_lora

MU, WINDOW, MOST, FREE_STEPS = 0.9, 3, 0.2, 10
STEP = "step"


class SameMethod(Method):
    """One expert more for every task; all experts and routers go on training."""

    name = "same"

    def __init__(self, cram: AttachedModel) -> None:
        """Installs a router in every module."""
        super().__init__(cram)
        self._routers: dict[str, MixingRouter] = {}
        for path, module in cram.modules.items():
            router = MixingRouter(path, module.in_features).to(module.weight.device)
            module.gating = self._routers[path] = router

    def begin_task(self, task: str, total_steps: int) -> None:
        """Add an expert, and train it with all older ones and the routers."""
        cram = self.cram
        old = [cram.expert_weights(index) for index in range(cram.num_experts)]
        names = [*cram.expert_names, task]
        cram.set_experts(names, [*old, new_lora(cram.modules, self.config.rank)], len(names))
        for path, router in self._routers.items():
            router.begin(len(names))
            self._watch(path, router, first=not old)

    def before_step(self, step: int) -> list[nn.Parameter] | None:
        """Take up what the last step told of the inputs."""
        if step:
            for router in self._routers.values():
                router.end_step()
        return super().before_step(step)

    def end_task(self) -> None:
        """Freeze experts and routers."""
        super().end_task()
        for router in self._routers.values():
            router.end_step()
            router.finish()

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up the routers' weights [E, D_in], importances and directions of the last inputs.

        Raises:
            ValueError: If names or shapes do not fit the experts. Then nothing is changed.
        """
        experts = self.cram.num_experts
        grown = {name: (experts,) for name in ("weight", "importance")}
        shapes = {
            f"{path}.{name}": (*grown[name], *own.shape[1:]) if name in grown else tuple(own.shape)
            for path, router in self._routers.items()
            for name, own in router.state_dict().items()
        }
        check_state(tensors, shapes)
        for path, router in self._routers.items():
            own = {name: tensors[f"{path}.{name}"] for name in router.state_dict()}
            device = router.weight.device
            router.weight = nn.Parameter(own.pop("weight").to(device, copy=True), requires_grad=False)
            for name, tensor in own.items():
                setattr(router, name, tensor.to(device, copy=True))

    def export_training(self) -> MethodState:
        """Return experts, routers, and the step at which the routers are."""
        tensors, values = super().export_training()
        return MethodState(tensors, {**values, STEP: next(iter(self._routers.values())).step})

    def import_training(
        self, task: str, total_steps: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Begin a task again and take up an exported training; see `Method.import_training`."""
        super().import_training(task, total_steps, tensors, values)
        for router in self._routers.values():
            router.step = values[STEP]

    def _watch(self, path: str, router: MixingRouter, first: bool) -> None:
        """Let the gradients of a module's router and A take the two steps of the method."""
        experts = self.cram.modules[path].experts
        assert experts is not None and experts.trained_a is not None

        def route(gradient: Tensor) -> Tensor:
            if router.step < FREE_STEPS:
                return gradient
            return damped(gradient, router.new_basis, router.new_scales, WINDOW, MOST)

        router.weight.register_hook(route)
        if not first:
            experts.trained_a.register_hook(
                lambda gradient: preconditioned(gradient, router.basis, router.scales, MU)
            )
