"""One key-value allocation per layer for all rows of a batch.

Every row ends at the same column, so that all rows write one column per step; a row's tokens stand in the
columns [start, end), and what lies left of them is padding:

    row 0      . . . k k k k k |
    row 1      k k k k k k k k |          first = 0, end = 8
    row 2      . . . . . . k k |

A row joins by a copy of its prefill into the columns before `end`. A row leaves by a copy of the last row
into its place. A step copies one column; a cache that concatenates would copy all of them.

Memory may run out while rows are moved or the tensors grow:

    grow    one tensor after the other, so that no second allocation of all layers is needed. What all tensors
            have in common counts as room: those that have grown before an error hold the rows as well.
    move    in place, through one buffer of the size of a tensor's used part (one for each shape, type and
            device). It is made before the first write; from there on nothing is allocated.

An error between two writes of a move leaves the rows at different columns; `is_whole` tells of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_COLUMNS = 64


class RowLayer(CacheLayerMixin):
    """Keys and values [R, H, C, D] of one decoder layer; the first rows and some columns are in use."""

    is_sliding = False

    def __init__(self, cache: RowCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._cache = cache
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer has its tensors from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one column of all rows; returns the columns in use, the new one included."""
        rows, end = len(self._cache.starts), self._cache.end
        assert self.keys is not None and self.values is not None
        # A slice behind the last column is empty, and a write to it is lost without an error.
        assert end < min(self.keys.shape[2], self.values.shape[2]), "every layer must have room for a column"
        self.keys[:rows, :, end : end + 1] = key_states
        self.values[:rows, :, end : end + 1] = value_states
        used = (slice(rows), slice(None), slice(self._cache.first, end + 1))
        return self.keys[used], self.values[used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query sees, and the index of the first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self._cache.end - self._cache.first

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class RowCache(Cache):
    """The cache of a batch whose rows come and go.

    Attributes:
        starts: First column of every row.
        end: The column that the next step writes.
        is_whole: Whether the tensors hold every row where `starts` and `end` say; once False, the cache is of
            no use.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.starts: list[int] = []
        self.end = 0
        self.is_whole = True

    @property
    def first(self) -> int:
        """The first column that any row uses."""
        return min(self.starts, default=self.end)

    @property
    def num_bytes(self) -> int:
        """Bytes of the allocation."""
        return sum(each.numel() * each.element_size() for each in self._tensors())

    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [self.end - start for start in self.starts]

    def mask(self, device: torch.device) -> Tensor:
        """Which columns every row sees in the next step, its own new one included; int64 [B, columns]."""
        columns = torch.arange(self.first, self.end + 1, device=device)
        return (columns >= torch.tensor(self.starts, device=device)[:, None]).long()

    def advance(self) -> None:
        """Count the column that a step has written."""
        self.end += 1

    def reserve_column(self) -> None:
        """Make room for the column of the next step: move the rows to the left, or else grow."""
        capacity = self._columns()
        if self.end < capacity:
            return
        if self.first >= max(1, capacity // 4):
            self._move(-self.first)
        else:
            self._allocate(self._rows(), 2 * capacity)

    def join(self, prefill: Cache, copies: int) -> None:
        """Append rows that continue the one row of `prefill`.

        An error leaves the rows before as they were, unless `is_whole` is False afterwards.

        Raises:
            NotImplementedError: If a layer of the prefill does not hold the whole prompt (sliding windows).
        """
        length = int(prefill.get_seq_length())
        layers: Any = prefill.layers
        for layer in layers:
            if layer.keys is None or layer.keys.shape[:1] != (1,) or layer.keys.shape[2] != length:
                raise NotImplementedError("every layer must hold the whole prompt, got a sliding window")
        self._fit(layers, len(self.starts) + copies, length)
        rows, start = slice(len(self.starts), len(self.starts) + copies), self.end - length
        for own, layer in zip(self.layers, layers, strict=True):
            for target, source in ((own.keys, layer.keys), (own.values, layer.values)):
                # A masked column counts 0 times its value, and 0 times NaN of an earlier row is NaN.
                target[rows, :, :start] = 0
                target[rows, :, start : self.end] = source
        self.starts += [start] * copies

    def drop(self, row: int) -> None:
        """Remove one row; the last row takes its place."""
        last = len(self.starts) - 1
        self.is_whole = False
        if row != last:
            for tensor in self._tensors():
                tensor[row, :, : self.end] = tensor[last, :, : self.end]
        self.starts[row] = self.starts[last]
        self.starts.pop()
        self.is_whole = True

    def _fit(self, layers: Any, rows: int, length: int) -> None:
        """Make room for `rows` rows and a prompt of `length` tokens that ends at `end`."""
        if not self.layers:
            made = []
            for layer in layers:
                shape = (rows, layer.keys.shape[1], max(FIRST_COLUMNS, length + 1))
                keys = layer.keys.new_zeros(*shape, layer.keys.shape[3])
                values = layer.values.new_zeros(*shape, layer.values.shape[3])
                made.append(RowLayer(self, keys, values))
            self.layers.extend(made)
        if self.starts:
            self.reserve_column()
        else:
            self.end = length
        columns = self._columns()
        if rows > self._rows() or length >= columns:
            more = max(2 * columns, length + 1) if length >= columns else columns
            self._allocate(max(rows, min(2 * self._rows(), rows + 8)), more)
        if length > self.end:
            self._move(length - self.end)

    def _move(self, by: int) -> None:
        """Move all rows by some columns; negative is to the left."""
        first, end, rows = self.first, self.end, len(self.starts)
        tensors = self._tensors()
        used = [tensor[:rows, :, first:end] for tensor in tensors]
        kinds = [(each.shape, each.dtype, each.device) for each in used]
        buffers = {
            kind: each.new_empty(each.shape) for kind, each in dict(zip(kinds, used, strict=True)).items()
        }
        self.is_whole = False
        for tensor, old, kind in zip(tensors, used, kinds, strict=True):
            tensor[:rows, :, first + by : end + by] = buffers[kind].copy_(old)
            if by > 0:
                tensor[:rows, :, first : first + by] = 0
        self.starts = [start + by for start in self.starts]
        self.end += by
        self.is_whole = True

    def _allocate(self, rows: int, columns: int) -> None:
        """Grow all tensors to a size that is no smaller; what is in use is copied."""
        used = (slice(len(self.starts)), slice(None), slice(self.end if self.starts else 0))
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                size = max(rows, len(old)), old.shape[1], max(columns, old.shape[2]), old.shape[3]
                if size == old.shape:
                    continue
                new = old.new_zeros(size)
                new[used] = old[used]
                setattr(layer, name, new)

    def _tensors(self) -> list[Any]:
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    def _rows(self) -> int:
        return min(len(tensor) for tensor in self._tensors())

    def _columns(self) -> int:
        return min(int(tensor.shape[2]) for tensor in self._tensors())
