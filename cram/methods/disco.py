"""DISCO's routing (arXiv 2503.12897): one LoRA per task, weighed by how like the tasks' texts the text is.

Faithful to the released code: every task trains its own LoRA alone. At inference all LoRAs act, weighed by
softmax_t(cos(u, text_t) / 0.05), where text_t is the mean text feature of the task's training samples. The
released code computes the image's cosine as well and does not use it.

Own readings:
* Rank and projections are the configuration's; the released code adapts the feed-forward layers.
* u is this package's query, the pooled output of CLIP's text model.
* Every sample is weighed by its own text. The released code averages the texts of a batch;
  `released_code` reproduces that.
* The paper trains on many clients and joins those with like texts. A stream has one client per task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cram.methods.base import Method, MethodState, check_state
from cram.methods.parts.anchors import Anchors, cosines
from cram.model.attached import AttachedModel
from cram.model.factors import new_lora
from cram.routing.means import CentroidMean
from cram.routing.query import Query, Route

TEMPERATURE = 0.05
ANCHORS = "text_anchors"


class DiscoMethod(Method):
    """One LoRA per task, weighed by text alone."""

    name = "disco"
    uses_queries = True

    def __init__(self, cram: AttachedModel) -> None:
        super().__init__(cram)
        self._text = Anchors(cram.encoder.text_dim)

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the task's LoRA and its anchor."""
        self.cram.add_expert(task, new_lora(self.cram.modules, self.config.rank))
        self._text.begin()

    def observe(self, query: Query) -> None:
        """Move the task's anchor to the mean over all samples seen so far."""
        self._text.update(query.text)

    def training_means(self) -> dict[str, CentroidMean]:
        """Return the mean that the anchor follows."""
        return {"text": self._text.mean}

    def import_training(
        self, task: str, total_steps: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Begin a task again and take up an exported training, with the anchor."""
        super().import_training(task, total_steps, tensors, values)
        self._text.follow()

    def route(self, query: Query | None, training: bool) -> Route:
        """Return gates of the newest LoRA alone in training, else the weights of the samples' texts."""
        if training:
            gates = torch.eye(self.cram.num_experts)[-1:]
        else:
            assert query is not None
            text = query.batch_mean().text if self.config.released_code else query.text
            gates = torch.softmax(cosines(text, self._text.rows) / TEMPERATURE, dim=-1)
        return Route(gates.expand(self.cram.num_layers, -1, -1))

    def export_state(self) -> MethodState:
        """Return the anchors [E, D_t], one row per task."""
        return MethodState({ANCHORS: self._text.rows}, {})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up the anchors."""
        check_state(tensors, {ANCHORS: (self.cram.num_experts, self.cram.encoder.text_dim)})
        self._text.rows = tensors[ANCHORS].clone()
