"""Keys that decide a sample's task. Each task has one key for image features and one for text features.

    loss = mean over samples of [1 - cos(e_img, k_img)] + [1 - cos(e_txt, k_txt)]
    task(s) = argmax_t cos(e_img, k_img_t) + cos(e_txt, k_txt_t)

The loss draws each key to the mean of its task's features. A sample without an image has no image term.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram.routing.query import Query

INITIAL_STD = 0.02


class TaskKeys:
    """Keys of all tasks, float32.

    Attributes:
        image, text: Finished keys [T, D_q] and [T, D_t].
        trained: Both keys [1, D] of the task in training; empty if no task is in training.
    """

    def __init__(self, image_dim: int, text_dim: int, device: torch.device) -> None:
        """Starts without keys."""
        self.image, self.text = (torch.zeros(0, dim, device=device) for dim in (image_dim, text_dim))
        self.trained: list[nn.Parameter] = []

    def __len__(self) -> int:
        """Return the number of finished tasks."""
        return len(self.text)

    def begin(self) -> None:
        """Start a task's keys from N(0, 0.02)."""
        sides = (self.image, self.text)
        start = [torch.randn(1, keys.shape[1]) * INITIAL_STD for keys in sides]
        self.trained = [nn.Parameter(key.to(keys.device)) for key, keys in zip(start, sides, strict=True)]

    def finish(self) -> None:
        """End the task and keep its keys."""
        self.load(self.state())

    def state(self) -> dict[str, Tensor]:
        """Return the keys "keys.image" and "keys.text" of all tasks. The task in training comes last."""
        sides = [[self.image], [self.text]]
        for side, key in zip(sides, self.trained, strict=bool(self.trained)):
            side.append(key.detach())
        return {"keys.image": torch.cat(sides[0]), "keys.text": torch.cat(sides[1])}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the keys of `state`. No task is in training then."""
        self.image, self.text = (
            tensors[name].to(own.device, torch.float32, copy=True)
            for name, own in (("keys.image", self.image), ("keys.text", self.text))
        )
        self.trained = []

    def loss(self, query: Query) -> Tensor:
        """Return the loss of the keys in training, a scalar."""
        image, text = _cosines(query, *self.trained)
        return (query.has_image[:, None].to(image) - image + 1 - text).mean()

    def nearest(self, query: Query) -> Tensor:
        """Return the most similar task of each of S samples: int64 [S].

        Raises:
            ValueError: If there is no key.
        """
        if not len(self) and not self.trained:
            raise ValueError("nearest must follow a task, got no keys")
        state = self.state()
        image, text = _cosines(query, state["keys.image"], state["keys.text"])
        return (image + text).argmax(1)


def _cosines(query: Query, image_keys: Tensor, text_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines [S, T] of S samples with T image and T text keys.

    A sample without an image has image feature 0, and so cosine 0.
    """
    pairs = ((query.image, image_keys), (query.text, text_keys))
    image, text = (F.normalize(x, dim=1) @ F.normalize(keys.to(x.device), dim=1).t() for x, keys in pairs)
    return image, text
