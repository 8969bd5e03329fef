"""One Triton kernel launch as data: what runs, what a compiler needs, what it costs.

A launcher returns a `Launch`; running it, compiling it ahead of time for an architecture without a GPU, and
computing how far it is from the hardware's floor all start from that one description. Needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its grid, arguments, compile options and cost.

    Args:
        kernel: The `triton.jit` function.
        grid: Programs along up to three axes; a launch with an empty axis does nothing.
        arguments: Runtime arguments by name, in the kernel's order: tensors, integers, floats, None.
        constants: Compile-time arguments by name, in the kernel's order behind `arguments`.
        warps: Warps a program.
        stages: Depth of the software pipeline.
        cost: Returns `moved_bytes` and `flops`; called only where somebody asks.
        late: Names of the arguments that the kernel in front writes while this one starts (programmatic
            dependent launch); this kernel must wait for it before it reads them. Empty: it starts when that
            one has ended. Only architectures from sm_90 on have it.
        steps: How often a program passes the kernel's loop; 1 for a kernel without one.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    cost: Callable[[], tuple[int, int]]
    late: tuple[str, ...] = ()
    steps: int = 1

    @property
    def moved_bytes(self) -> int:
        """Least bytes through device memory: every input read once, every output written once."""
        return self.cost()[0]

    @property
    def flops(self) -> int:
        """Floating-point operations on tensor cores (two a multiply-add), tile padding left out."""
        return self.cost()[1]

    @property
    def dependent(self) -> bool:
        """Whether this kernel starts before the one in front has ended."""
        return bool(self.late)

    def run(self) -> None:
        """Launch on the current stream of the tensors' device.

        What Triton's JIT does for each call takes the host five times as long as the launch itself. It is
        asked once for each kind of arguments; from then on the compiled kernel is called directly.
        """
        if 0 in self.grid:
            return
        if interpreted(self.kernel) or hooked():
            self._compile_and_launch()
            return
        driver = _runtime()[0].active
        device = driver.get_current_device()
        kinds = map(_kind, self.arguments.values(), _free(self.kernel))
        key = (self.kernel, device, self.warps, self.stages, self.late, *self.constants.values(), *kinds)
        found = _COMPILED.get(key)
        if found is None:
            _remember(key, self._compile_and_launch(), (*self.arguments, *self.constants))
            return
        launch, function, metadata = found
        x, y, z, *_ = (*self.grid, 1, 1)
        values = (*self.arguments.values(), *self.constants.values())
        launch(x, y, z, driver.get_current_stream(device), function, metadata, None, None, None, *values)

    def prepared(self, tensors: Sequence[Tensor | None]) -> Prepared | None:
        """Compile without launching; return the launch as a function of `tensors`.

        Args:
            tensors: All tensors among the arguments, by identity; None holds the place of an absent one.

        Returns:
            The launch, or None where the interpreter runs or an argument is not among `tensors`.
        """
        if interpreted(self.kernel):
            return None
        values = (*self.arguments.values(), *self.constants.values())
        places: list[tuple[int, Any]] = []
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                places.append((place, _index(value, tensors)))
            elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                places.append((place, tuple([_index(item, tensors) for item in value])))
        if any(index is None or (isinstance(index, tuple) and None in index) for _, index in places):
            return None
        compiled = self.kernel.run(
            grid=self.grid, warmup=True, **self.arguments, **self.constants, **self._options()
        )
        _check_order(self.kernel, (*self.arguments, *self.constants))
        blank = [
            None if any(place == at for at, _ in places) else value for place, value in enumerate(values)
        ]
        return Prepared(
            compiled.run, compiled.function, compiled.packed_metadata, (*self.grid, 1, 1)[:3], blank, places
        )

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        if self.late:
            options["launch_pdl"] = True
        return options

    def _compile_and_launch(self) -> Any:
        """Launch through Triton, which compiles what it does not have; return the compiled kernel."""
        return self.kernel[self.grid](**self.arguments, **self.constants, **self._options())

    def floor_us(self, bytes_per_us: float, flops_per_us: float) -> float:
        """Return the least time in microseconds at a copy bandwidth and a matrix-product rate."""
        moved_bytes, flops = self.cost()
        return max(moved_bytes / bytes_per_us, flops / flops_per_us)


class Prepared:
    """A compiled kernel of which all arguments but the tensors are known."""

    __slots__ = ("_blank", "_function", "_grid", "_launch", "_metadata", "_places")

    def __init__(
        self,
        launch: Callable[..., None],
        function: Any,
        metadata: Any,
        grid: tuple[int, ...],
        blank: list[Any],
        places: list[tuple[int, Any]],
    ) -> None:
        self._launch, self._function, self._metadata = launch, function, metadata
        self._grid, self._blank, self._places = grid, blank, places

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Launch on the current stream; shapes, dtypes and alignments are those of the first tensors."""
        values = self._blank.copy()
        for place, index in self._places:
            values[place] = tensors[index] if index.__class__ is int else tuple([tensors[i] for i in index])
        driver = _runtime()[0].active
        stream = driver.get_current_stream(driver.get_current_device())
        self._launch(*self._grid, stream, self._function, self._metadata, None, None, None, *values)


