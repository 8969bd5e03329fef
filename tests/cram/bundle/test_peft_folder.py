"""The configuration of an expert's folder: what PEFT reads, and how large it may be."""

from __future__ import annotations

import json

from cram.bundle.peft_folder import adapter_config, max_config_bytes


def test_alpha_is_the_scale_times_the_rank_of_each_module() -> None:
    found = adapter_config({"a": 4, "b": 4, "c": 9, "d": 0}, 2.5, "base")
    assert (found["r"], found["lora_alpha"], found["base_model_name_or_path"]) == (4, 10, "base")
    assert found["rank_pattern"] == {"a": 4, "b": 4, "c": 9}
    assert found["alpha_pattern"] == {"a": 10, "b": 10, "c": 22.5}
    assert (empty := adapter_config({"d": 0}, 2.5, None))["r"] == 1 and empty["lora_alpha"] == 2.5


def test_a_configuration_of_many_modules_fits_with_indentation_and_a_long_base_name() -> None:
    ranks = {f"model.language_model.layers.{i}.self_attn.q_proj": 9 for i in range(400)}
    plain = len(json.dumps(adapter_config(ranks, 2.0, None)))
    limit = max_config_bytes(ranks, 2.0)
    assert len(json.dumps(adapter_config(ranks, 2.0, "b" * 4000), indent=2)) < limit < 2 * plain + 10_000
