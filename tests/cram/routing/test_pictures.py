"""Pictures from pixel values: exactly what the image processor had before it normalised them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cram.routing.pictures import Pixels, tiles_per_picture, units_per_sample
from tests.cram import factories

SIZES = [(32, 16), (16, 48), (24, 24)]  # width, height


def noise(size: tuple[int, int]) -> Image.Image:
    generator = np.random.default_rng(size[0])
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def same(found: list[Image.Image], expected: list[Image.Image]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_become_the_pictures(dtype: torch.dtype) -> None:
    processor = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4096)
    originals = [noise(size) for size in SIZES]
    made = processor(images=originals, return_tensors="pt")
    pixels = Pixels(made["pixel_values"].to(dtype), made["image_grid_thw"], merge=2)
    found = pixels.pictures([range(i, i + 1) for i in range(3)], processor)
    if dtype == torch.float32:
        assert same(found, originals)
    # Half a unit in the last of bfloat16's 8 bits of a value up to 2.7, times 255 * 0.28, and the rounding.
    gaps = [
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(found, originals, strict=True)
    ]
    assert max(gaps) <= 1
    assert same(pixels.pictures([range(1, 2)], processor), found[1:2])


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (4, 1)])
def test_tiles_become_the_picture(columns: int, rows: int) -> None:
    processor = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=6
    )
    original = factories.image(3).resize((16 * columns, 16 * rows), Image.Resampling.BICUBIC)
    made = processor(images=[original, original], return_tensors="pt")
    count = columns * rows + (columns * rows > 1)
    assert len(made["pixel_values"]) == 2 * count
    found = Pixels(made["pixel_values"]).pictures([range(count), range(count, 2 * count)], processor)
    assert same(found, [original, original])


def test_values_that_were_not_normalised_stay() -> None:
    rules: Any = factories.image_processor()
    rules.do_normalize = rules.do_rescale = False
    original = factories.image(1)
    values = torch.from_numpy(np.array(original)).permute(2, 0, 1)[None]
    assert same(Pixels(values).pictures([range(1)], rules), [original])


def test_tiles_of_a_picture_are_one_run_of_image_tokens() -> None:
    assert tiles_per_picture([1, 9, 9, 9, 9, 2, 9, 9, 5, 5], image_token=9, size=2) == [2, 1]
    assert tiles_per_picture([1, 2], image_token=9, size=2) == []


@pytest.mark.parametrize(
    ("tokens", "sizes", "counts", "copies"),
    [
        ([4, 0, 6], [4, 2, 4], [1, 0, 2], 1),
        ([4, 4, 6, 6], [4, 2, 4], [1, 2], 2),
        ([3, 3, 3], [1, 2], [2], 3),
    ],
)
def test_units_are_counted_off_by_their_tokens(
    tokens: list[int], sizes: list[int], counts: list[int], copies: int
) -> None:
    assert units_per_sample(tokens, sizes) == (counts, copies)


@pytest.mark.parametrize(
    ("tokens", "sizes"), [([4, 8], [4, 4]), ([3, 5], [4, 4]), ([4, 6, 4, 6], [4, 6]), ([2], [4])]
)
def test_other_numbers_of_tokens_are_refused(tokens: list[int], sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"input_ids must hold the image tokens of \d images or tiles"):
        units_per_sample(tokens, sizes)
