"""The variants of a whole model share its weights, and each trains its own."""

from __future__ import annotations

import pytest
import torch

from benchmarks import models, variants
from benchmarks.programs.e2e import train_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work() -> models.Work:
    return models.random_llava(models.SIZES["toy"], CPU, torch.float32, samples=2)


def test_cram_and_the_released_loop_are_the_same_function(work: models.Work) -> None:
    factors = variants.draw_factors(work, (4, 1, 3))
    logits = {}
    for name in ("bare", "released", "cram"):
        variant = variants.BUILDERS[name](work, factors)
        with variant.around(), torch.no_grad():
            logits[name] = variant.model(**work.prompt).logits
    # float32 through two layers.
    torch.testing.assert_close(logits["cram"], logits["released"], rtol=1e-4, atol=1e-5)
    assert (logits["cram"] - logits["bare"]).abs().max() > 1e-3


def test_variants_share_the_weights_and_train_their_own(work: models.Work) -> None:
    before = {name: tensor.clone() for name, tensor in work.model.state_dict().items()}
    weights = {p.data_ptr() for p in work.model.parameters()}
    trained = {"bare": 0, "released": 8 * 2, "peft": 8 * 2, "peft-9": 8 * 2, "cram": 8 * 2 + 1}
    for name, variant in variants.built(work, "toy").items():
        variant.model.train()
        assert weights <= {p.data_ptr() for p in variant.model.parameters()}, name
        assert len(variant.parameters) == trained[name], name
        old = [p.detach().clone() for p in variant.parameters]
        losses = [float(train_step(variant, work)()) for _ in range(2)]
        assert all(torch.isfinite(torch.tensor(losses)))
        moved = [not torch.equal(a, b) for a, b in zip(old, variant.parameters, strict=True)]
        # Fixed gates leave the centroid without a gradient.
        assert all(moved[: 8 * 2]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in work.model.state_dict().items())
