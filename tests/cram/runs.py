"""Tiny streams, and tiny checkpoints of all four families with processors as a user's checkpoint has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cram.config import CramConfig
from cram.learning.learner import ContinualLearner
from cram.streams import Sample, Stream, Task
from tests.cram import factories

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS: dict[str, Any] = {
    "max_steps": 5,
    "batch_size": 3,
    "eval_batch_size": 4,
    "warmup_fraction": 0.4,
    "buffer_rank": 8,
    "rank_min": 2,
    "rank_max": 4,
    "rank": 4,
    "learning_rate": 1e-2,
}


def config(**changes: Any) -> CramConfig:
    """A configuration of five steps, two of them warm-up."""
    return CramConfig(**{**SETTINGS, **changes})


def task(name: str, question: str, answers: tuple[str, str], first: int, images: int = 1) -> Task:
    """Six training and five test samples; the answer alternates with the picture."""

    def split(kind: str, count: int, offset: int) -> tuple[Sample, ...]:
        return tuple(
            Sample(
                f"{name}-{kind}-{i}",
                tuple(factories.image(offset + i % 3) for _ in range(images)),
                question + "?" * (i % 2),
                answers[i % 2],
            )
            for i in range(count)
        )

    return Task(name, split("train", 6, first), split("test", 5, first), "accuracy", 3)


def stream() -> Stream:
    """Three tasks with two answer formats; the last one mixes questions with and without a picture."""
    one = task("colour", "Which colour", ("up", "no"), 0)
    two = task("letter", "Choose the letter of the right option: A or B", ("A", "B"), 50)
    bare = task("mixed", "Which shade", ("lo", "hi"), 90, images=0)
    seen = task("mixed", "Which shade", ("lo", "hi"), 90)
    mixed = [a if i % 3 else b for i, (a, b) in enumerate(zip(seen.train, bare.train, strict=True))]
    return Stream("toy", (one, two, Task("mixed", tuple(mixed), seen.test, "accuracy", 3)))


def two_tasks() -> Stream:
    """The first two tasks."""
    return Stream("toy", stream().tasks[:2])


def learner(out: Path, method: str = "cram", tasks: Stream | None = None, **options: Any) -> ContinualLearner:
    """A learner over a fresh tiny LLaVA that reuses its tower; `options` change the configuration."""
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    encoder = factories.clip_encoder(model, clip)
    processor = factories.llava_processor()
    settings = config(method=method, **options)
    tasks = tasks or two_tasks()
    return ContinualLearner(model, processor, tasks, settings, out=out, encoder=encoder, progress=False)


def save_checkpoint(name: str, folder: Path) -> Path:
    """Write a family's tiny model with tokenizer, image processor and, but for LLaVA, a chat template."""
    factories.MODELS[name]().save_pretrained(folder)
    if name == "llava":
        factories.llava_processor().save_pretrained(folder)
        return folder
    special = {"image_token": "<image>", "video_token": "<video>"}
    image = "<vision_start><image><vision_end>"
    if name == "internvl":
        special = {
            "context_image_token": "<image>",
            "start_image_token": "<vision_start>",
            "end_image_token": "<vision_end>",
            "video_token": "<video>",
        }
        image = "<image>"
        size = {"height": factories.IMAGE_SIZE, "width": factories.IMAGE_SIZE}
        GotOcr2ImageProcessorPil(size=size, max_patches=2).save_pretrained(folder)
        kind = {"processor_class": "InternVLProcessor", "image_seq_length": factories.TOKENS_PER_IMAGE}
        (folder / "processor_config.json").write_text(json.dumps(kind))
    else:
        side = factories.IMAGE_SIZE**2
        Qwen2VLImageProcessorPil(patch_size=4, min_pixels=side, max_pixels=side).save_pretrained(folder)
    plain = factories.tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=special,
        model_max_length=512,
    ).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML.replace("IMAGE", image))
    return folder


def write_stream(folder: Path) -> Path:
    """A stream file with two tasks of LLaVA JSON and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["name: filed", "tasks:"]
    for part in two_tasks().tasks:
        for split, samples in (("train", part.train), ("test", part.test)):
            rows = []
            for i, sample in enumerate(samples):
                picture = f"{part.name}-{i}.png"
                sample.images[0].save(folder / picture)  # type: ignore[union-attr]
                rows.append(_row(sample, picture, split))
            (folder / f"{part.name}-{split}.json").write_text(json.dumps(rows))
        lines += [
            f"  - name: {part.name}",
            f"    train: {part.name}-train.json",
            f"    test: {part.name}-test.json",
            "    scorer: accuracy",
            "    max_new_tokens: 3",
        ]
    (folder / "stream.yaml").write_text("\n".join(lines) + "\n")
    return folder / "stream.yaml"


def _row(sample: Sample, picture: str, split: str) -> dict[str, Any]:
    if split == "test":
        said = {"text": sample.instruction, "answer": sample.answer}
        return {"question_id": sample.id, "image": picture, **said}
    turns = [
        {"from": "human", "value": f"<image>\n{sample.instruction}"},
        {"from": "gpt", "value": sample.answer},
    ]
    return {"id": sample.id, "image": picture, "conversations": turns}


def timeless(report: Any) -> Any:
    """A report without its seconds."""
    found = json.loads(json.dumps(report))
    for method in found["methods"].values():
        del method["seconds"]
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def results(folder: Path) -> dict[str, bytes]:
    """The files that hold no times, bundles and predictions, without what a killed write left behind."""
    kept = ("bundle/", "predictions/")
    found = files(folder).items()
    return {name: data for name, data in found if any(part in name for part in kept) and "/." not in name}


def same_bundle(left: Path, right: Path) -> None:
    """Compares all tensors of the bundles after the last task, up to the rounding of sums."""
    bundles = [max((run / "tasks").glob("*/bundle")) for run in (left, right)]
    files = [sorted(file.relative_to(bundle) for file in bundle.rglob("*.safetensors")) for bundle in bundles]
    assert files[0] == files[1] and files[0]
    for file in files[0]:
        one, other = (without_signs(load_file(bundle / file)) for bundle in bundles)
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def without_signs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiplies what a singular value decomposition leaves open the sign of."""
    made = {}
    for name, tensor in tensors.items():
        a = tensors.get(name.replace(".lora_B.", ".lora_A."))
        if name.endswith(".lora_B.weight") and a is not None:
            made[name] = tensor @ a
        elif name.endswith(".basis"):
            made[name] = tensor @ tensors[name.replace(".basis", ".scales")].diag() @ tensor.mT
        elif not name.endswith(".lora_A.weight"):
            made[name] = tensor
    return made
