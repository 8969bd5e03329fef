"""A multimodal projector with a LoRA per task, whose outputs are mixed image by image (MAny's CPM).

    w[n, t] = softmax_t(cos(v_n, mu_t) / T)        h_n = sum_t w[n, t] P_t(x_n)

P_t is the frozen projector with the LoRA of task t on its linears. v_n is a feature of image n. mu_t is the
mean of that feature over the training images of task t.

If the encoder reuses the model's vision tower, v is CLIP's image feature, from the same run of the tower.
Otherwise v is the mean of the projector's input over the image's tokens; this feature separates tasks less
sharply. Outputs are mixed and not weights, because the projector is not linear.

While a task is trained, its own LoRA acts alone. With E tasks the projector runs E times per image.

Gates that a caller fixes for all rows (`forced`) take the place of w. They are those of the first layer, and
what they lack of 1 goes to the plain projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram.methods.parts.task.sums import GatheredMean
from cram.model.attached import AttachedModel
from cram.model.factors import Factors
from cram.model.linear import ExpertLinear
from cram.model.state import Current, ForwardState
from cram.routing.query import Route
from cram.routing.threads import PerThread


class MixedProjector:
    """The adapted linears, prototypes and hooks of one model's projector. The projector's path stays.

    Attributes:
        modules: Path inside the projector -> adapted linear.
        prototypes: mu [E, D_v], one row per task. The row of a task without images is zero.
        mean: The mean over the images of the task in training; the newest prototype.
    """

    def __init__(
        self, cram: AttachedModel, projector: nn.Module, tower: nn.Module, temperature: float
    ) -> None:
        """Wraps the projector's linears and hooks the projector. `release` undoes both."""
        self._cram, self._projector, self._temperature = cram, projector, temperature
        self._current = Current()
        linears = [(path, part) for path, part in projector.named_modules() if isinstance(part, nn.Linear)]
        self.modules: dict[str, ExpertLinear] = {}
        for path, linear in linears:
            adapted = ExpertLinear(linear, 0, f"projector.{path}", self._current, cram.config.dropout)
            self.modules[path] = adapted.train(linear.training)
            projector.set_submodule(path, adapted)
        reused = cram.encoder.reuses_vision_tower
        self.prototypes = torch.zeros(0, cram.encoder.image_dim if reused else linears[0][1].in_features)
        self.mean = self._no_mean()
        self._seen: PerThread[Tensor | None] = PerThread(None)
        self._weights: PerThread[Tensor | None] = PerThread(None)
        self._hooks = [
            projector.register_forward_pre_hook(self._before),
            projector.register_forward_hook(self._mix),
        ]
        if reused:
            self._hooks.append(tower.register_forward_hook(self._after_tower))

    def begin_task(self, weights: Mapping[str, Factors]) -> None:
        """Adds a LoRA, a [r, D_in] and b [D_out, r] per linear, and starts its training."""
        for path, linear in self.modules.items():
            linear.append(*weights[path], scale=self._cram.config.scale, trained=True)
        self.prototypes = F.pad(self.prototypes, (0, 0, 0, 1))
        self.mean = self._no_mean()

    def _no_mean(self) -> GatheredMean:
        return GatheredMean(self.prototypes.shape[1], self._cram.device)

    def end_task(self) -> None:
        """Ends the training of the newest LoRA."""
        if self.mean.export() is not None:
            self.prototypes[-1] = self.mean.mean()
        for linear in self.modules.values():
            assert linear.experts is not None
            linear.experts = linear.experts.freeze()

    def trainable(self) -> list[nn.Parameter]:
        """Returns the factors in training."""
        return [parameter for linear in self.modules.values() for parameter in linear.trainable()]

    def state(self) -> dict[str, Tensor]:
        """Returns "prototypes" [E, D_v], and "<path>.a" [E, r, D_in], "<path>.b" [E, D_out, r] per linear."""
        found = {"prototypes": self.prototypes.clone()}
        for path, linear in self.modules.items():
            if pairs := linear.factors(range(len(self.prototypes))):
                found[f"{path}.a"] = torch.stack([a for a, _ in pairs]).float()
                found[f"{path}.b"] = torch.stack([b for _, b in pairs]).float()
        return found

    def shapes(self, experts: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Returns names and shapes of the state after `experts` tasks with LoRAs of one rank."""
        shapes: dict[str, tuple[int, ...]] = {"prototypes": (experts, self.prototypes.shape[1])}
        for path, linear in self.modules.items():
            r = min(rank, linear.in_features, linear.out_features)
            shapes[f"{path}.a"] = (experts, r, linear.in_features)
            shapes[f"{path}.b"] = (experts, linear.out_features, r)
        return shapes if experts else {"prototypes": shapes["prototypes"]}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up a state of the right shapes. Every LoRA is frozen."""
        self.prototypes = tensors["prototypes"].clone()
        for path, linear in self.modules.items():
            pairs = zip(tensors.get(f"{path}.a", ()), tensors.get(f"{path}.b", ()), strict=True)
            linear.set_experts(list(pairs), self._cram.config.scale, trained=0)

    def release(self) -> None:
        """Gives back the plain projector."""
        for hook in self._hooks:
            hook.remove()
        for path, linear in self.modules.items():
            self._projector.set_submodule(path, linear.base.train(linear.training))

    def _after_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._seen.set(self._cram.encoder.project(output.pooler_output))

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Chooses the LoRA for the projector's own pass, and the weights of all passes."""
        x, seen = args[0], self._seen.get()
        self._seen.set(None)
        self._weights.set(None)
        if not len(self.prototypes) or self._cram.is_disabled:
            self._current.state = ForwardState(disabled=True)
            return
        features = x.detach().float().mean(1) if seen is None else seen
        override = self._cram.hooks.override
        told = None if override is None else override.route
        alone = self._cram.in_training
        if module.training and alone and self._cram.hooks.counted:
            self.mean.update(features)
        if told is not None and told.overrides_gating and told.gates.shape[1] == 1:
            gates = told.gates[0].to(x.device)
            self._weights.set(torch.cat([gates, 1 - gates.sum(1, keepdim=True)], 1).expand(len(features), -1))
        elif not alone:
            self._weights.set(mixing_weights(features, self.prototypes, self._temperature))
        self._use(-1 if self._weights.get() is None else 0, x.device)

    def _mix(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The weighted sum over the tasks, in float32. The given output belongs to the first task."""
        weights = self._weights.get()
        if weights is None:
            return None
        weights = weights.to(output.device)[:, :, None, None]
        total = weights[:, 0] * output
        for index in range(1, weights.shape[1]):
            self._use(index, output.device)
            total = total + weights[:, index] * module.forward(*args)
        return total.to(output.dtype)

    def _use(self, index: int, device: torch.device) -> None:
        """Lets the LoRA of a task act; none, behind the last."""
        experts = len(self.prototypes)
        if index == experts:
            self._current.state = ForwardState(disabled=True)
        else:
            self._current.state = ForwardState(Route(torch.eye(experts)[index][None, None]), device)


def mixing_weights(features: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """softmax_t(cos(features[n], prototypes[t]) / temperature), [N, E]. A zero prototype has cosine 0."""
    cosines = F.cosine_similarity(features[:, None], prototypes.to(features), dim=-1)
    return torch.softmax(cosines / temperature, dim=-1)
