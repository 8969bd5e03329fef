"""What gatings compute from a whole sample: its first token, its mean, the top-k softmax."""

from __future__ import annotations

import torch

from cram.model.gating import first_tokens, token_means, top_gates

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()


def test_first_tokens_skip_padding() -> None:
    assert torch.equal(first_tokens(X, None), X[:, 0])
    assert torch.equal(first_tokens(X, MASK), torch.stack([X[0, 0], X[1, 2], X[2, 1]]))
    assert first_tokens(X.bfloat16(), MASK).dtype == torch.float32


def test_means_leave_padding_out_whatever_it_holds() -> None:
    torch.testing.assert_close(token_means(X, None), X.mean(1))
    poisoned = X.masked_fill(~MASK[:, :, None], torch.nan)
    expected = torch.stack([row[real].mean(0) for row, real in zip(X, MASK, strict=True)])
    torch.testing.assert_close(token_means(poisoned, MASK), expected)
    assert token_means(X, torch.zeros_like(MASK)).eq(0).all()
    assert token_means(X.half(), MASK).dtype == torch.float32
    assert token_means(X.double(), MASK).dtype == torch.float64


def test_top_gates_are_a_softmax_over_the_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, -5.0, 4.0]], requires_grad=True)
    gates = top_gates(logits, 2)
    expected = torch.tensor([[0, 3.0, 2.0, -torch.inf], [0, 0, 0, 0]])
    expected[0, 0] = -torch.inf
    torch.testing.assert_close(gates[0], expected[0].softmax(0))
    assert gates[1, 3] == torch.tensor([4.0, 0.0]).softmax(0)[0] and (gates[1] != 0).sum() == 2
    gates[0, 1].backward()
    assert logits.grad[0, [1, 2]].ne(0).all() and logits.grad[0, [0, 3]].eq(0).all()


def test_one_of_one_is_exactly_one_and_has_no_gradient() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    gates = top_gates(logits, 1)
    assert torch.equal(gates, torch.eye(4)[logits.argmax(1)])
    (gates * torch.randn(6, 4)).sum().backward()
    assert logits.grad.eq(0).all()
