"""The gates of the running requests on the device, at addresses that never change.

    table [L, rows, R]     row 0: zeros, for tokens without an adapter; row 1: ones, for plain adapters;
                           every other row: the gates of one request, written once
    index [tokens]         the row of each token of the step, written before each forward

A layer multiplies its shrunk activations [.., T, R] by table[l, index[:T]]. Memory is L (requests + 2) R
floats: 17 MB for 32 layers, 256 requests and R = 512. Captured graphs read both tensors, so that a replay
sees the gates of its own step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cram.serve.vllm.group import GateGroup, Gates

NONE, ONES, FIRST = 0, 1, 2


class GateTable:
    """Gates of the requests of one worker.

    Args:
        layers: L.
        max_requests: Requests in a step at most.
        max_tokens: Tokens in a step at most.
        rank: R of a slot.
        device: Where the tensors lie.

    Attributes:
        table: [L, rows, R] float32.
        index: [max_tokens] int64.
        acting: False if the multiplication changes nothing in this step. Only a CPU, on which vLLM captures
            nothing, may act on it.
        idle: True if no token of the step has an adapter. Likewise for a CPU alone.
    """

    def __init__(
        self, layers: int, max_requests: int, max_tokens: int, rank: int, device: torch.device | str
    ) -> None:
        self.table = torch.zeros(layers, max_requests + FIRST, rank, device=device)
        self.table[:, ONES] = 1.0
        self.index = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.acting, self.idle = True, False
        self._on_cpu = self.table.device.type == "cpu"
        self._known: dict[str, tuple[GateGroup, Gates] | None] = {}
        self._rows: dict[str, int] = {}
        self._free = list(range(max_requests + FIRST - 1, FIRST - 1, -1))

    @property
    def layers(self) -> int:
        """L."""
        return self.table.shape[0]

    def remember(self, request: str, gated: tuple[GateGroup, Gates] | None) -> None:
        """Take a request and its gates; None stands for no adapter or a plain one."""
        self.forget(request)
        self._known[request] = gated

    def forget(self, request: str) -> None:
        """Drop a request."""
        self._known.pop(request, None)
        self._release(request)

    def prepare(
        self, requests: Sequence[str] | None, counts: NDArray[np.integer] | None, adapters: Sequence[int]
    ) -> None:
        """Write the gates that the step is the first to need, and the row of every token.

        Args:
            requests: The step's requests in the order of their tokens, or None in a dummy run.
            counts: Tokens of each request.
            adapters: Adapter of each token, 0 for none.

        Raises:
            RuntimeError: If a request was not remembered.
        """
        ids = np.asarray(adapters, dtype=np.int64)
        if requests is None or counts is None:
            rows: NDArray[np.int64] = np.full(ids.shape, ONES)
        else:
            busy = set(requests)
            each = np.array([self._row(request, busy) for request in requests], dtype=np.int64)
            rows = np.repeat(each, counts[: len(each)])
        rows = np.where(ids == 0, NONE, rows).astype(np.int64)
        self.idle = self._on_cpu and not ids.any()
        self.acting = not self._on_cpu or bool(not self.idle and (rows != ONES).any())
        self.index[: len(rows)].copy_(self._host(torch.from_numpy(rows)), non_blocking=True)

    def scale(self, shrunk: Tensor | Sequence[Tensor], layer: int) -> None:
        """Multiply shrunk activations by the gates of their tokens, in place.

        Args:
            shrunk: [slices, T, R], or a sequence of [T, R].
            layer: The decoder layer.
        """
        buffers = (shrunk,) if isinstance(shrunk, Tensor) else shrunk
        gates = self.table[layer].index_select(0, self.index[: buffers[0].shape[-2]])
        for buffer in buffers:
            buffer.mul_(gates)

    def _row(self, request: str, busy: set[str]) -> int:
        if request not in self._known:
            raise RuntimeError(
                f"cram: request {request} must be scheduled before it runs, got an unknown one"
            )
        gated = self._known[request]
        if gated is None:
            return ONES
        if request not in self._rows:
            if not self._free:
                # More requests have started than fit a step: the others were preempted and can wait.
                self._release(next(other for other in self._rows if other not in busy))
            row = self._free.pop()
            group, gates = gated
            values = self._host(torch.from_numpy(group.rows(gates)))
            self.table[:, row, : values.shape[1]].copy_(values, non_blocking=True)
            self.table[:, row, values.shape[1] :].zero_()
            self._rows[request] = row
        return self._rows[request]

    def _release(self, request: str) -> None:
        row = self._rows.pop(request, None)
        if row is not None:
            self._free.append(row)

    def _host(self, values: Tensor) -> Tensor:
        return values if self._on_cpu else values.pin_memory()
