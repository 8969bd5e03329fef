"""Servers that one command starts, requests for them, and what their answers must be."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

import cram
from cram.base import base_folder
from tests.cram import factories
from tests.cram.serve.vllm.real import checkpoints
from tests.cram.serve.vllm.real.reference import answer_logprobs
from tests.cram.serve.vllm.real.worlds import EXPLICIT, IN_PROCESS

PORT = 8731
VOCABULARY = 627
START_S = 900
FLAGS = "--dtype float32 --max-model-len 256 --enforce-eager --max-num-seqs 8 --max-num-batched-tokens 128"
FLAGS += f" --block-size 32 --max-logprobs {VOCABULARY} --api-key sesame"
CASES = [(0, (0,)), (0, (3,)), (1, (1,)), (1, (6,)), (0, (5,)), (0, ()), (1, ()), (0, (7,))]


class Served:
    """The server, and the same model in process.

    Attributes:
        place: Folder of `model`, `bundle` and `bundles`.
        model, handle: The attached model.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        checkpoints.llava(place / "model")
        self.model, self.processor, self.handle = checkpoints.attached(
            base_folder() / "llava", base_folder() / "clip"
        )
        cram.save(self.model, place / "bundle")

    def more_bundles(self) -> Path:
        """Write `bundles`, which a running server is given."""
        folder = self.place / "bundles"
        for name, group in (("more", 1), ("large", 0)):
            model, _, handle = checkpoints.attached(base_folder() / "llava", base_folder() / "clip")
            # One expert more in group 0 than a slot of rank 32 holds.
            checkpoints.add(handle, "newest", group, handle.method.router.centroids()[0, 0])
            cram.save(model, folder / name)
        with torch.no_grad():
            for linear in handle.modules.values():
                linear.base.weight.mul_(1.1)
        cram.save(model, folder / "of_another_base")
        (folder / "damaged").mkdir()
        return folder

    def command(self, *words: str, flags: Sequence[str] = ()) -> list[str]:
        """What a user types."""
        model, bundle = str(self.place / "model"), str(self.place / "bundle")
        start = [sys.executable, "-m", "cram", "serve", "--engine", "vllm", "--model", model]
        start += ["--bundle", bundle, "--clip", str(base_folder() / "clip"), *words]
        return [*start, "--", *FLAGS.split(), *flags]


@contextmanager
def running(command: list[str], port: int, log: Path, **variables: str) -> Iterator[None]:
    """A server process from its first healthy answer on; it gets SIGTERM at the end."""
    with log.open("w") as file:
        settings = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **variables}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=settings)
    try:
        deadline = time.monotonic() + START_S
        while not healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(300)


def healthy(port: int) -> bool:
    """Whether a server answers."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def url_of(seed: int) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    factories.image(seed).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def body(model: str, question: int, seeds: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    """A chat request with all log-probabilities."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url_of(k)}} for k in seeds]
    parts.append({"type": "text", "text": checkpoints.QUESTIONS[question]})
    chosen = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 6}
    chosen |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {**chosen, "logprobs": True, "top_logprobs": VOCABULARY, **fields}


def post(
    asked: Any, path: str = "/chat/completions", key: str = "sesame", port: int = PORT
) -> httpx.Response:
    """One request."""
    url = f"http://127.0.0.1:{port}/v1{path}"
    return httpx.post(url, json=asked, headers={"authorization": f"Bearer {key}"}, timeout=600)


Answer = tuple[list[int], torch.Tensor]


def read_all(answer: httpx.Response) -> tuple[list[int], list[Answer]]:
    """Prompt, and of each answer the tokens and per token all log-probabilities, largest first.

    Bytes stand for several tokens, so the tokens of the log-probabilities are not told apart.
    """
    assert answer.status_code == 200, answer.text
    data = answer.json()
    found = []
    for choice in data["choices"]:
        rows = [
            sorted((e["logprob"] for e in each["top_logprobs"]), reverse=True)
            for each in choice["logprobs"]["content"]
        ]
        found.append((choice["token_ids"], torch.tensor([row[:VOCABULARY] for row in rows])))
    return data["prompt_token_ids"], found


def read(answer: httpx.Response) -> tuple[list[int], list[int], torch.Tensor]:
    """Prompt, tokens and log-probabilities of a reply with one answer."""
    prompt, ((tokens, table),) = read_all(answer)
    return prompt, tokens, table


def automatic(served: Served, prompt: list[int], answer: list[int], seeds: tuple[int, ...]) -> torch.Tensor:
    """What the attached model gives by its own routing."""
    images = [factories.image(seed) for seed in seeds]
    pixels = dict(served.processor.image_processor(images=images, return_tensors="pt")) if images else {}
    return answer_logprobs(served.model, prompt, answer, pixels)


def check_routed(served: Served, port: int) -> None:
    """Ask eight routed requests at once; all log-probabilities must be those of the attached model."""
    with ThreadPoolExecutor(len(CASES)) as pool:
        answers = list(pool.map(lambda case: post(body("cram", *case), port=port), CASES))
    worst = 0.0
    for (question, seeds), answer in zip(CASES, answers, strict=True):
        prompt, tokens, found = read(answer)
        wanted = automatic(served, prompt, tokens, seeds)
        assert wanted.argmax(-1).tolist() == tokens and answer.headers["x-cram-group"] == str(question)
        worst = max(worst, float((wanted.sort(-1, descending=True).values - found).abs().max()))
    print(f"8 concurrent: {worst:.1e} from the attached model")
    assert worst < EXPLICIT < IN_PROCESS, worst
