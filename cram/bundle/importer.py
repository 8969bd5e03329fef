"""A LoRA that PEFT has written, of any rank per module, becomes an expert.

PEFT adds (alpha / r) B A to a linear, an expert of this package `scale` B A, so B is multiplied by
alpha / (r scale); the product is exact where that factor is a power of two. With rank-stabilised LoRA PEFT
adds alpha / sqrt(r). Names of modules follow transformers 5, in which every family keeps its language model
at `model.language_model`; older names are translated. What an expert cannot carry is refused by name, and so
is a tensor that finds no linear: a LoRA that is read in part would be silently wrong.

`fan_in_fan_out` says how a base layer stores its weight. It does not change A or B, and PEFT itself ignores
it for `nn.Linear`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cram.atomic import read_json
from cram.bundle.format import check_expert_name
from cram.bundle.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from cram.methods.parts.grouped import GroupedMethod
from cram.model.attached import AttachedModel
from cram.model.factors import Factors, Sized
from cram.routing.means import CentroidMean
from cram.routing.query import Query

if TYPE_CHECKING:
    from PIL import Image

# Fields of `adapter_config.json` that change nothing of what A, B and the scale say.
_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "ephemeral_gpu_offload",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
# Field -> values beside "absent" that leave the base model and the LoRA as they are. Any other field must be
# null, false or empty: `use_dora`, `modules_to_save`, `lora_bias`, `layer_replication` and those to come.
# PiSSA, OLoRA, CorDA and LoftQ change the base weights when they start.
_INERT: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_WRAPPED = re.compile(r"^(?:base_model\.model\.)+")
_LAYER = re.compile(r"(.*?)\.?layers\.(\d+\..+)")
# What stands before `layers` in the language models of this and of older versions of transformers.
_LANGUAGE_MODELS = {
    "language_model",
    "language_model.model",
    "model",
    "model.language_model",
    "model.language_model.model",
    "model.model",
}
DTYPES = ("F32", "F16", "BF16")


def read_lora(folder: str | Path, modules: Mapping[str, Sized], scale: float) -> dict[str, Factors]:
    """The factors of a PEFT LoRA folder for the modules of an attached model.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        modules: Module path -> adapted linear.
        scale: What the model multiplies B A by.

    Returns:
        Per module path A [r, D_in] and B [D_out, r] in float32; rank 0 where the LoRA has none.

    Raises:
        ValueError: If the folder is no LoRA, has something that an expert cannot carry, does not match the
            modules in whole (the message lists both name sets), or has a wrong shape or value.
    """
    folder = Path(folder)
    config = _read_config(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{folder} must hold {WEIGHTS_FILE}, got none; other formats are not read")
    try:
        with safe_open(file, "pt") as opened:
            return _read_weights(config, opened, modules, scale, file)
    except SafetensorError as error:
        raise ValueError(f"{file} must be a safetensors file, got {error}") from error


def _read_weights(
    config: Mapping[str, Any], opened: Any, modules: Mapping[str, Sized], scale: float, file: Path
) -> dict[str, Factors]:
    """The factors from an opened file; names, shapes and types are checked before a tensor is read."""
    found = _match(list(opened.keys()), modules, file)
    _check_whole(config, found, modules, file)
    scales = {}
    for path, keys in found.items():
        rank, scales[path] = _rank_and_scale(config, keys["A"], path)
        linear = modules[path]
        for side, shape in (("A", [rank, linear.in_features]), ("B", [linear.out_features, rank])):
            _check_slice(opened.get_slice(keys[side]), keys[side], shape, file)
    weights = {}
    for path, linear in modules.items():
        if path not in found:
            weights[path] = (torch.zeros(0, linear.in_features), torch.zeros(linear.out_features, 0))
            continue
        a, b = (_read_tensor(opened, found[path][side], file) for side in "AB")
        weights[path] = (a.float(), (b.double() * (scales[path] / scale)).float())
    return weights


def _check_slice(found: Any, key: str, shape: list[int], file: Path) -> None:
    if found.get_dtype() not in DTYPES:
        raise ValueError(f"{key} in {file} must be one of {DTYPES}, got {found.get_dtype()}")
    if list(found.get_shape()) != shape:
        raise ValueError(f"{key} in {file} must have shape {shape}, got {list(found.get_shape())}")


def _read_tensor(opened: Any, key: str, file: Path) -> Tensor:
    tensor: Tensor = opened.get_tensor(key)
    if not bool(torch.isfinite(tensor).all()):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise ValueError(f"{key} in {file} must be finite, got {bad} NaN or Inf")
    return tensor


def import_lora(
    cram: AttachedModel,
    folder: str | Path,
    name: str,
    instructions: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
) -> int:
    """Append a PEFT LoRA to a model of a method with groups; nothing changes if a check fails.

    The samples stand for the first training batches of a task: they decide the instruction group and move its
    prototype batch by batch, and the expert's centroid is the mean of their images' features.

    Args:
        cram: The model's handle.
        folder: See `read_lora`.
        name: The expert's name; the task's too.
        instructions: The user's turns of some samples of the task, at least one.
        images: The pictures of each sample.

    Returns:
        The expert's group.

    Raises:
        ValueError: As `read_lora`; if the method has no groups, the name is used, or the samples do not
            suffice to route to the expert.
    """
    method = cram.method
    if not isinstance(method, GroupedMethod):
        raise ValueError(f"method must have instruction groups to import a LoRA, got {method.name!r}")
    check_expert_name(name)
    if name in method.router.groups.locks:
        raise ValueError(f"name must be new, got {name!r} of a task that has been learnt")
    weights = read_lora(folder, cram.modules, cram.config.scale)
    cram.check_expert(name, weights)
    if not instructions or len(instructions) != len(images):
        raise ValueError(
            f"samples must be at least one, each with its images, got {len(instructions)} instructions "
            f"and {len(images)} lists of images"
        )
    step = cram.config.batch_size
    starts = range(0, len(instructions), step)
    queries = [cram.encode(instructions[i : i + step], images[i : i + step]) for i in starts]
    centroid = _centroid(queries)
    groups = method.router.groups
    before = groups.export_state()
    for query in queries:
        group = groups.observe(name, query.text)
    groups.lock(name, group)
    if centroid is None and method.router.experts_of(group):
        groups.import_state(*before)
        raise ValueError(f"samples of {name!r} must show images to join the experts of a group, got text")
    method.add_expert(name, weights, group, centroid, trained=False)
    return group


def _centroid(queries: Sequence[Query]) -> Tensor | None:
    mean = CentroidMean()
    for query in queries:
        mean.update(query.image, query.has_image)
    return mean.mean() if mean.count else None


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} must be a PEFT folder with {CONFIG_FILE}, got none")
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"peft_type of {folder / CONFIG_FILE} must be 'LORA', got {kind!r:.100}")
    for field, value in config.items():
        neutral = field in _NEUTRAL or field in _READ or value in _INERT.get(field, ())
        if not neutral and value not in (None, False, [], {}, ""):
            raise ValueError(
                f"{field} of {folder / CONFIG_FILE} cannot be carried by an expert, got {value!r:.200}"
            )
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = config.get(field) or {}
        if not isinstance(config[field], dict) or not all(map(_positive, config[field].values())):
            raise ValueError(f"{field} must give module names numbers, got {config[field]!r:.200}")
    for field, default in (("r", 8), ("lora_alpha", 8)):
        if not _positive(config.setdefault(field, default)):
            raise ValueError(f"{field} must be a positive number, got {config[field]!r:.100}")
    return config


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _match(stored: Sequence[str], modules: Mapping[str, Sized], file: Path) -> dict[str, dict[str, str]]:
    """Module path -> side -> key of its tensor; every tensor must belong to an adapted linear."""
    found: dict[str, dict[str, str]] = {}
    strange, repeated = [], []
    for key in sorted(stored):
        match = _LORA.fullmatch(key)
        path = None if match is None else module_path(match[1])
        if match is None or path is None or path not in modules:
            strange.append(key)
        elif match[2] in found.setdefault(path, {}):
            repeated.append(key)
        else:
            found[path][match[2]] = key
    halves = [path for path, keys in found.items() if len(keys) != 2]
    if strange or repeated or halves or not found:
        raise ValueError(
            f"{file} must hold A and B of the model's adapted linears and nothing else, {len(found)} of "
            f"{len(modules)} linears are named; "
            f"not of these linears {_listed(strange)}; repeated {_listed(repeated)}; "
            f"without A or B {_listed(halves)}; adapted linears {_listed(sorted(modules))}"
        )
    return found


def _check_whole(
    config: Mapping[str, Any], found: Mapping[str, Any], modules: Mapping[str, Sized], file: Path
) -> None:
    """Refuse a file without the factors of a linear that the configuration targets."""
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    targets = config.get("target_modules")
    named = [targets] if isinstance(targets, str) else targets or []
    rule = "|".join(named if isinstance(targets, str) else [rf"(.*\.)?{re.escape(str(t))}" for t in named])
    try:
        lost = [path for path in modules if path not in found and re.fullmatch(rule, path)]
    except re.error as error:
        raise ValueError(f"target_modules must be names or a pattern, got {targets!r:.200}") from error
    if lost:
        raise ValueError(
            f"{file} must hold A and B of every linear that target_modules names, got "
            f"{_listed(sorted(found))} without {_listed(lost)}"
        )


def module_path(name: str) -> str:
    """The path in transformers 5 of a module that a LoRA names, by any of the older prefixes.

    A name outside of a language model's layers (vision tower, projector, head) stays as it is.
    """
    plain = _WRAPPED.sub("", name)
    match = _LAYER.fullmatch(plain)
    if match is None or match[1] not in _LANGUAGE_MODELS:
        return plain
    return f"model.language_model.layers.{match[2]}"


def _rank_and_scale(config: Mapping[str, Any], key: str, path: str) -> tuple[int, float]:
    """Rank and factor of B A of a module, by PEFT's rule for patterns over the stored or the current name."""
    names = (_WRAPPED.sub("", key.rsplit(".lora_A", 1)[0]), path)
    rank = _by_pattern(config["rank_pattern"], names, config["r"])
    alpha = _by_pattern(config["alpha_pattern"], names, config["lora_alpha"])
    if rank != int(rank):
        raise ValueError(f"rank of {path} must be an integer, got {rank}")
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], names: Sequence[str], default: float) -> float:
    for name in names:
        for pattern, value in patterns.items():
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", name)
            except re.error as error:
                raise ValueError(f"pattern must be a regular expression, got {pattern!r:.100}") from error
            if matches:
                return float(value)
    return float(default)


def _listed(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"[{', '.join(names[:limit])}]{more}" if names else "none"
