"""HiDe-LLaVA (arXiv 2503.12941): one LoRA per task, fused below the top layer, chosen by CLIP in that layer.

Faithful to the released code: every task trains its own LoRA alone. At inference all layers but the top one
add up the A and the B of all tasks separately, (sum_t B_t)(sum_t A_t), cross terms included. The top layer
weighs the tasks' LoRAs by softmax_t((cos(v, image_t) + cos(u, text_t)) / 2 / 0.1). The anchors image_t and
text_t are the means of a task's training features. A sample without an image has cosine 0 with every image_t.

With `fuse_products` it is the variant of a public port: the lower layers add up the products, sum_t B_t A_t,
and the top layer takes the task with the largest weight alone.

Own readings:
* Rank and projections are the configuration's, so that methods are compared at equal size.
* v and u are this package's query: CLIP's projected image feature and its text model's pooled output.
* Every sample is weighed by its own query. The released code takes for each anchor the largest cosine in the
  batch; `released_code` reproduces that.
* The released code also gives cosine 0 to tasks that are not learnt yet. That rule depends on how many tasks
  will follow, so it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cram.methods.base import Method, MethodState, check_state
from cram.methods.parts.anchors import Anchors, cosines
from cram.model.attached import AttachedModel
from cram.model.factors import Factors, new_lora
from cram.routing.means import CentroidMean
from cram.routing.query import Query, Route

TEMPERATURE = 0.1


class HideMethod(Method):
    """One LoRA per task: fused in the layers below the top, weighed by anchors in the top layer."""

    name = "hide"
    uses_queries = True

    def __init__(self, cram: AttachedModel) -> None:
        super().__init__(cram)
        self._image, self._text = Anchors(cram.encoder.image_dim), Anchors(cram.encoder.text_dim)

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the task's LoRA and its anchors."""
        self.cram.add_expert(task, new_lora(self.cram.modules, self.config.rank))
        self._image.begin()
        self._text.begin()

    def observe(self, query: Query) -> None:
        """Move the task's anchors to the mean over all samples seen so far."""
        self._image.update(query.image, query.has_image)
        self._text.update(query.text)

    def training_means(self) -> dict[str, CentroidMean]:
        """Return the means that the anchors follow."""
        return {"image": self._image.mean, "text": self._text.mean}

    def import_training(
        self, task: str, total_steps: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Begin a task again and take up an exported training, with the anchors."""
        super().import_training(task, total_steps, tensors, values)
        self._image.follow()
        self._text.follow()

    def end_task(self) -> None:
        """Freeze the LoRA and fuse it with the older ones."""
        self.cram.freeze()
        self._fuse()

    def route(self, query: Query | None, training: bool) -> Route:
        """Return gates of the newest LoRA alone in training, else the anchors' weights in every layer."""
        experts, layers = self.cram.num_experts, self.cram.num_layers
        if training:
            gates = torch.eye(experts)[-1:]
        else:
            assert query is not None
            anchors = self._image.rows, self._text.rows
            gates = anchor_gates(query, *anchors, batch_maximum=self.config.released_code)
            if self.config.fuse_products:
                below = gates.new_ones(layers - 1, *gates.shape)
                return Route(torch.cat([below, best_alone(gates)[None]]))
        return Route(gates.expand(layers, -1, -1))

    def export_state(self) -> MethodState:
        """Return the anchors, one row per task: image [E, D_q] and text [E, D_t]."""
        return MethodState({"image_anchors": self._image.rows, "text_anchors": self._text.rows}, {})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up the anchors and fuse the loaded experts."""
        experts, encoder = self.cram.num_experts, self.cram.encoder
        check_state(
            tensors,
            {"image_anchors": (experts, encoder.image_dim), "text_anchors": (experts, encoder.text_dim)},
        )
        self._image.rows, self._text.rows = (tensors[f"{side}_anchors"].clone() for side in ("image", "text"))
        self._fuse()

    def _fuse(self) -> None:
        """Fuse the experts of every module below the top layer, unless their products are added up."""
        if self.config.fuse_products:
            return
        indices = range(self.cram.num_experts)
        below = {p: m for p, m in self.cram.modules.items() if m.layer < self.cram.num_layers - 1}
        self.cram.set_solo(
            {path: fused(module.factors(indices)) for path, module in below.items() if indices}
        )


def fused(parts: Sequence[Factors]) -> Factors:
    """Return the sum of the a [r, D_in] and the sum of the b [D_out, r] of LoRAs of one rank."""
    return torch.stack([a for a, _ in parts]).sum(0), torch.stack([b for _, b in parts]).sum(0)


def best_alone(gates: Tensor) -> Tensor:
    """Return gates [S, E] that are 1 for the largest weight of each sample and 0 elsewhere."""
    return torch.zeros_like(gates).scatter(-1, gates.argmax(-1, keepdim=True), 1.0)


def anchor_gates(query: Query, image: Tensor, text: Tensor, batch_maximum: bool = False) -> Tensor:
    """Return weights [S, E] of E tasks for S samples, from image anchors [E, D_q] and text anchors [E, D_t].

    Args:
        query: Features of S samples. An absent image has cosine 0 with every anchor.
        image: Mean image features, one row per task.
        text: Mean text features, one row per task.
        batch_maximum: If True, each anchor uses its largest cosine in the batch, separately for images and
            texts. Then the result is [1, E].
    """
    found = [cosines(query.image, image), cosines(query.text, text)]
    if batch_maximum:
        found = [cosine.amax(0, keepdim=True) for cosine in found]
    return torch.softmax((found[0] + found[1]) / 2 / TEMPERATURE, dim=-1)
