"""The cases: widths of real models, ranks of real streams, and the grids of `toy`, `quick` and `full`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

import torch

QUERY_WIDTH = 768  # CLIP ViT-L/14's image embedding
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """The language model of a multimodal model: decoder layers and the widths of its linears."""

    layers: int
    hidden: int
    key_value: int
    mlp: int
    bias: bool = False  # on q, k and v

    def linear(self, projection: str) -> tuple[int, int, bool]:
        """Return (D_in, D_out, True if there is a bias) of q, k, v, o, gate, up or down."""
        hidden, mlp = self.hidden, self.mlp
        kv = (hidden, self.key_value, self.bias)
        return {
            "q": (hidden, hidden, self.bias),
            "k": kv,
            "v": kv,
            "o": (hidden, hidden, False),
            "gate": (hidden, mlp, False),
            "up": (hidden, mlp, False),
            "down": (mlp, hidden, False),
        }[projection]


MODELS = {
    "LLaVA-1.5-7B": Model(32, 4096, 4096, 11008),
    "Qwen2.5-VL-7B": Model(28, 3584, 512, 18944, bias=True),
    "InternVL3-8B": Model(28, 3584, 512, 18944, bias=True),  # the same language model as Qwen2.5-VL-7B
    "Qwen3-VL-8B": Model(36, 4096, 1024, 12288),
    "Qwen3-VL-2B": Model(28, 2048, 1024, 6144),
    "toy": Model(2, 64, 32, 96),
}

# Typical results of instantiation: at least 4, at most 9 on UCIT and 10 on TriGap. "-groups" puts the experts
# into instruction groups. A sample's gates are exactly 0 outside its own group.
STREAMS = {
    "ucit": (9, 8, 9, 7, 6, 4),
    "trigap": (10, 9, 10, 8, 7, 10, 6, 9, 5, 4),
    "trigap-groups": (10, 9, 10, 8, 7, 10, 6, 9, 5, 4),
    "toy": (4, 1, 3),
}
GROUP_SIZE = 4

LAYER_OPS = ("forward", "routed", "train", "decode")
STACKED_OPS = ("stacked", "stacked-train")
PART_OPS = ("shrink", "expand", "gram")
GATE_OPS = ("gates", "gates-train")
TRAINING_OPS = ("train", "stacked-train", "gates-train")


def model_named(name: str) -> Model:
    """Return a model by name. All linears of "square-512" are 512 wide."""
    if name.startswith("square-"):
        width = int(name.removeprefix("square-"))
        return Model(32, width, width, width)
    return MODELS[name]


def ranks_named(stream: str) -> tuple[int, ...]:
    """Return a stream's ranks by name. "64x8" stands for 64 experts of rank 8."""
    if uniform := re.fullmatch(r"(\d+)x(\d+)", stream):
        return (int(uniform[2]),) * int(uniform[1])
    return STREAMS[stream]


