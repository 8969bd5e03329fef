"""Which group and gates answer a request: by a bundle's router and its CLIP, or named by the client.

Neither the multimodal model nor vLLM is loaded. The router looks through a CLIP of its own, because vLLM
builds the vision tower of a LLaVA without its last layers.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cram.bundle.encoder import check_encoder, named_encoder
from cram.bundle.format import METHOD, ROUTER, check_hashes, check_unchanged, describe
from cram.bundle.runs import bundle_at
from cram.bundle.tensors import check_tensors
from cram.families import FAMILIES, Family
from cram.loading import load_encoder
from cram.methods.parts.grouped import MAX_COUNT
from cram.routing.clip import ClipEncoder, mean_per_sample
from cram.routing.query import Query
from cram.routing.router import Router
from cram.serve.images import decoded
from cram.serve.vllm.export import Adapter, exported
from cram.serve.vllm.front.conversation import Asked
from cram.serve.vllm.group import MAX_GATE, Gates

KEPT_FEATURES = 8192


@dataclass(frozen=True)
class Choice:
    """Who answers a request.

    Attributes:
        adapter: The group's adapter.
        gates: [L, E of the group].
        automatic: Whether the router chose.
    """

    adapter: Adapter
    gates: Gates
    automatic: bool

    def means(self) -> dict[str, float]:
        """Expert -> mean gate over the layers, without those that are 0."""
        means = self.gates.mean(0).tolist()
        names = self.adapter.group.experts
        return {name: mean for name, mean in zip(names, means, strict=True) if mean}


class BundleRouter:
    """Routes among the adapters of one bundle.

    Attributes:
        adapters: One per group that has experts.
        family: The model family, which knows how prompts are written.
    """

    def __init__(
        self, router: Router, encoder: ClipEncoder, adapters: Sequence[Adapter], family: Family
    ) -> None:
        self.adapters, self.family = tuple(adapters), family
        self._router, self._encoder = router, encoder
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        out: str | Path,
        encoder: ClipEncoder | str | None = None,
        device: str = "cpu",
    ) -> BundleRouter:
        """Read a bundle's router, and load its CLIP.

        Args:
            bundle: The bundle, or a run folder.
            out: Where its adapters were exported to.
            encoder: A loaded CLIP, or where it is; by default the CLIP that the bundle names.
            device: Where CLIP runs.

        Raises:
            ValueError: If the bundle is damaged or was not exported, or was trained with another CLIP.
        """
        folder = bundle_at(Path(bundle))
        adapters = exported(folder, out)
        description = describe(folder)
        check_hashes(folder, description)
        specs = description.specs()
        state = {
            name: tensor
            for file in (METHOD, ROUTER)
            if file in specs
            for name, tensor in check_tensors(folder / file, specs[file]).read()
        }
        check_unchanged(folder, description)
        counts = description.values.get("counts")
        if not isinstance(counts, list) or not all(type(n) is int and 0 < n < MAX_COUNT for n in counts):
            raise ValueError(f"counts of {folder} must be positive integers, got {counts!r:.100}")
        if description.family not in FAMILIES:
            raise ValueError(f"family of {folder} must be a known one, got {description.family!r:.100}")
        router = Router(description.config, description.num_layers)
        tensors = {**state, "counts": torch.tensor(counts, dtype=torch.int64)}
        router.import_state(tensors, description.values)
        if not isinstance(encoder, ClipEncoder):
            loaded = load_encoder(encoder) if encoder else named_encoder(description)
            encoder = loaded.to(device)
        check_encoder(encoder, description, folder)
        return cls(router, encoder, adapters, FAMILIES[description.family])

    @property
    def encoder(self) -> ClipEncoder:
        """The CLIP."""
        return self._encoder

    @property
    def names(self) -> list[str]:
        """All experts, group by group."""
        return [name for adapter in self.adapters for name in adapter.group.experts]

    def automatic(self, asked: Asked) -> Choice:
        """Group and gates by the instruction and the images.

        Each image passes CLIP alone, and its features are kept: equal requests get equal bits, without which
        they would not share prefixes, and the turns of a conversation need one pass for an image.

        Raises:
            ValueError: If an image is no picture, or the group has no expert.
        """
        rows = [self._feature(content) for content in asked.images]
        stacked = torch.stack(rows) if rows else torch.zeros(0, self._encoder.image_dim)
        text = self._encoder.encode_text([asked.instruction]).cpu()
        route = self._router.route(Query(text, *mean_per_sample(stacked, [len(rows)])))
        assert route.groups is not None
        group = int(route.groups[0])
        adapter = next((each for each in self.adapters if each.index == group), None)
        if adapter is None:
            raise ValueError(f"the group of the request must have an expert, got group {group} without one")
        columns = self._router.experts_of(group)
        return Choice(adapter, route.gates[:, 0, columns].numpy().astype(np.float32), True)

    def _feature(self, content: bytes) -> Tensor:
        """Feature [D_q] of an image's bytes."""
        key = hashlib.sha256(content).digest()
        if key not in self._features:
            self._features[key] = self._encoder.encode_images([[decoded(content)]])[0][0].cpu()
            if len(self._features) > KEPT_FEATURES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]

    def mixture(self, scales: Mapping[str, float]) -> Choice | None:
        """The experts that a client names, in all layers alike; None for none, which is the base model.

        Raises:
            ValueError: If an expert is unknown, a scale too large, or the experts are of several groups,
                which are several slots of vLLM.
        """
        if unknown := sorted(scales.keys() - set(self.names)):
            raise ValueError(f"lora must name experts among {self.names!r:.200}, got {unknown!r:.100}")
        if large := [scale for scale in scales.values() if not abs(scale) <= MAX_GATE]:
            raise ValueError(f"lora must have scales of at most {MAX_GATE:g} in size, got {large[0]}")
        acting = {name for name, scale in scales.items() if scale}
        holders = [each for each in self.adapters if acting & set(each.group.experts)]
        if len(holders) > 1:
            groups = [list(each.group.experts) for each in holders]
            raise ValueError(f"lora must name experts of one group, got several of {groups}")
        if not holders:
            return None
        group = holders[0].group
        row = np.array([scales.get(name, 0.0) for name in group.experts], np.float32)
        return Choice(holders[0], np.tile(row, (group.layers, 1)), False)
