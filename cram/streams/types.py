"""The parts of a task stream: samples, tasks and the stream. Images are opened lazily.

Pillow is imported where an image is opened. So `import cram` and streams without images do not need Pillow.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cram.streams.pictures import (
    MAX_PIXEL_BYTES,
    SPARE_BYTES,
    Encoded,
    encoded,
    shared_rgb,
    upright_rgb,
)

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_PIXELS = 64_000_000
# Pillow lets through whatever a damaged file makes its readers raise.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, struct.error)


@dataclass(frozen=True)
class Sample:
    """One question with its answer.

    Attributes:
        id: Unique within its split.
        images: Opened images or paths. Empty for a question without an image. An opened image that is not
            decoded yet stays so, also in copies and pickles; `open_images` decodes it anew each time.
        instruction: The user's whole turn (question and format instruction) without image placeholders.
        answer: The answer that the model is trained to give.
        references: All accepted answers of a test sample, for example several captions. Empty means that
            `answer` is the only accepted answer.
        source: File and row of the sample ("file, row n"), for error messages.
    """

    id: str
    images: tuple[Image.Image | Path, ...]
    instruction: str
    answer: str
    references: tuple[str, ...] = ()
    source: str = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every accepted answer, at least one."""
        return self.references or (self.answer,)

    @property
    def place(self) -> str:
        """Where an error message finds the sample."""
        return self.source or f"sample {self.id!r}"

    def __getstate__(self) -> dict[str, Any]:
        kept = [image if isinstance(image, Path) else encoded(image) or image for image in self.images]
        return {**vars(self), "images": tuple(kept)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = [image.open() if isinstance(image, Encoded) else image for image in state["images"]]
        vars(self).update(state, images=tuple(opened))


@dataclass(frozen=True)
class Task:
    """One task of a stream: its two splits, its scorer and its length limit.

    Attributes:
        name: Unique within the stream. Letters, digits, `_`, `-` and `.` are allowed.
        train: Training samples.
        test: Test samples.
        scorer: A name known to `cram.scoring.score`.
        max_new_tokens: Length limit of a generated answer.
        published: The scorer behind published numbers of the task, or None.
    """

    name: str
    train: Sequence[Sample]
    test: Sequence[Sample]
    scorer: str
    max_new_tokens: int
    published: str | None = None


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learnt."""

    name: str
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError(f"stream {self.name!r} must have at least one task, got none")
        if len(set(names)) != len(names):
            raise ValueError(f"task names of stream {self.name!r} must be unique, got {names}")

    def in_order(self, order: int) -> Stream:
        """The same tasks in another order: 0 is the stream's own, every other number a shuffle of its own.

        Raises:
            ValueError: If `order` is negative.
        """
        if order < 0:
            raise ValueError(f"order must be at least 0, got {order}")
        tasks = list(self.tasks)
        if order:
            random.Random(order).shuffle(tasks)
        return Stream(self.name, tuple(tasks))

    @staticmethod
    def from_datasets(name: str, tasks: Mapping[str, Any], **options: Any) -> Stream:
        """A stream from rows in memory, such as data sets of Hugging Face.

        Args:
            name: Name of the stream.
            tasks: Task -> (training rows, test rows).
            options: `scorer`, `max_new_tokens` and `image_root`; see
                `cram.streams.messages.stream_from_datasets`.
        """
        # The readers stand on this module.
        messages = import_module("cram.streams.messages")
        made: Stream = messages.stream_from_datasets(name, tasks, **options)
        return made


def open_image(image: Image.Image | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open one image as the model sees it; see `cram.streams.pictures.upright_rgb`.

    An opened image that is not decoded yet stays so; its bytes are decoded anew. Threads may open the same
    image at once.

    The header is read before the pixels. So a small file that claims a huge picture is refused and not
    decoded.

    Raises:
        ValueError: If the image has more than `max_pixels` pixels, cannot be decoded or cannot be made RGB,
            or is neither opened nor a path.
    """
    from PIL import Image

    if not isinstance(image, Image.Image | Path):
        raise ValueError(f"image must be an opened PIL image or a Path, got {type(image).__name__}")
    name = image if isinstance(image, Path) else getattr(image, "filename", "") or "in memory"
    try:
        return _read(image, max_pixels) if isinstance(image, Path) else shared_rgb(image)
    except (_TooLarge, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        fault = f"must have at most {max_pixels} pixels, got {error}"
    except DECODING_ERRORS as error:
        told = str(error).startswith("must ")
        fault = str(error) if told else f"must be a readable picture, got: {error}"
    raise ValueError(" ".join(f"image {name} {fault}".splitlines()))


class _TooLarge(Exception):
    """What an image has instead of fewer pixels."""


def _read(file: Path, max_pixels: int) -> Image.Image:
    from PIL import Image

    # A damaged length inside makes Pillow ask a file for gigabytes; bytes in memory give what they have.
    if (size := file.stat().st_size) > MAX_PIXEL_BYTES * max_pixels + SPARE_BYTES:
        raise _TooLarge(f"{size} bytes")
    with Image.open(BytesIO(file.read_bytes())) as opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise _TooLarge(f"{width} x {height}")
        return upright_rgb(opened)


def open_images(sample: Sample) -> list[Image.Image]:
    """Open every image of a sample, in order. A sample without images gives an empty list."""
    return [open_image(image) for image in sample.images]
