"""Servers for the serving benchmark: one random LLaVA, each time with other experts, each in its own process.

All servers draw the same base from one seed. Experts have rank `RANK` in every adapted linear. The first six
have the features of one picture each as their centroid. Further ones lie so far away that each has a gate of
about 1e-4, so that a thousand of them together have a tenth of the mass.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

RANK, NEAR, FAR_GATE, SEED = 8, 6, 1e-4, 0
UP_SCALE = 0.01


@dataclass(frozen=True)
class Shape:
    """The random LLaVA."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int
    vision: tuple[int, int, int, int]  # hidden, layers, image size, patch size
    context: int = 4096


SHAPES = {
    "toy": Shape(64, 2, 2, 96, 700, (32, 2, 28, 14)),
    "small": Shape(768, 8, 12, 2048, 8192, (128, 3, 112, 14)),
    "1b": Shape(2048, 24, 16, 5504, 32064, (1024, 24, 336, 14)),
}


@dataclass(frozen=True)
class Variant:
    """One server.

    Attributes:
        experts: How many experts it has.
        gate_floor: See `cram.serve.engine.pruning`.
        piece: Tokens of a prompt that are read between two steps; None for the default.
    """

    experts: int
    gate_floor: float = 0.0
    piece: int | None = None


def picture(index: int) -> Any:
    """One of the pictures that requests show."""
    from PIL import Image

    colours = np.random.default_rng(index).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(colours, np.ones((24, 24, 1), dtype=np.uint8)))


def processor_of(shape: Shape) -> Any:
    """The shipped base's processor for pictures of the shape's size."""
    from cram.base import base_folder
    from cram.loading import load_processor

    processor = load_processor(base_folder() / "llava")
    _, _, pixels, patch = shape.vision
    processor.image_processor.size = {"shortest_edge": pixels}
    processor.image_processor.crop_size = {"height": pixels, "width": pixels}
    processor.patch_size = patch
    return processor


def base_of(shape: Shape, processor: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The random LLaVA, and a random CLIP that reuses its vision tower."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, LlavaConfig, LlavaForConditionalGeneration

    from cram.base import base_folder
    from cram.routing.clip import ClipEncoder

    hidden, layers, pixels, patch = shape.vision
    vision = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(hidden // 64, 1),
        "image_size": pixels,
        "patch_size": patch,
        "projection_dim": 64,
    }
    text = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "eos_token_id": processor.tokenizer.eos_token_id,
    }
    config = LlavaConfig(
        vision_config={**vision, "model_type": "clip_vision_model"},
        text_config=text,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(processor.image_token),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    model.generation_config.pad_token_id = 0
    tokenizer = AutoTokenizer.from_pretrained(base_folder() / "clip")
    words = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": max(len(tokenizer), 49408),
        "eos_token_id": tokenizer.eos_token_id,
    }
    clip = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=64)).eval()
    clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    return model, ClipEncoder(clip, tokenizer, processor.image_processor, model=model)


def factors(linears: dict[str, Any], seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """One random expert by module path."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (
            torch.randn(RANK, linear.in_features, generator=generator) / linear.in_features**0.5,
            torch.randn(linear.out_features, RANK, generator=generator) * UP_SCALE,
        )
        for path, linear in linears.items()
    }


def with_experts(model: Any, encoder: Any, processor: Any, experts: int) -> None:
    """Attach a model and give it experts of one group."""
    from cram import CramConfig, attach

    pictures = [[picture(index)] for index in range(NEAR)]
    query = encoder.encode(["what is this?"] * NEAR, pictures)
    near = query.image
    distances = torch.pdist(near)
    sigma = float(distances.min()) / 3
    cram = attach(model, CramConfig(sigma=sigma, dropout=0.0), encoder, processor)
    if not experts:
        return
    far = float(np.sqrt(-2 * np.log(FAR_GATE))) * sigma
    generator = torch.Generator().manual_seed(SEED)
    aside = torch.nn.functional.normalize(torch.randn(experts, near.shape[1], generator=generator), dim=1)
    centroids = torch.cat([near, near[torch.arange(experts) % NEAR] + far * aside])[:experts]
    drawn = [factors(cram.modules, index) for index in range(min(experts, 16))]
    names = [f"task{index}" for index in range(experts)]
    cram.set_experts(names, [drawn[index % len(drawn)] for index in range(experts)], 0)
    cram.method.router.groups.observe("task0", query.text[:1])
    for index, name in enumerate(names):
        cram.method.router.add_expert(name, 0, centroids[index], trained=False)


def serve(shape: Shape, dtype: torch.dtype, variant: Variant, threads: int, pipe: Connection) -> None:
    """Serve until the process ends; tells the port through the pipe."""
    import uvicorn

    from cram.serve.engine.engine import Engine
    from cram.serve.engine.limits import Limits
    from cram.serve.http.app import create_app

    torch.set_num_threads(threads)
    processor = processor_of(shape)
    model, encoder = base_of(shape, processor, dtype)
    with_experts(model, encoder, processor, variant.experts)
    limits = Limits() if variant.piece is None else Limits(piece=variant.piece)
    engine = Engine(model.eval(), processor, limits, variant.gate_floor)
    config = uvicorn.Config(create_app(engine, processor), port=0, log_level="error")

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            pipe.send(self.servers[0].sockets[0].getsockname()[1])

    Server(config).run()


@contextmanager
def servers(
    shape: Shape, dtype: torch.dtype, variants: dict[str, Variant], threads: int
) -> Iterator[dict[str, int]]:
    """Processes that serve the variants at once; by name their ports."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context, started = get_context("spawn"), []
    try:
        for name, variant in variants.items():
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(shape, dtype, variant, threads, theirs), daemon=True, name=name
            )
            process.start()
            started.append((name, process, ours))
        ports = {}
        for name, process, pipe in started:
            while not pipe.poll(0.2):
                if not process.is_alive():
                    raise RuntimeError(f"the server {name!r} must start, got exit code {process.exitcode}")
            ports[name] = pipe.recv()
        yield ports
    finally:
        for _, process, _ in started:
            process.terminate()
            process.join()


def body(question: str, pictures: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
    """A request about some of the pictures."""
    content: list[dict[str, Any]] = []
    for index in pictures:
        buffer = io.BytesIO()
        picture(index).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question})
    return {"model": "cram", "messages": [{"role": "user", "content": content}], **fields}
