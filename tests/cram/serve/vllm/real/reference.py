"""What an answer must be: explicit weight deltas, and the attached model in process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cram.model.attached import AttachedModel
from cram.serve.vllm.group import GateGroup

Gates = NDArray[np.float32]


class Deltas:
    """The base model with W += sum_e g[l, e] scale B_e A_e, written into its weights.

    Args:
        model: A plain transformers model in float32.
        handle: The attached model that has the experts.
        plain: Module path -> delta [D_out, D_in] of the plain adapter.
    """

    def __init__(self, model: Any, handle: AttachedModel, plain: dict[str, Tensor]) -> None:
        self._model, self._plain, self._layer = model, plain, {p: m.layer for p, m in handle.modules.items()}
        self._own = {path: model.get_submodule(path).weight.detach().clone() for path in handle.modules}
        self._experts = {
            path: dict(
                zip(
                    handle.expert_names,
                    [handle.config.scale * (b @ a) for a, b in module.factors(range(handle.num_experts))],
                    strict=True,
                )
            )
            for path, module in handle.modules.items()
        }

    @torch.no_grad()
    def logprobs(
        self,
        who: Gates | str,
        group: GateGroup,
        prompt: list[int],
        answer: list[int],
        inputs: dict[str, Tensor],
    ) -> Tensor:
        """Log-probabilities [T, V] of the tokens of an answer.

        Args:
            who: Gates [L, E of the group], or "plain" or "base".
            group: The group.
            prompt, answer: Token ids.
            inputs: Pixels and the like.
        """
        for path, weight in self._own.items():
            changed = weight.clone()
            if isinstance(who, str):
                changed += self._plain[path] if who == "plain" else 0.0
            else:
                for gate, name in zip(who[self._layer[path]].tolist(), group.experts, strict=True):
                    changed += gate * self._experts[path][name]
            self._model.get_submodule(path).weight.copy_(changed)
        return answer_logprobs(self._model, prompt, answer, inputs)


@torch.no_grad()
def answer_logprobs(model: Any, prompt: list[int], answer: list[int], inputs: dict[str, Tensor]) -> Tensor:
    """Log-probabilities [T, V] that a model gives the tokens of an answer."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    extra = dict(inputs)
    if "image_grid_thw" in extra:
        extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.float(), -1)


@torch.no_grad()
def in_process(
    handle: AttachedModel,
    model: Any,
    gates: Gates,
    group: GateGroup,
    prompt: list[int],
    answer: list[int],
    inputs: dict[str, Tensor],
) -> Tensor:
    """The same from the attached model, with the gates fixed."""
    table = torch.zeros(handle.num_layers, 1, handle.num_experts)
    for column, name in enumerate(group.experts):
        table[:, 0, handle.expert_names.index(name)] = torch.from_numpy(gates[:, column].copy())
    with handle.fixed(table):
        return answer_logprobs(model, prompt, answer, inputs)


def table_of(output: Any, vocabulary: int) -> Tensor:
    """Log-probabilities [T, V] of a vLLM completion that has all of them."""
    table = torch.full((len(output.logprobs), vocabulary), float("nan"))
    for place, found in enumerate(output.logprobs):
        for token, value in found.items():
            table[place, token] = value.logprob
    return table
