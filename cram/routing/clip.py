"""The frozen CLIP that routing looks through: text features t for the groups, image features v for the gates.

    t [D_t] = pooled output of CLIP's text model (not projected, not normalised), at most 77 tokens
    v [D_q] = visual_projection(pooled output of CLIP's vision model), not normalised

LLaVA's own vision tower is CLIP's vision model. Where the two are the same network (equal weights and
shape), the tower's pooled output gives v exactly, without a second vision pass or a second copy of the
weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cram.console import first_line
from cram.families import family_of
from cram.routing.means import without_autocast
from cram.routing.query import Query
from cram.values import Values, some_values

if TYPE_CHECKING:
    from PIL import Image

CACHED_TEXTS = 16_384  # at 768 floats a text, 50 MB
IMAGES_A_PASS = 64
VALUES_PER_WEIGHT = 4  # that tell an encoder
KEYS_SHOWN = 4
LEGACY_END_ID = 2  # CLIP configs of old name this id wrongly; transformers then pools at the largest token id


def load_config(source: str | Path, what: str) -> Any:
    """Load the configuration of a model.

    Args:
        source: A folder or a name that transformers resolves.
        what: What the model is, for an error.

    Raises:
        OSError: If there is no model at `source`, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source))
    except OSError as error:
        raise OSError(
            f"{what} must be a folder, or a name that the hub or its cache has, got {str(source)!r}: "
            f"{first_line(error)}"
        ) from error


