"""Pictures from what a model is given: `pixel_values` turned back into what its image processor had resized.

    images     pixel_values [N, 3, H, W]: a picture each                                  (LLaVA)
    tiles      pixel_values [N, 3, H, W]: the tiles of a picture and, behind more than one tile, the whole
               picture as a thumbnail                                                     (InternVL)
    patches    pixel_values [P, 3 * 2 * p * p] and a grid [N, 3]: the patches of N pictures   (Qwen-VL)

One unit is an image, a tile, or all patches of one picture. Normalisation and rescaling are undone and the
values rounded: the pictures are those that the image processor had before it normalised them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Pixels:
    """What a vision tower was given for its images.

    Attributes:
        values: `pixel_values`.
        grid: Patches of each picture in time, height and width [N, 3]; None for images and tiles.
        merge: Patches that share a language token, along each side; 1 for images and tiles.
    """

    values: Tensor
    grid: Tensor | None = None
    merge: int = 1

    def pictures(self, chosen: Sequence[range], image_processor: Any) -> list[Image.Image]:
        """The pictures that the chosen units show; several units are the tiles of one picture."""
        if self.grid is None:
            whole = (joined_tiles(self.values[units.start : units.stop]) for units in chosen)
            return [picture(values, image_processor) for values in whole]
        grids = self.grid.tolist()
        parts = self.values.split([t * h * w for t, h, w in grids])
        size = int(image_processor.patch_size)
        return [
            picture(joined_patches(parts[i], grids[i][1], grids[i][2], size, self.merge), image_processor)
            for i in (units.start for units in chosen)
        ]


def through_tiles(image: Image.Image, processor: Any) -> Image.Image:
    """A picture as a processor of tiles leaves it: resized to a grid of square tiles."""
    made = processor(text=[processor.image_token], images=[image], return_tensors="pt")["pixel_values"]
    return Pixels(made).pictures([range(len(made))], processor.image_processor)[0]


def joined_tiles(tiles: Tensor) -> Tensor:
    """A picture [3, r * H, c * W] from its r * c tiles, row by row, with the thumbnail behind them
    [r * c + 1, 3, H, W]; a single tile is the picture.

    Nothing says how many rows and columns there are, so the thumbnail decides: it resembles one arrangement.
    """
    if len(tiles) == 1:
        return tiles[0]
    *_, channels, height, width = tiles.shape
    parts, thumbnail = tiles[:-1].float(), tiles[-1].float()
    found = []
    for columns in range(1, len(parts) + 1):
        if len(parts) % columns == 0:
            grid = parts.reshape(-1, columns, channels, height, width).permute(2, 0, 3, 1, 4)
            joined = grid.reshape(channels, grid.shape[1] * height, columns * width)
            difference = (F.adaptive_avg_pool2d(joined, (height, width)) - thumbnail).square().mean()
            found.append((float(difference), joined))
    return min(found, key=lambda each: each[0])[1]


def joined_patches(patches: Tensor, rows: int, columns: int, size: int, merge: int) -> Tensor:
    """A picture [3, rows * size, columns * size] from its patches [rows * columns, 3 * t * size * size].

    Patches come in blocks of merge x merge; a still picture holds t equal frames, of which one is taken.
    """
    blocks = patches.reshape(rows // merge, columns // merge, merge, merge, 3, -1, size, size)[
        :, :, :, :, :, 0
    ]
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * size, columns * size)


def picture(values: Tensor, image_processor: Any) -> Image.Image:
    """The picture behind normalised values [3, H, W].

    Args:
        values: As the image processor made them.
        image_processor: Its mean, standard deviation and factor are undone.
    """
    from PIL import Image

    values = values.detach().float()
    if image_processor.do_normalize:
        mean, deviation = (
            torch.tensor(each, device=values.device)[:, None, None]
            for each in (image_processor.image_mean, image_processor.image_std)
        )
        values = values * deviation + mean
    if image_processor.do_rescale:
        values = values / image_processor.rescale_factor
    whole = values.round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(whole.permute(1, 2, 0).cpu().numpy())


def units_per_sample(tokens: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], int]:
    """Units of each sample, and the rows k that generation made of each sample.

    The tower runs before generation expands the rows, so N units may stand for k N ones.

    Args:
        tokens: Image tokens of each row.
        sizes: Tokens of each unit.

    Raises:
        ValueError: If the rows do not hold exactly the units, in order.
    """
    copies = sum(tokens) // sum(sizes)
    samples = tokens[:: max(copies, 1)]
    expanded = [count for count in samples for _ in range(copies)]
    counts, used = [], 0
    for wanted in samples:
        first = used
        while wanted > 0 and used < len(sizes):
            wanted -= sizes[used]
            used += 1
        counts.append(used - first if not wanted else -1)
    if expanded != list(tokens) or -1 in counts or used != len(sizes):
        raise ValueError(
            f"input_ids must hold the image tokens of {len(sizes)} images or tiles, {list(sizes)}, "
            f"got {list(tokens)} in {len(tokens)} rows"
        )
    return counts, copies


def tiles_per_picture(row: Sequence[int], image_token: int, size: int) -> list[int]:
    """Tiles of each picture of a row, thumbnail included: each has an unbroken run of image tokens.

    Args:
        row: Token ids.
        image_token: Id of image tokens.
        size: Tokens of a tile.
    """
    return [len(list(run)) // size for token, run in groupby(row) if token == image_token]
