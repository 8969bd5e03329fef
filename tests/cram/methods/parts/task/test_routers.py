"""A router a task: the gates of one module, what is trained, what is counted."""

from __future__ import annotations

import torch
from torch import Tensor

from cram.methods.parts.task.routers import TaskRouters
from cram.model.state import ForwardState
from cram.routing.query import Route


def made(tasks: int) -> TaskRouters:
    routers = TaskRouters("a.q_proj", 6, 4, 2)
    for _ in range(tasks):
        routers.begin()
        routers.finish(list(range(6)))
    return routers


def begin(tasks: list[int], mask: Tensor | None = None, **settings: object) -> ForwardState:
    features = torch.tensor(tasks)[:, None].float()
    return ForwardState(Route(torch.ones(1, len(tasks), 6), features=features), mask=mask, **settings)


def expected(routers: TaskRouters, token: Tensor, task: int) -> Tensor:
    logits = routers.routers()[task] @ token
    best = logits.argsort(descending=True)[:2]
    gates = torch.zeros(6)
    gates[best] = logits[best].softmax(0)
    return gates


def test_every_row_uses_the_router_of_its_sample_on_its_first_real_token() -> None:
    routers, x = made(3), torch.randn(4, 5, 4)
    mask = torch.arange(5)[None] >= torch.tensor([0, 2, 4, 1])[:, None]
    gates = routers.eval()(x, torch.ones(2, 6), begin([2, 0], mask))
    for row, (task, first) in enumerate([(2, 0), (2, 2), (0, 4), (0, 1)]):
        torch.testing.assert_close(gates[row], expected(routers, x[row, first], task))
    x[1, :2] = torch.nan
    torch.testing.assert_close(routers(x, torch.ones(2, 6), begin([2, 0], mask)), gates)


def test_a_decode_step_keeps_the_gates_of_the_prefill() -> None:
    routers, state = made(1).eval(), begin([0])
    gates = routers(torch.randn(1, 5, 4), torch.ones(1, 6), state)
    state.decoding = True
    assert torch.equal(routers(torch.randn(1, 1, 4), torch.ones(1, 6), state), gates)


def test_only_the_router_in_training_gets_a_gradient_and_only_its_best_rows() -> None:
    routers = made(2)
    routers.begin()
    assert routers.routers().shape == (3, 6, 4) and list(dict(routers.named_parameters())) == ["router"]
    x = torch.randn(1, 3, 4)
    gates = routers(x, torch.ones(1, 6), begin([2]))
    (gates * torch.randn(6)).sum().backward()
    assert torch.equal(routers.router.grad[0].ne(0).any(1), gates[0] != 0)
    assert not routers(x, torch.ones(1, 6), begin([1])).detach().equal(gates)


def test_use_is_the_gate_mass_of_training_forwards() -> None:
    routers = made(0)
    routers.begin()
    x, total = torch.randn(3, 2, 4), torch.zeros(6)
    for _ in range(2):
        total += routers.train()(x, torch.ones(1, 6), begin([0])).detach().sum(0)
    routers.eval()(x, torch.ones(1, 6), begin([0]))
    assert torch.equal(routers.used, total) and total.sum() == 6
    routers.finish(list(range(6)))
    routers.begin()
    assert routers.used.eq(0).all()


def test_an_order_moves_the_rows_of_all_routers() -> None:
    routers = made(1)
    routers.begin()
    before = routers.routers().detach().clone()
    routers.finish([5, 0, 1, 2, 3, 4])
    assert routers.router is None and torch.equal(routers.finished, before[:, [5, 0, 1, 2, 3, 4]])
    assert not routers.finished.requires_grad and list(routers.state_dict()) == ["finished"]