def load_image_processor(source: str) -> Any:
    """Load the image processor of a folder or name.

    In transformers 5.17 the same name at the top of the package asks for torchvision, which is not needed.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source)


class ClipEncoder:
    """CLIP features of instructions and images, in float32.

    Attributes:
        source: Folder or name that the CLIP weights came from.
        text_dim: D_t.
        image_dim: D_q.
        reuses_vision_tower: Whether the vision network is the tower of the multimodal model.
    """

    def __init__(
        self,
        clip: Any,
        tokenizer: Any,
        image_processor: Any,
        model: nn.Module | None = None,
        source: str = "",
    ) -> None:
        """Takes the parts of a loaded CLIP.

        Args:
            clip: A transformers `CLIPModel`, or a model with the same parts; frozen here.
            tokenizer: Its tokenizer.
            image_processor: Its image processor.
            model: The multimodal model whose vision tower may be reused.
            source: Where the weights came from.
        """
        tower = _equal_tower(clip.vision_model, model)
        self.source = source
        self.reuses_vision_tower = tower is not None
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self._text_model = clip.text_model.float().requires_grad_(False).eval()
        self._projection = clip.visual_projection.float().requires_grad_(False)
        self._vision = clip.vision_model.float().requires_grad_(False).eval() if tower is None else tower
        self._texts: dict[str, Tensor] = {}
        self.text_dim = int(clip.config.text_config.hidden_size)
        self.image_dim = int(self._projection.out_features)
        self._max_tokens = int(clip.config.text_config.max_position_embeddings)
        self._end_id = int(clip.config.text_config.eos_token_id)

    @classmethod
    def from_pretrained(cls, source: str, model: nn.Module | None = None) -> ClipEncoder:
        """Loads CLIP from a folder or by name; with `model`, on its device and through its vision tower if
        equal.

        Raises:
            ValueError: If `source` holds no CLIP, or not exactly its weights.
            OSError: If there is nothing at `source`.
        """
        from transformers import AutoTokenizer, CLIPModel

        kind = load_config(source, "encoder").model_type
        if kind != "clip":
            raise ValueError(
                f"encoder must be a CLIP with both towers, got a model of type {kind!r} at {source}"
            )
        clip, report = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        check_weights(source, report)
        if model is not None:
            clip = clip.to(next(model.parameters()).device)
        tokenizer = AutoTokenizer.from_pretrained(source)
        return cls(clip, tokenizer, load_image_processor(source), model, str(source))

    @property
    def sha256(self) -> str:
        """Hash of some of the weights, by which two encoders of equal sizes are told apart.

        These are the projection, and the positions and the last normalisation of the text model. The towers
        are left out, because the precision of a reused one may differ; see `values`.
        """
        text = self._text_model
        chosen = {**text.embeddings.position_embedding.state_dict(), **text.final_layer_norm.state_dict()}
        digest = hashlib.sha256()
        for weight in (self._projection.weight, *chosen.values()):
            digest.update(weight.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def values(self) -> Values:
        """Up to four values of every weight of both towers, by which encoders are told apart; see
        `cram.values`."""
        vision = some_values(self._vision, VALUES_PER_WEIGHT, "vision.")
        return {**vision, **some_values(self._text_model, VALUES_PER_WEIGHT, "text.")}

    def to(self, device: torch.device | str) -> ClipEncoder:
        """Moves the encoder's own networks; a reused tower stays with its model."""
        self._text_model.to(device)
        self._projection.to(device)
        if not self.reuses_vision_tower:
            self._vision.to(device)
        self._texts.clear()
        return self

    def encode(self, instructions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Query:
        """The query of S samples: one instruction and any number of images each.

        Raises:
            ValueError: If the numbers of instructions and image lists differ, or a feature is not finite.
        """
        if len(instructions) != len(images):
            raise ValueError(
                f"images must be one list an instruction ({len(instructions)}), got {len(images)}"
            )
        v, has_image = self.encode_images(images)
        return Query(self.encode_text(instructions).to(v.device), v, has_image)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text features [S, D_t]; texts seen before come from a cache.

        Raises:
            ValueError: If there is no text, the tokenizer adds no end-of-text token, or a feature is not
                finite.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a non-empty list of strings, got {texts!r}")
        known = {text: self._texts[text] for text in texts if text in self._texts}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, self._run_text(new), strict=True))
            while self._texts and len(self._texts) + len(new) > CACHED_TEXTS:
                self._texts.pop(next(iter(self._texts)))
            self._texts.update((text, known[text]) for text in new[-CACHED_TEXTS:])
        return torch.stack([known[text] for text in texts])

    @torch.no_grad()
    def encode_images(self, images: Sequence[Sequence[Image.Image]]) -> tuple[Tensor, Tensor]:
        """Mean image feature of each sample [S, D_q] (zeros without an image) and whether it has one, bool
        [S].

        Raises:
            ValueError: If a feature is not finite.
        """
        flat = [image for sample in images for image in sample]
        passes = []
        for start in range(0, len(flat), IMAGES_A_PASS):
            some = flat[start : start + IMAGES_A_PASS]
            passes.append(
                self.encode_pixels(self.image_processor(images=some, return_tensors="pt")["pixel_values"])
            )
        nothing = self._projection.weight.new_zeros(0, self.image_dim)
        return mean_per_sample(torch.cat([nothing, *passes]), [len(sample) for sample in images])

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Image features [N, D_q] of preprocessed images [N, 3, H, W]."""
        weight = next(self._vision.parameters())
        # `forward` and not the call: hooks on a reused tower belong to the multimodal model's own passes.
        with without_autocast(weight.device):
            output = self._vision.forward(pixel_values=pixels.to(weight.device, weight.dtype))
        return self.project(output.pooler_output)

    @torch.no_grad()
    def project(self, pooled: Tensor) -> Tensor:
        """Image features [N, D_q] from pooled outputs [N, H] of the vision model.

        Raises:
            ValueError: On a wrong shape or features that are not finite.
        """
        if pooled.dim() != 2 or pooled.shape[1] != self._projection.in_features:
            raise ValueError(f"pooled must be [N, {self._projection.in_features}], got {list(pooled.shape)}")
        weight = self._projection.weight
        with without_autocast(weight.device):
            return _finite(self._projection(pooled.to(weight.device, weight.dtype)), "image features")

    def _run_text(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._projection.weight.device)
        ids = tokens["input_ids"]
        if self._end_id != LEGACY_END_ID and not bool((ids == self._end_id).any(1).all()):
            raise ValueError(
                f"tokenizer must end every text with the end-of-text id {self._end_id}, got none"
            )
        with without_autocast(self._projection.weight.device):
            output = self._text_model(input_ids=ids, attention_mask=tokens["attention_mask"])
        return _finite(output.pooler_output, "text features")


def check_weights(source: Any, report: Mapping[str, Any]) -> None:
    """Refuse a model whose files did not hold exactly its weights; transformers fills gaps at random.

    Args:
        source: Where the model came from.
        report: What `from_pretrained(..., output_loading_info=True)` returns beside the model.

    Raises:
        ValueError: If weights are missing, unknown or of another shape.
    """
    kinds = {
        "missing": "missing_keys",
        "unexpected": "unexpected_keys",
        "of another shape": "mismatched_keys",
    }
    faults = {kind: sorted(map(str, report.get(name) or ())) for kind, name in kinds.items()}
    if any(faults.values()):
        told = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:KEYS_SHOWN])}{', ...' if len(keys) > KEYS_SHOWN else ''}"
            for kind, keys in faults.items()
            if keys
        )
        raise ValueError(f"weights at {source} must be exactly the model's, got {told}")


def mean_per_sample(features: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Means [S, D] of consecutive runs of `counts[s]` rows of features [N, D], and which runs are not empty,
    bool [S].

    Raises:
        ValueError: If the counts do not add up to N.
    """
    if sum(counts) != features.shape[0]:
        raise ValueError(f"images must be {sum(counts)} in all, got {features.shape[0]} features")
    # From lists: the length of `repeat_interleave` depends on values, which torch.compile cannot trace.
    sizes = torch.tensor(counts, device=features.device)
    owners = [sample for sample, count in enumerate(counts) for _ in range(count)]
    sample = torch.tensor(owners, dtype=torch.int64, device=features.device)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, sample, features)
    return sums / sizes.clamp(min=1)[:, None], sizes > 0


def _finite(features: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{what} must be finite, got NaN or Inf")
    return features


def _equal_tower(vision: nn.Module, model: nn.Module | None) -> Any:
    """The model's vision tower if it is the same network as CLIP's vision model in the tower's dtype, else
    None."""
    if model is None or not family_of(model).clip_tower:
        return None
    tower: Any = model.get_submodule(family_of(model).vision_tower)
    shape = ("hidden_size", "num_attention_heads", "image_size", "patch_size", "hidden_act", "layer_norm_eps")
    own: Any = vision.config
    if any(getattr(tower.config, name, None) != getattr(own, name, None) for name in shape):
        return None
    # By parameters: a state dict of some quantised models changes them, and weights that are quantised or
    # offloaded cannot be compared.
    ours, theirs = dict(vision.named_parameters()), dict(tower.named_parameters())
    same = ours.keys() == theirs.keys() and all(
        type(value) is nn.Parameter
        and not value.is_meta
        and ours[key].shape == value.shape
        and torch.equal(ours[key].to(value.device, value.dtype), value)
        for key, value in theirs.items()
    )
    return tower if same else None
