"""SAME's router of one module: gates by a mean over the sample's tokens, and what a step tells of its inputs.

training     g = softmax(W x) over tokens, mean, without the frozen experts, normalised
otherwise    g = softmax(W x / E), mean, the two largest, normalised                      W: [E, D_in]
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cram.methods.parts.task.curvature import deviations, random_directions, range_basis
from cram.model.factors import initial_rows
from cram.model.gating import LayerGating, token_means
from cram.model.state import ForwardState

COMPONENTS, EVERY = 64, 20  # directions K; steps between two looks at them
DECAY, FREEZE_BELOW, TOP = 0.95, 0.1, 2


class MixingRouter(LayerGating):
    """Router and statistics of one module.

    Attributes:
        weight: W [E, D_in].
        importance: [E], how much input energy each expert gets; goes on over all tasks.
        basis, scales: U [D_in, K] and S [K] of the last task's inputs.
        use: [E], mean gates of the task in training.
        active: [E], 0 for an expert that this task no longer trains.
        new_basis, new_scales: U and S of the task in training, which belong together.
        found_basis: A newer U, whose S the next step finds.
        sums: Over the tokens of a step: probabilities [E], probabilities times |x|^2 [E], and the count.
        inputs, products: Over the same tokens: x [D_in]; x (x . Q) [D_in, K] or (u . x)^2 [1, K].
    """

    gathered = ("sums", "inputs", "products")
    reads_prompts = True
    basis: Tensor
    scales: Tensor
    importance: Tensor
    use: Tensor
    active: Tensor
    new_basis: Tensor
    new_scales: Tensor
    found_basis: Tensor
    sums: Tensor
    inputs: Tensor
    products: Tensor

    def __init__(self, path: str, in_features: int) -> None:
        super().__init__()
        self.path, self.step = path, 0
        count = min(COMPONENTS, in_features)
        self.weight = nn.Parameter(torch.zeros(0, in_features), requires_grad=False)
        self.register_buffer("importance", torch.zeros(0))
        for name in ("basis", "new_basis", "found_basis"):
            self.register_buffer(name, torch.zeros(in_features, count), persistent=name == "basis")
        for name in ("scales", "new_scales"):
            self.register_buffer(name, torch.zeros(count), persistent=name == "scales")
        for name, size in (("use", 0), ("active", 0), ("sums", 1), ("inputs", in_features)):
            self.register_buffer(name, torch.zeros(size), persistent=False)
        self.register_buffer("products", torch.zeros(in_features, count), persistent=False)

    def begin(self, experts: int) -> None:
        """Start a task with a new row for its expert; importance and inputs of the older ones stay."""
        old, device = self.weight.detach(), self.weight.device
        rows = initial_rows(experts - len(old), old.shape[1]).to(device)
        self.weight = nn.Parameter(torch.cat([old, rows]))
        fresh = torch.full((experts - len(old),), 1 / experts, device=device)
        self.importance = torch.cat([self.importance, fresh])
        self.use = torch.full((experts,), 1 / experts, device=device)
        self.active = torch.ones(experts, device=device)
        self.new_basis.zero_()
        self.new_scales.zero_()
        self._clear()

    def finish(self) -> None:
        """End the task; its inputs' directions are those that the next task minds."""
        self.weight.requires_grad_(False)
        self.basis.copy_(self.new_basis)
        self.scales.copy_(self.new_scales)

    def forward(self, x: Tensor, route: Tensor, state: ForwardState) -> Tensor:
        """Return gates [B, E] for x [B, T, D_in]; a decode step has those of its prefill."""
        return state.once(self.path, lambda: self._gates(x, state))

    def _gates(self, x: Tensor, state: ForwardState) -> Tensor:
        mask = state.mask
        logits = F.linear(x, self.weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
        if not (self.training and self.weight.requires_grad):
            means = token_means((logits / len(self.weight)).softmax(-1), mask)
            values, index = means.topk(min(TOP, means.shape[1]), -1)
            kept = torch.zeros_like(means).scatter(-1, index, values)
            return kept / kept.sum(-1, keepdim=True)
        shares = logits.softmax(-1)
        if torch.is_grad_enabled() and state.counts(self.path):
            self._gather(x.detach(), shares.detach(), mask)
        means = token_means(shares, mask) * self.active
        return means / means.sum(-1, keepdim=True)

    @torch.no_grad()
    def _gather(self, x: Tensor, shares: Tensor, mask: Tensor | None) -> None:
        """Add a forward's tokens to the sums of the step."""
        real = slice(None) if mask is None else mask.to(x.device).flatten()
        x, shares = x.flatten(0, 1)[real].float(), shares.flatten(0, 1)[real].float()
        energy = x.square().sum(1)
        self.sums += torch.cat([shares.sum(0), energy @ shares, shares.new_tensor([len(x)])])
        if self.step % EVERY > 1:
            return
        self.inputs += x.sum(0)
        if self.step % EVERY == 0:
            self.products += x.mT @ (x @ self._directions())
        else:
            self.products[0] += (x @ self.found_basis).square().sum(0)

    @torch.no_grad()
    def end_step(self) -> None:
        """Take up the sums of a step over all processes, and decide which experts stay active."""
        for summed in (self.sums, self.inputs, self.products):
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(summed)
        experts, tokens = len(self.weight), self.sums[-1]
        if float(tokens):
            shares, energy = self.sums[:-1].view(2, experts) / tokens
            self._look(tokens)
            self.use.lerp_(shares, 1 - DECAY)
            self.importance.lerp_(energy, 1 - DECAY)
            self._freeze()
        self.step += 1
        self._clear(keep_step=True)

    def _look(self, tokens: Tensor) -> None:
        if self.step % EVERY == 0:
            # Copied: a checkpoint gives back the values and not how they lie in memory, which sums depend on.
            self.found_basis.copy_(range_basis(self.products, self.inputs, tokens, self._directions()))
        elif self.step % EVERY == 1:
            self.new_basis.copy_(self.found_basis)
            self.new_scales.copy_(deviations(self.products[0], self.inputs @ self.new_basis, tokens))

    def _freeze(self) -> None:
        """Leave out experts that matter more than they are used, unless all older ones are out already."""
        if not self.active[:-1].any():
            return
        low = spread(self.use) - spread(self.importance) < FREEZE_BELOW
        low[-1] = False
        self.active = (~low).float()

    def _directions(self) -> Tensor:
        return random_directions(self.basis.shape[0], self.basis.shape[1], self.step).to(self.basis)

    def _clear(self, keep_step: bool = False) -> None:
        self.sums = self.use.new_zeros(2 * len(self.use) + 1)
        self.inputs.zero_()
        self.products.zero_()
        self.step = self.step if keep_step else 0


def spread(values: Tensor) -> Tensor:
    """Values moved and scaled to 0 .. 1; zeros where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low + 1e-8) if high > low else torch.zeros_like(values)
