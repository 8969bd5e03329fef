"""The most memory that a piece of work held."""

from __future__ import annotations

from pathlib import Path

import torch

# Linux forgets the process's peak when 5 is written to the one, and tells it in the other.
_FORGET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Counts from its creation on: the process's memory for work on a CPU, its tensors for work on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = device.type == "cuda" or _forget()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """Return the peak so far, in bytes; None where the system does not count it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._counts:
            return None
        lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])


def _forget() -> bool:
    try:
        _FORGET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