# What a call is made of -> the function that launches, the loaded kernel, and what Triton knows of it.
_COMPILED: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}
_MOST_KINDS = 1 << 14


def _kind(value: Any, free: bool) -> Any:
    """Return what the JIT compiles for: type, and unless `free` which numbers and addresses divide by 16."""
    kind = value.__class__
    if kind is int:
        return value >> 31 if free else (value & 15 == 0, value == 1, value >> 31)
    if value is None or kind is float:
        return kind
    if isinstance(value, tuple):
        return tuple([_kind(item, False) for item in value])
    return value.dtype if free else (value.dtype, value.data_ptr() & 15 == 0)


@cache
def _free(kernel: Any) -> tuple[bool, ...]:
    """Return for each of a kernel's arguments whether the JIT ignores its value."""
    return tuple(parameter.do_not_specialize for parameter in kernel.params)


def _remember(key: tuple[Any, ...], compiled: Any, names: tuple[str, ...]) -> None:
    """Keep a compiled kernel for calls of the same kind."""
    _check_order(key[0], names)
    if len(_COMPILED) >= _MOST_KINDS:
        _COMPILED.clear()
    _COMPILED[key] = compiled.run, compiled.function, compiled.packed_metadata


def _check_order(kernel: Any, names: tuple[str, ...]) -> None:
    if names != tuple(kernel.arg_names):
        raise RuntimeError(
            f"arguments must come in the kernel's order {tuple(kernel.arg_names)}, got {names}"
        )


def _index(tensor: Tensor, tensors: Sequence[Tensor | None]) -> int | None:
    return next((i for i, each in enumerate(tensors) if each is tensor), None)


def interpreted(kernel: Any) -> bool:
    """Whether a kernel runs in Triton's interpreter, which compiles nothing."""
    return not hasattr(kernel, "device_caches")


def hooked() -> bool:
    """Whether a profiler wants to hear of each launch."""
    hooks = _runtime()[1]
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


@cache
def _runtime() -> tuple[Any, Any]:
    """Return Triton's driver and its hooks, loaded where the first kernel runs."""
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


def cdiv(size: int, block: int) -> int:
    """Return how many blocks cover `size`. Triton's own, on the host, costs a microsecond a call."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """Return the least power of two that is not less than `size` (1 or more)."""
    return 1 << (size - 1).bit_length()


def nbytes(*tensors: Tensor | None) -> int:
    """Return the bytes of the tensors' elements; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which launches go to the tensor's device; does nothing where they already do."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def architecture(device: torch.device) -> int:
    """Return the compute capability of a CUDA device as 10 * major + minor; 90 under the interpreter."""
    return _capability(device.index) if device.type == "cuda" else 90


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