@dataclass(frozen=True)
class Case:
    """One cell of a grid.

    Attributes:
        op: forward (gates given), routed (gates computed in the call), train (forward, backward), decode
            (one token per request), stacked, stacked-train (linears that read the same x), gates, gates-train
            (all layers), shrink, expand, gram (one product each).
        model, projection: Name in `MODELS`, and a linear of that model. "q+k+v" is a stack. Gates have none.
        stream: Name in `STREAMS`.
        tokens: T. For gates, the number of samples.
        segments: S, the number of samples. Each sample has its own gates. In decode S equals T.
        dtype: Name in `DTYPES`.
        compiled: True if torch.compile is measured as well. Compiling takes long.
    """

    op: str
    model: str
    projection: str
    stream: str
    tokens: int
    segments: int
    dtype: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """Unique name. `--only` searches it."""
        linear = f"{self.model}.{self.projection}" if self.projection else self.model
        return f"{self.op}/{linear}/{self.stream}/T{self.tokens}/{self.dtype}"

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert."""
        return ranks_named(self.stream)

    @property
    def projections(self) -> tuple[str, ...]:
        """The linears of a stack, or the one linear."""
        return tuple(self.projection.split("+"))

    @property
    def training(self) -> bool:
        """True if the case has a backward pass."""
        return self.op in TRAINING_OPS


def _segments(op: str, tokens: int) -> int:
    if op in ("decode", *GATE_OPS):
        return tokens
    return 8 if tokens >= 1024 else 1


def grid(
    ops: tuple[str, ...],
    linears: tuple[str, ...],
    tokens: tuple[int, ...],
    dtypes: tuple[str, ...] = ("bfloat16",),
    streams: tuple[str, ...] = ("trigap",),
    compiled: bool = False,
) -> list[Case]:
    """Return the product of all; a linear is "model.projection", with the last dot separating the two."""
    cases = []
    for op, linear, stream, count, dtype in product(ops, linears, streams, tokens, dtypes):
        model, projection = (linear, "") if op in GATE_OPS else linear.rsplit(".", 1)
        cases.append(Case(op, model, projection, stream, count, _segments(op, count), dtype, compiled))
    return cases


_Q7, _Q2 = "LLaVA-1.5-7B.q", "Qwen3-VL-2B.q"
_BOTH = ("float32", "bfloat16")

CPU_QUICK = [
    *grid(("decode",), (_Q2, _Q7), (1, 8, 64), _BOTH),
    *grid(("train",), (_Q2,), (8, 1024), _BOTH),
    *grid(("routed",), (_Q2,), (8,), _BOTH),
    *grid(("gates",), ("LLaVA-1.5-7B",), (8,), ("float32",)),
]
CPU_FULL = [
    *grid(
        ("decode",), (_Q2, _Q7, "Qwen2.5-VL-7B.q", "Qwen3-VL-8B.k"), (1, 8, 16, 64), _BOTH, ("ucit", "trigap")
    ),
    *grid(("forward",), (_Q2, _Q7), (128, 1024), _BOTH),
    *grid(("forward",), (_Q7,), (1024,), ("bfloat16",), ("trigap-groups", "64x8")),
    *grid(("train",), (_Q2, _Q7), (8, 64, 1024), _BOTH),
    *grid(("train",), (_Q2,), (1024,), _BOTH, ("ucit", "trigap-groups", "64x8"), compiled=True),
    *grid(("routed",), (_Q2, _Q7), (1, 8, 1024), _BOTH),
    *grid(STACKED_OPS, ("Qwen3-VL-2B.q+k+v",), (8, 1024)),
    *grid(GATE_OPS, ("LLaVA-1.5-7B",), (1, 8, 64), ("float32",)),
]
CUDA_QUICK = [
    *grid(("routed", "train"), (_Q7,), (8192,)),
    *grid(("decode",), (_Q7,), (1, 16, 64)),
    *grid(("shrink", "expand"), (_Q7,), (8192,)),
    *grid(("gates",), ("LLaVA-1.5-7B",), (8,), ("float32",)),
]
# In the order of importance: what runs out of time is measured last.
CUDA_FULL = [
    *grid(("routed",), (_Q7,), (8192,)),
    *grid(("train", "forward"), (_Q7,), (8192,), compiled=True),
    *grid(("decode",), (_Q7,), (16,), compiled=True),
    *grid(("decode",), (_Q7,), (1, 8, 64)),
    *grid(STACKED_OPS, ("LLaVA-1.5-7B.q+k+v",), (8192, 16)),
    *grid(PART_OPS, (_Q7,), (8192, 4096, 1024), streams=("trigap", "64x8")),
    *grid(GATE_OPS, ("LLaVA-1.5-7B",), (8, 64), ("float32",)),
    *grid(("train",), (_Q7,), (1024, 5632)),
    *grid(("routed", "forward"), (_Q7,), (1, 16, 64, 256, 1024)),
    *grid(("forward", "train"), (_Q7,), (8192,), streams=("ucit", "trigap-groups", "64x8")),
    *grid(("forward", "train"), ("LLaVA-1.5-7B.gate", "LLaVA-1.5-7B.down", _Q2), (8192,)),
    *grid(("forward", "train"), ("Qwen2.5-VL-7B.q", "Qwen2.5-VL-7B.k", "Qwen3-VL-8B.k"), (8192,)),
    *grid(("decode",), ("Qwen2.5-VL-7B.q", "Qwen2.5-VL-7B.k", "Qwen3-VL-8B.k", _Q2), (1, 16, 64)),
    *grid(("decode",), (_Q7,), (1, 16, 64), streams=("ucit", "trigap-groups", "64x8")),
    *grid(("forward", "train"), (_Q7,), (8192,), ("float16", "float32")),
    *grid(PART_OPS, (_Q7,), (1, 16, 64, 256), streams=("trigap",)),
]
TOY = [
    *grid(("decode", "train"), ("toy.k",), (8,), _BOTH, ("toy",)),
    *grid(("forward", "routed"), ("toy.q",), (1024,), ("float32",), ("toy",)),
    *grid(STACKED_OPS, ("toy.q+k+v",), (8,), ("float32",), ("toy",)),
    *grid(GATE_OPS, ("toy",), (3,), ("float32",), ("toy",)),
    *grid(PART_OPS, ("toy.q",), (32,), ("float32",), ("toy",)),
]
SUITES: dict[tuple[str, str], list[Case]] = {
    ("quick", "cpu"): CPU_QUICK,
    ("full", "cpu"): CPU_FULL,
    ("quick", "cuda"): CUDA_QUICK,
    ("full", "cuda"): CUDA_FULL,
    ("toy", "cpu"): TOY,
    ("toy", "cuda"): TOY,
}
