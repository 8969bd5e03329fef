"""Keys by which a sample finds its task: one for image and one for text features, drawn to their means.

    loss = mean over samples of [1 - cos(e_img, k_img)] + [1 - cos(e_txt, k_txt)]
    task(s) = argmax_t cos(e_img, k_img_t) + cos(e_txt, k_txt_t)

A sample without an image has no image term.
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
        trained: Both keys [1, D] of the task in training, or none.
    """

    def __init__(self, image_dim: int, text_dim: int, device: torch.device) -> None:
        """Holds no key yet."""
        self.image, self.text = (torch.zeros(0, dim, device=device) for dim in (image_dim, text_dim))
        self.trained: list[nn.Parameter] = []

    def __len__(self) -> int:
        """Number of finished tasks."""
        return len(self.text)

    def begin(self) -> None:
        """Start a task's keys from N(0, 0.02)."""
        sides = (self.image, self.text)
        start = [torch.randn(1, keys.shape[1]) * INITIAL_STD for keys in sides]
        self.trained = [nn.Parameter(key.to(keys.device)) for key, keys in zip(start, sides, strict=True)]

    def finish(self) -> None:
        """End the task; its keys are kept as they are."""
        self.load(self.state())

    def state(self) -> dict[str, Tensor]:
        """Keys "keys.image" and "keys.text" of all tasks, those in training last."""
        sides = [[self.image], [self.text]]
        for side, key in zip(sides, self.trained, strict=bool(self.trained)):
            side.append(key.detach())
        return {"keys.image": torch.cat(sides[0]), "keys.text": torch.cat(sides[1])}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the keys of `state`; none is in training."""
        self.image, self.text = (
            tensors[name].to(own.device, torch.float32, copy=True)
            for name, own in (("keys.image", self.image), ("keys.text", self.text))
        )
        self.trained = []

    def loss(self, query: Query) -> Tensor:
        """The loss of the keys in training, a scalar."""
        image, text = _cosines(query, *self.trained)
        return (query.has_image[:, None].to(image) - image + 1 - text).mean()

    def nearest(self, query: Query) -> Tensor:
        """The most similar task of S samples: int64 [S].

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

    A query's image is 0 where a sample has none, and so is its cosine.
    """
    pairs = ((query.image, image_keys), (query.text, text_keys))
    image, text = (F.normalize(x, dim=1) @ F.normalize(keys.to(x.device), dim=1).t() for x, keys in pairs)
    return image, text
