"""Train on data of your own, then ask about a picture.

    python examples/own_data.py [FOLDER]

Writes two small tasks into FOLDER/data as files in the layout that every stream has, learns them on the base
that comes with the package, and answers a question with the result. Put your own pictures and rows in the
place of `write_data`, and a model such as "llava-hf/llava-1.5-7b-hf" in the place of "builtin".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

import cram
from cram.loading import Sources
from cram.streams import load_stream

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}
QUESTIONS = {
    "names": "What colour is the picture? Answer with one word.",
    "letters": "Which colour is it? A: red. B: blue. Answer with the letter of the right option.",
}
STREAM = """\
name: own
tasks:
"""
TASK = """\
  - name: {name}
    train: {name}-train.json
    test: {name}-test.json
    scorer: accuracy
    max_new_tokens: 4
"""


def write_data(folder: Path) -> Path:
    """Write pictures, one training and one test file per task, and the stream file that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = STREAM
    for task, question in QUESTIONS.items():
        train, test = [], []
        for number in range(8):
            colour = list(COLOURS)[number % 2]
            answer = colour if task == "names" else "AB"[number % 2]
            picture = f"{task}-{number}.png"
            shade = tuple(min(255, value + 5 * number) for value in COLOURS[colour])
            Image.new("RGB", (64, 64), shade).save(folder / picture)
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            train.append({"id": f"{task}-{number}", "image": picture, "conversations": turns})
            test.append({"question_id": f"{number}", "image": picture, "text": question, "answer": answer})
        (folder / f"{task}-train.json").write_text(json.dumps(train))
        (folder / f"{task}-test.json").write_text(json.dumps(test[:2]))
        stream += TASK.format(name=task)
    (folder / "stream.yaml").write_text(stream)
    return folder / "stream.yaml"


def main(folder: Path) -> None:
    """Write the data, learn it, answer a question."""
    stream = load_stream(write_data(folder / "data"))
    model, processor, encoder = Sources("builtin").load()
    # The small base takes larger steps than the paper's 2e-4; 20 steps per task are enough for two colours.
    config = cram.CramConfig(learning_rate=3e-3, batch_size=4, max_steps=20)
    learner = cram.ContinualLearner(
        model, processor, stream, config, out=folder / "run", encoder=encoder, progress=False
    )
    report = learner.run()
    print("accuracies after the last task:", report["methods"]["cram"]["matrix"][-1])
    answer = model.cram.answer(folder / "data/names-0.png", QUESTIONS["names"], max_new_tokens=4)
    print(f"answer: {answer} ({answer.routing()})")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-data"))
