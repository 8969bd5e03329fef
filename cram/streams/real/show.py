"""Writes a sheet of the tasks' pictures, one row per task, to look at them.

python -m cram.streams.real.show --out FILE --stream builtin-real --columns 10
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from cram.streams.registry import BUILTIN, load_stream
from cram.streams.types import Stream, open_images

_GAP = 2


def picture_sheet(stream: Stream, columns: int) -> Image.Image:
    """The pictures of the first test samples, a row per task, in the order of learning."""
    rows = [[open_images(sample)[0] for sample in task.test[:columns]] for task in stream.tasks]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (columns * (width + _GAP), len(rows) * (height + _GAP)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(picture, (j * (width + _GAP), i * (height + _GAP)))
    return sheet


def main() -> None:
    """Write the sheet and print a question and its answer per task."""
    parser = argparse.ArgumentParser(description="Write a sheet of the pictures of a built-in stream.")
    parser.add_argument("--out", type=Path, required=True, help="picture file to write")
    parser.add_argument("--stream", choices=BUILTIN, default="builtin-real", help="default: %(default)s")
    parser.add_argument("--columns", type=int, default=10, help="pictures per task (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stream (default: %(default)s)")
    arguments = parser.parse_args()
    stream = load_stream(arguments.stream, arguments.seed, arguments.columns)
    picture_sheet(stream, arguments.columns).save(arguments.out)
    for task in stream.tasks:
        print(f"{task.name:16} {task.test[0].instruction} -> {task.test[0].answer}")


if __name__ == "__main__":
    main()
