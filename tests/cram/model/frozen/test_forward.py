"""Linears that are not exactly `nn.Linear`: their own forward runs, and experts are added to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cram.attach import attach, detach
from cram.config import CramConfig
from cram.model.attached import AttachedModel
from cram.model.frozen.forward import beside, device_of, is_plain
from cram_kernels import PackedExperts, expert_lora, pack_experts
from tests.cram import factories
from tests.cram.factories import QUESTIONS, expert_weights, image, prompt, routed_llava

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Doubled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Int8(nn.Linear):
    """A linear that is stored in 8 bits: its weight has another dtype and its scales stand beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Int4(nn.Linear):
    """A linear whose product of packed 4-bit weights is made for inference alone, as one of torchao's is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        codes = torch.randint(16, self.weight.shape, dtype=torch.int32)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("scales", torch.full((self.in_features // 32, self.out_features, 2), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, 32, self.scales)
        return y.view(*x.shape[:-1], self.out_features)


class Halved(Tensor):
    """A weight whose products are half of what its storage says; quantised weights are such subclasses."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(Tensor) / 2 if func is F.linear else found


def own_forward(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = Doubled
    return linear


def forward_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, args, output: output + 1)
    return linear


def forward_pre_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    return linear


def replaced_forward(linear: nn.Linear) -> nn.Linear:
    plain = linear.forward
    linear.forward = lambda x: plain(x) * 3  # type: ignore[method-assign]
    return linear


def weight_norm(linear: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found: nn.Linear = nn.utils.weight_norm(linear)
    with torch.no_grad():
        found.weight_g.mul_(1.5)  # type: ignore[operator, union-attr]
    return found


def parametrised(linear: nn.Linear) -> nn.Linear:
    found: nn.Linear = parametrizations.weight_norm(linear)
    with torch.no_grad():
        found.parametrizations.weight.original0.mul_(1.5)  # type: ignore[union-attr]
    return found


def tensor_subclass(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Halved), requires_grad=False)
    return linear


KINDS = (
    own_forward,
    Int8,
    forward_hook,
    forward_pre_hook,
    replaced_forward,
    weight_norm,
    parametrised,
    tensor_subclass,
)


def batch_of(processor: Any) -> Any:
    texts = [prompt(QUESTIONS[i], 1) for i in range(2)]
    return processor(text=texts, images=[image(0), image(1)], padding=True, return_tensors="pt")


def with_zero_expert(model: Any) -> AttachedModel:
    cram = attach(model, CramConfig(method="many"), factories.clip_encoder())
    zero = {path: (a, torch.zeros_like(b)) for path, (a, b) in expert_weights(cram, 0).items()}
    cram.set_experts(["zero"], [zero], trained=0)
    return cram


