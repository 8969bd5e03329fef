"""What a stream's samples are known by: what they say, and what their pictures hold.

A picture's file is known by its size and by its first and last 64 KiB. So a file of up to 128 KiB is read as
a whole. A picture in memory is known by all of its pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cram.streams.types import Sample, open_image

END_BYTES = 64 << 10


def texts_digest(samples: Iterable[Sample]) -> str:
    """Return the sha256 of the ids, instructions and answers of some samples."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(said(sample))
    return digest.hexdigest()


def said(sample: Sample) -> bytes:
    """Return what a sample says: id, instruction, answers, and the number of its pictures."""
    return repr((sample.id, sample.instruction, sample.accepted, len(sample.images))).encode()


def pictures_digest(samples: Sequence[Sample]) -> str:
    """Return the sha256 of the pictures of some samples, in order.

    A picture that cannot be read counts as empty; `cram.learning.checks` names it.
    """
    images = [image for sample in samples for image in sample.images]
    files = list({image: None for image in images if isinstance(image, Path)})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        known = dict(zip(files, pool.map(_of_file, files), strict=True))
    digest = hashlib.sha256()
    for image in images:
        digest.update(known[image] if isinstance(image, Path) else _of_pixels(image))
    return digest.hexdigest()


def _of_file(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            content = opened.read(END_BYTES)
            if size > END_BYTES:
                opened.seek(max(END_BYTES, size - END_BYTES))
                content += opened.read(END_BYTES)
    except OSError:
        return b""
    return hashlib.sha256(b"%d:%b" % (size, content)).digest()


def _of_pixels(image: Any) -> bytes:
    try:
        picture = open_image(image)
    except ValueError:
        return b""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
