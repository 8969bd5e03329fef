"""Keys of tasks: the loss, what it trains, the nearest task."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cram.methods.parts.task.keys import TaskKeys
from cram.routing.query import Query


def made(tasks: int = 0) -> TaskKeys:
    keys = TaskKeys(3, 4, torch.device("cpu"))
    for _ in range(tasks):
        keys.begin()
        keys.finish()
    return keys


def query(image: Tensor, text: Tensor, has_image: list[bool]) -> Query:
    return Query(text, image, torch.tensor(has_image))


def test_the_loss_is_the_mean_of_both_distances() -> None:
    keys = made(1)
    keys.begin()
    image, text = torch.randn(3, 3), torch.randn(3, 4)
    expected = torch.zeros(())
    for s, has_image in enumerate([True, False, True]):
        expected = expected + 1 - F.cosine_similarity(text[s], keys.trained[1][0], 0)
        if has_image:
            expected = expected + 1 - F.cosine_similarity(image[s], keys.trained[0][0], 0)
    loss = keys.loss(query(image, text, [True, False, True]))
    torch.testing.assert_close(loss, expected / 3)
    for found, wanted in zip(
        *(torch.autograd.grad(v, keys.trained) for v in (loss, expected / 3)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_a_sample_without_an_image_moves_the_text_key_alone() -> None:
    keys = made()
    keys.begin()
    keys.loss(query(torch.full((1, 3), torch.nan), torch.randn(1, 4), [False])).backward()
    assert keys.trained[0].grad.eq(0).all() and keys.trained[1].grad.ne(0).any()


def test_training_draws_the_keys_to_their_features() -> None:
    """After training two tasks each sample finds its own, by image and text and by text alone."""
    keys, samples = made(), []
    for _ in range(2):
        image, text = torch.randn(1, 3) + 0.1 * torch.randn(8, 3), torch.randn(1, 4) + 0.1 * torch.randn(8, 4)
        samples.append((image, text))
        keys.begin()
        optimizer = torch.optim.AdamW(keys.trained, lr=3e-2, weight_decay=0.0)
        for _ in range(60):
            optimizer.zero_grad()
            keys.loss(query(image, text, [True] * 8)).backward()
            optimizer.step()
        keys.finish()
    for task, (image, text) in enumerate(samples):
        for has_image in (True, False):
            assert keys.nearest(query(image, text, [has_image] * 8)).eq(task).all()


def test_both_similarities_decide() -> None:
    keys = made()
    keys.load({"keys.image": torch.eye(3)[:2], "keys.text": torch.eye(4)[:2]})
    image, text = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.6, 0.8, 0, 0]])
    assert keys.nearest(query(image, text, [True])).tolist() == [0]  # 1 + 0.6 against 0 + 0.8
    assert keys.nearest(query(image, text, [False])).tolist() == [1]
    assert keys.nearest(query(100 * image, 0.01 * text, [True])).tolist() == [0]
    assert keys.nearest(query(0.01 * image, 100 * text, [True])).tolist() == [0]


def test_finished_keys_stay_and_states_come_back() -> None:
    keys = made(2)
    before = keys.state()
    keys.begin()
    assert len(keys) == 2 and keys.state()["keys.image"].shape == (3, 3)
    keys.finish()
    assert len(keys) == 3 and keys.trained == []
    after = keys.state()
    assert all(torch.equal(after[name][:2], before[name]) for name in before)
    other = made()
    other.load(after)
    after["keys.text"].zero_()
    assert len(other) == 3 and other.text.any()


def test_without_a_key_there_is_no_nearest_task() -> None:
    with pytest.raises(ValueError, match="nearest must follow a task, got no keys"):
        made().nearest(query(torch.ones(1, 3), torch.ones(1, 4), [True]))
