"""Gradient checkpointing changes no gradient, in both of torch's modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cram.model.attached import AttachedModel
from tests.cram.factories import QUESTIONS, image, prompt, routed_llava
from tests.cram.model.checkpointing import MODES, enable_checkpointing

# torch says this of the vision tower, whose frozen layers are checkpointed along with the language model's.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def training_batch(processor: Any) -> Any:
    texts = [prompt(QUESTIONS[i % 2], i % 3, f"answer {i}") for i in range(4)]
    batch = processor(text=texts, images=[image(i) for i in range(3)], padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def gradients(mode: dict[str, bool] | None, dropout: float, buffer: bool = False) -> dict[str, Tensor]:
    model, processor, cram = routed_llava(trained=not buffer, dropout=dropout, sigma=1.5)
    if mode is not None:
        enable_checkpointing(model, mode)
    if buffer:
        start_buffer(cram)
    else:
        cram.method.prepare_penalty()
        cram.method.locked_group = 0
    model.train()
    torch.manual_seed(5)
    loss = model(**training_batch(processor), use_cache=False).loss
    if not buffer:
        loss = loss + cram.method.penalty(cram.state)
    loss.backward()
    found = {f"parameter{i}": p.grad for i, p in enumerate(cram.trainable_parameters())}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
    return {"loss": loss.detach(), **found}


def start_buffer(cram: AttachedModel) -> None:
    torch.manual_seed(3)
    cram.method.warm_up.begin()
    with torch.no_grad():
        for module in cram.modules.values():
            module.trainable()[1].normal_(std=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", MODES, ids=["non_reentrant", "reentrant"])
def test_expert_and_centroid_gradients(mode: dict[str, bool], dropout: float) -> None:
    plain, checkpointed = gradients(None, dropout), gradients(mode, dropout)
    assert len(plain) == 1 + 2 * 8 + 1
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=["non_reentrant", "reentrant"])
def test_buffer_gradients(mode: dict[str, bool]) -> None:
    torch.testing.assert_close(gradients(mode, 0.3, True), gradients(None, 0.3, True), atol=1e-6, rtol=1e-5)


def test_dropout_differs_from_call_to_call() -> None:
    model, processor, cram = routed_llava(trained=True, dropout=0.5)
    batch = training_batch(processor)
    model.train()
    torch.manual_seed(0)
    first, second = model(**batch).loss, model(**batch).loss
    torch.manual_seed(0)
    assert torch.equal(model(**batch).loss, first)
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(**batch).loss, model(**batch).loss)
    cram.method.freeze()
    assert torch.equal(model.train()(**batch).loss, model.eval()(**batch).loss)


def test_loss_gradients_equal_finite_differences() -> None:
    model, processor, cram = routed_llava(trained=True)
    model.train()
    batch = training_batch(processor)

    def loss() -> Tensor:
        return model(**batch).loss

    loss().backward()
    with torch.no_grad():
        for parameter in (cram.trainable_parameters()[0], *cram.trainable_parameters()[-2:]):
            slope = parameter.grad.norm()
            step = 5e-3 * parameter.grad / slope
            parameter += step
            up = loss()
            parameter -= 2 * step
            down = loss()
            parameter += step
            torch.testing.assert_close((up - down) / 1e-2, slope, rtol=0.01, atol=1e-3)
