"""Mutants that compute the same as the source, each with the reason."""

from __future__ import annotations

import re

# Changes that compute the same wherever they stand, as names of mutants tell them.
KINDS: dict[re.Pattern[str], str] = {
    re.compile(r": (min|max|torch\.promote_types)\((.+), (.+?)(|, .+)\) -> \1\(\3, \2\4\)( \(\d+\))?$"): (
        "The smallest, the largest or the common type of some, whatever their order."
    ),
}
EQUIVALENTS: dict[str, str] = {
    "cram/atomic.py write_json: indent=2 -> indent=3": "The spaces of a JSON file carry no value.",
    "cram/learning/answers/predict.py _routing: route.gates.transpose(0, 1) -> route.gates.transpose(1, 0)": (
        "The two exchanged dimensions, whatever their order."
    ),
    "cram/methods/many.py ManyMethod.release: self.inputs.release() -> pass": (
        "Its hooks are on the adapted linears, which detaching takes out of the model."
    ),
    "cram/methods/parts/separable.py SeparableGating._rows: experts.trained or self.fusion.requires_grad -> "
    "experts.trained and self.fusion.requires_grad": "The method trains experts and fusion, or neither.",
    "cram/methods/parts/task/mixing.py MixingRouter._gather: self.inputs += x.sum(0) -> "
    "self.inputs -= x.sum(0)": "Both that read the sum take products of two of it.",
    "cram/bundle/packs.py _empty_pack: ranks[0] -> ranks[1]": (
        "A description with a shared A is refused unless its experts have equal ranks."
    ),
    "cram/bundle/tensors.py _is_entry: return False -> return None": "Its only caller asks for truth alone.",
    "cram/streams/pictures.py _rgb: -1 -> -2": "No value of 16 bits is negative.",
    "cram_kernels/expert_lora/outputs.py forward_outputs: not order.base_last and order.chunk is None -> "
    "order.base_last and order.chunk is None": (
        "Both branches compute the same sums; the order of their launches is a matter of speed."
    ),
    "cram/methods/olora.py OLoraMethod.extra_loss: experts is not None and experts.trained_a is not None -> "
    "experts is not None or experts.trained_a is not None": (
        "An assertion for the types: with two experts every module has a pack."
    ),
    "cram/streams/pictures.py module: 1 << 20 -> 1 << 21": (
        "What a picture's file may have beside its pixels: any bound far above a real one does."
    ),
    "cram/streams/pictures.py module: 1 << 20 -> 2 << 20": (
        "What a picture's file may have beside its pixels: any bound far above a real one does."
    ),
    "cram/streams/readers.py module: 4 << 30 -> 4 << 31": (
        "What a file of samples may have in bytes: any bound far above a real one does."
    ),
    "cram/bundle/records.py module: 16 << 20 -> 17 << 20": (
        "What a record may have in bytes: any bound far above a real one does."
    ),
    "cram/learning/answers/generate.py _routed_rows: route is not None and route.groups is not None -> "
    "route is not None or route.groups is not None": (
        "An assertion for the types: where it could fail, the lines below it fail as well."
    ),
    "cram/model/frozen/forward.py _parts: trained_a is None or trained_b is None -> trained_a is None and "
    "trained_b is None": "The two parameters are made together, or neither is.",
    "cram_kernels/centroid_gates/api.py _versions: return () -> return None": (
        "Under the compiler it is compared with itself alone."
    ),
    "cram_kernels/centroid_gates/reference.py _finite: values.where(values.isfinite(), 0.0) -> "
    "values.where(values.isfinite(), 1.0)": (
        "Any number does: it meets gradients of 0 or NaN alone, or shifts query and centroids alike."
    ),
    "cram_kernels/packing.py PackedExperts._alias: self.trained_a is not None and self.trained_b is not None "
    "-> self.trained_a is not None or self.trained_b is not None": (
        "The two parameters are made together, or neither is."
    ),
}


def reason(name: str) -> str | None:
    """Why a mutant of that name computes the same as the source; None if nothing says so."""
    kinds = (text for kind, text in KINDS.items() if kind.search(name))
    return EQUIVALENTS.get(name) or next(kinds, None)