@pytest.mark.parametrize("late", [False, True], ids=["before_attach", "after_attach"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_expert_leaves_every_bit(kind: Callable[[nn.Linear], nn.Linear], late: bool) -> None:
    model, batch = factories.llava(), factories.inputs("llava", rows=2)
    plain = model(**batch).logits
    if late:
        cram = with_zero_expert(model)
    for path, _ in list(model.named_modules()):
        leaf = path.removesuffix(".base").rsplit(".", 1)[-1]
        if "language_model" in path and leaf in TARGETS and path.endswith(".base") == late:
            model.set_submodule(path, kind(model.get_submodule(path)))
    if not late:
        cram = with_zero_expert(model)
    with cram.disabled():
        base = model(**batch).logits
    with cram.forced("zero"):
        assert torch.equal(model(**batch).logits, base)
    assert (base - plain).abs().max() > 1e-3
    for module in cram.modules.values():
        assert module.as_layer() is None


@pytest.mark.parametrize("kind", KINDS)
def test_experts_add_to_what_the_base_computes(kind: Callable[[nn.Linear], nn.Linear]) -> None:
    torch.manual_seed(0)
    base = kind(nn.Linear(12, 10).requires_grad_(False))
    a, b = torch.randn(3, 12), torch.randn(10, 3)
    x, gates = torch.randn(4, 5, 12), torch.tensor([[0.5], [-2.0]])
    expected = base(x) + 2 * gates.repeat_interleave(2, 0)[:, None] * (x @ a.T @ b.T)
    torch.testing.assert_close(beside(base, x, pack_experts([a], [b], 2.0), gates), expected)


def packs() -> Iterator[tuple[str, PackedExperts]]:
    generator = torch.Generator().manual_seed(1)
    a = [torch.randn(r, 12, generator=generator) for r in (3, 0, 2, 4)]
    b = [torch.randn(10, r, generator=generator) for r in (3, 0, 2, 4)]
    for trained in (0, 1, 2):
        yield f"trained{trained}", pack_experts(a, b, 0.5, trained)
        branches = [torch.randn(10, 3, generator=generator) for _ in range(4)]
        yield f"shared{trained}", pack_experts([a[0]] * 4, branches, 0.5, trained, shared_a=True)
    yield "room", pack_experts(a[:3], b[:3], 0.5).reserve(16, 4)


@pytest.mark.parametrize("learned_gates", [False, True], ids=["given", "learned"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("pack", [pytest.param(pack, id=name) for name, pack in packs()])
def test_equal_to_the_fused_op(pack: PackedExperts, dropout: float, learned_gates: bool) -> None:
    """Output and every gradient, in float64: only the order of the sums differs."""
    torch.manual_seed(2)
    linear = nn.Linear(12, 10).double().requires_grad_(False)
    given = torch.tensor([[0.5, 1.0, 0.0, 0.25], [0.0, 2.0, 0.0, -1.0]], dtype=torch.float64)
    found = []
    for fused in (False, True):
        torch.manual_seed(3)
        x = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
        gates = given.clone().requires_grad_(learned_gates)
        if fused:
            y = expert_lora(
                x, linear.weight, linear.bias, pack, gates, dropout=dropout, seed=9, impl="reference"
            )
        else:
            y = beside(linear, x, pack, gates, dropout, 9)
        leaves = [t for t in (x, gates, pack.trained_a, pack.trained_b) if t is not None and t.requires_grad]
        found.append([y, *torch.autograd.grad(y.cos().sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("learned_gates", [False, True], ids=["given", "learned"])
def test_nothing_passes_a_gate_of_zero(learned_gates: bool) -> None:
    base = Doubled(6, 5).requires_grad_(False)
    nan = torch.full((2, 6), torch.nan)
    pack = pack_experts([torch.randn(2, 6), nan], [torch.randn(5, 2), torch.randn(5, 2)], 1.0)
    x, gates = torch.randn(3, 6), torch.tensor([[1.0, 0.0]], requires_grad=learned_gates)
    y = beside(base, x, pack, gates)
    assert y.isfinite().all()
    if learned_gates:
        (gradient,) = torch.autograd.grad(y.sum(), gates)
        assert gradient.isfinite().all() and gradient[0, 0] != 0


def test_autocast_follows_the_base() -> None:
    base = Doubled(6, 5).requires_grad_(False)
    pack = pack_experts([torch.randn(2, 6)], [torch.randn(5, 2)], 1.0)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = beside(base, x, pack, torch.zeros(1, 1))
        assert y.dtype == torch.bfloat16 and torch.equal(y, base(x))


def test_training_beside_a_base_of_another_kind() -> None:
    model, processor, cram = routed_llava(trained=True)
    for module in cram.modules.values():
        own_forward(module.base)
    batch = batch_of(processor)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in cram.trainable_parameters())


def test_a_base_without_a_derivative_answers_and_is_refused_in_training() -> None:
    model, processor, cram = routed_llava(trained=True)
    for module in cram.modules.values():
        module.base = Int4(module.base)
    batch = batch_of(processor)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"base must have a derivative .* load the bundle on this one"):
        model.train()(**batch, labels=batch["input_ids"])


def offloaded_kinds(folder: Path) -> dict[str, Callable[[Any], Any]]:
    cpu = torch.device("cpu")
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "lm_head": "cpu"}
    layers = {f"model.language_model.layers.{i}": ("cpu", "disk")[i] for i in range(factories.LAYERS)}
    rest = dict.fromkeys(("model.language_model.norm", "model.language_model.rotary_emb"), "cpu")
    placed = {**parts, **layers, **rest, "model.language_model.embed_tokens": "cpu"}
    return {
        "cpu": lambda model: cpu_offload(model, cpu),
        "cpu_buffers": lambda model: cpu_offload(model, cpu, offload_buffers=True),
        "disk": lambda model: disk_offload(model, str(folder), cpu),
        "device_map": lambda model: dispatch_model(model, placed, main_device="cpu", offload_dir=str(folder)),
    }


@pytest.mark.parametrize("kind", ["cpu", "cpu_buffers", "disk", "device_map"])
def test_a_model_that_is_offloaded_after_attach(kind: str, tmp_path: Path) -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor)
    expected, weights = model(**batch).logits, cram.expert_weights(2)
    offloaded_kinds(tmp_path)[kind](model)
    offloaded = [module for module in cram.modules.values() if module.base.weight.device.type == "meta"]
    assert offloaded
    for _ in range(2):
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    for path, pair in cram.expert_weights(2).items():
        assert all(torch.equal(*each) for each in zip(pair, weights[path], strict=True))


@pytest.mark.parametrize("kind", ["cpu", "disk", "device_map"])
def test_a_model_that_was_offloaded_before_attach(kind: str, tmp_path: Path) -> None:
    _, processor, ours = routed_llava()
    expected_model, _, _ = routed_llava()
    batch = batch_of(processor)
    gates = torch.tensor([0.5, 1.0, 0.0])
    with expected_model.cram.fixed(gates):
        expected = expected_model(**batch).logits
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    offloaded_kinds(tmp_path)[kind](model)
    cram = attach(model, CramConfig(method="many", dropout=0.0), factories.clip_encoder())
    cram.set_experts(["old", "other", "new"], [ours.expert_weights(i) for i in range(3)], trained=0)
    assert cram.device.type == "cpu"
    with cram.fixed(gates):
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    detach(model)


def test_offloaded_experts_in_training_are_refused() -> None:
    model, processor, _ = routed_llava(trained=True)
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="in training must stay on the device"):
        model(**batch_of(processor))


def test_plain_linears_stay_fused() -> None:
    _, _, cram = routed_llava()
    modules = list(cram.modules.values())
    for module in modules:
        layer = module.as_layer()
        assert layer is not None and layer[0] is module.base.weight and layer[2] is module.experts
    handle = modules[0].base.register_forward_hook(lambda module, args, output: None)
    assert modules[0].as_layer() is None and not is_plain(modules[0].base)
    handle.remove()
    assert modules[0].as_layer() is not None and is_plain(modules[0].base)


def test_a_linear_computes_where_its_weight_is_or_where_a_hook_brings_it() -> None:
    linear = nn.Linear(2, 2, device="meta")
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu") and device_of(linear) == torch.device("meta")
    linear._hf_hook = SimpleNamespace(execution_device=1)  # type: ignore[assignment]
    assert device_of(linear) == torch.device("cuda", 1)
    linear._hf_hook = SimpleNamespace(  # type: ignore[assignment]
        hooks=(SimpleNamespace(), SimpleNamespace(execution_device="cpu"))
    )
    assert device_of(linear) == torch.device("cpu")


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_the_tangent_of_a_gate_at_0_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (2, 8, 3), (4, 8)))
    experts, base = pack_experts([*a], [*b], 2.0), Doubled(8, 8).requires_grad_(False)
    gates, ones = torch.tensor([[1.0, 0.0]] * 4), torch.ones(4, 2)
    for gate in (gates, gates.clone().requires_grad_()):
        found = torch.func.jvp(lambda gate: beside(base, x, experts, gate), (gate,), (ones,))[1]
        torch.testing.assert_close(found, beside(base, x, experts, ones) - base(x))
