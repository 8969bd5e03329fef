"""transformers' ModelTesterMixin on the tiny models of `tests/cram/factories.py`, plain or with experts.

`tests/peers/run.py` copies this file beside the unpacked tests of transformers and runs it there. PEER_MODE:
"plain", "fixed" (every forward uses one expert) or "automatic" (every forward makes its route). The classes
attach a model at its first forward, as a user does after loading.
"""

from __future__ import annotations

import importlib.util
import os
import unittest
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from transformers import (
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

import cram
from tests import test_modeling_common

MODE = os.environ["PEER_MODE"]
ROWS = 2


def load(path: str, name: str) -> Any:
    """A module of our own tests by its file, because the package `tests` is transformers' here."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


factories = load(os.environ["PEER_FACTORIES"], "factories")


class Attaching:
    """Attaches a model with one expert when it is first used, and routes it as MODE says."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward with the expert."""
        with self._routed():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generation with the expert."""
        with self._routed():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _routed(self) -> Any:
        model: Any = self
        if not hasattr(model, "cram"):
            attach(model)
        return model.cram.forced("one") if MODE == "fixed" else nullcontext()


def attach(model: Any) -> None:
    """One expert in one group, with a processor as a checkpoint of the family has."""
    name = model.config.model_type
    processor = factories.llava_processor() if name == "llava" else checkpoint_processor(name)
    handle = cram.attach(model, cram.CramConfig(dropout=0.0), factories.clip_encoder(), processor)
    query = handle.encode(["What is it?"], [[factories.image(0)]])
    handle.method.router.groups.observe("one", query.text)
    weights = factories.expert_weights(handle, 0)
    handle.method.add_expert("one", weights, 0, query.image[0], trained=False)


def checkpoint_processor(name: str) -> Any:
    """The processor of the tiny checkpoint of a family."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"height": factories.IMAGE_SIZE, "width": factories.IMAGE_SIZE}
    tiles = name == "internvl"
    images = GotOcr2ImageProcessorPil(size=size) if tiles else Qwen2VLImageProcessorPil(patch_size=4)
    return SimpleNamespace(tokenizer=factories.tokenizer(), image_processor=images)


class Tester:
    """What the mixin asks of a model tester."""

    batch_size = ROWS
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32

    def __init__(self, family: str) -> None:
        self.family = family
        self.config = factories.MODELS[family]().config
        self.seq_length = self.inputs()["input_ids"].shape[1]

    def inputs(self) -> dict[str, Any]:
        """Prompts with a picture each."""
        return factories.inputs(self.family, rows=ROWS)

    def get_config(self) -> Any:
        """The configuration."""
        return type(self.config).from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """Configuration and inputs."""
        return self.get_config(), self.inputs()

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


def family_test(family: str, plain: Any) -> type:
    """The test class of one family."""
    model_class = plain
    if MODE != "plain":
        model_class = type(plain.__name__, (Attaching, plain), {"__module__": plain.__module__})

    class FamilyTest(test_modeling_common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)
        _is_composite = True
        test_torch_exportable = False

        def setUp(self) -> None:
            self.model_tester = Tester(family)

    FamilyTest.__name__ = FamilyTest.__qualname__ = f"{family}_Test"
    return FamilyTest


LlavaTest = family_test("llava", LlavaForConditionalGeneration)
Qwen25Test = family_test("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration)
Qwen3Test = family_test("qwen3_vl", Qwen3VLForConditionalGeneration)
InternTest = family_test("internvl", InternVLForConditionalGeneration)
