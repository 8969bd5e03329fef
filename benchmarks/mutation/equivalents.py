"""Mutants that compute the same as the source, each with the reason."""

from __future__ import annotations

SMALLER = "The smaller of two numbers, whatever their order."

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
    "cram/routing/groups.py InstructionGroups._decide: min(2, len(self)) -> min(len(self), 2)": SMALLER,
    "cram/model/factors.py new_lora: min(rank, linear.in_features, linear.out_features) -> "
    "min(linear.in_features, rank, linear.out_features)": SMALLER,
    "cram/scoring/boxes.py overlap: max(left[0], right[0]) -> max(right[0], left[0])": (
        "The larger of two numbers, whatever their order."
    ),
    "cram/scoring/scorers.py _same_number: max(1.0, abs(expected)) -> max(abs(expected), 1.0)": (
        "The larger of two numbers, whatever their order."
    ),
    "cram/streams/pictures.py upright_rgb: -1 -> -2": "No value of 16 bits is negative.",
    "cram_kernels/expert_lora/outputs.py forward_outputs: not order.base_last and order.chunk is None -> "
    "order.base_last and order.chunk is None": (
        "Both branches compute the same sums; the order of their launches is a matter of speed."
    ),
    "cram/methods/olora.py OLoraMethod.extra_loss: experts is not None and experts.trained_a is not None -> "
    "experts is not None or experts.trained_a is not None": (
        "An assertion for the types: with two experts every module has a pack."
    ),
    "cram/streams/types.py module: 1 << 20 -> 1 << 21": (
        "What a picture's file may have beside its pixels: any bound far above a real one does."
    ),
    "cram/bundle/records.py module: 16 << 20 -> 17 << 20": (
        "What a record may have in bytes: any bound far above a real one does."
    ),
    "cram_kernels/orthogonality/pooling.py visual_mean: torch.promote_types(x.dtype, torch.float32) -> "
    "torch.promote_types(torch.float32, x.dtype)": "The common type of two types, whatever their order.",
    "cram_kernels/packing.py PackedExperts._alias: self.trained_a is not None and self.trained_b is not None "
    "-> self.trained_a is not None or self.trained_b is not None": (
        "The two parameters are made together, or neither is."
    ),
}
