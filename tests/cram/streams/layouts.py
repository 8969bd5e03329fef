"""Small data on disk in the layouts of the public benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

CAPTION_TASKS = ("VizWiz", "Flickr30k")


def picture(path: Path, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 1 if mode == "P" else "red" if mode.startswith("RGB") else 120).save(path)


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def conversation(row_id: str, image: str | list[str] | None, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    row: dict[str, Any] = {"id": row_id, "conversations": turns}
    return row if image is None else {**row, "image": image}


def write_benchmark(root: Path, stream_file: Path, rows: int = 3) -> None:
    """Write every file that a shipped stream file names, with `rows` rows a split and one picture a row."""
    described = yaml.safe_load(stream_file.read_text())
    for task in described["tasks"]:
        name = task["name"]
        train, test, images, captions = [], [], [], []
        for i in range(rows):
            image = f"{name}/{i}.png"
            picture(root / described["images"] / image)
            train.append(conversation(f"{i // 2}", image, f"<image>\nWhat is {i}?", f"answer {i}"))
            test.append(
                {"question_id": f"q{i}", "image": image, "text": f"What is {i}?", "answer": f"answer {i}"}
            )
            images.append({"id": i, "file_name": f"{i}.png"})
            captions += [{"id": 2 * i + k, "image_id": i, "caption": f"caption {i} {k}"} for k in range(2)]
        dump(root / task["train"], train)
        dump(root / task["test"], test)
        if "references" in task:
            dump(root / task["references"], {"images": images, "annotations": captions})
