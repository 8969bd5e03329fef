"""Versions of the experts that one model holds at the same time.

A version is a set of packed experts. Answers in flight keep the version that their prompt was read with; the
engine lets a version act by setting references, so that a change between two steps copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cram.methods.base import MethodState
from cram.methods.parts.grouped import GroupedMethod
from cram.model.attached import AttachedModel


@dataclass(frozen=True, eq=False)
class Version:
    """The experts of one moment.

    Attributes:
        number: Counts from 1.
        names: The experts' names.
        packs: Module path -> packed experts, or None without experts.
        state: What the method needs to route among them.
        pool: See `AttachedModel.pool`.
    """

    number: int
    names: tuple[str, ...]
    packs: dict[str, Any]
    state: MethodState
    pool: object


class Versions:
    """The versions of one attached model.

    Attributes:
        current: The version that new requests get.
    """

    def __init__(self, cram: AttachedModel) -> None:
        self._cram = cram
        self._count = 0
        self._before: Version | None = None
        self.current = self._taken()
        self._acting = self.current

    @property
    def swaps_in_flight(self) -> bool:
        """Whether answers of two versions can be in flight: all that decoding needs is in the packs."""
        return isinstance(self._cram.method, GroupedMethod)

    @property
    def previous(self) -> Version | None:
        """The version before the current one."""
        return self._before

    def act(self, version: Version) -> None:
        """Forwards from here on use the experts of `version`."""
        if version is self._acting:
            return
        for path, module in self._cram.modules.items():
            module.experts = version.packs[path]
        self._cram.expert_names, self._cram.pool = list(version.names), version.pool
        self._acting = version

    def replace(self, load: Callable[[], Any]) -> Version:
        """Make a new version current.

        Args:
            load: Puts the new experts on the model, which has none when it is called.

        Raises:
            ValueError: As `load`. Whatever `load` raises, the current version stays as it is.
        """
        before = self.current
        self.act(before)
        made = None
        try:
            self._cram.set_experts((), (), 0)
            load()
            made = self._taken()
        finally:
            if made is None:
                self._restore(before)
        self._before, self.current = before, made
        self._acting = made
        return made

    def roll_back(self) -> Version:
        """Make the version before the current one current again.

        Raises:
            ValueError: If there is none.
        """
        if self._before is None:
            raise ValueError("a bundle must have been replaced before a rollback, got none")
        self._before, target = self.current, self._before
        self._restore(target)
        self.current = target
        return target

    def _restore(self, version: Version) -> None:
        self._cram.method.experts_replaced()
        self._acting = None  # type: ignore[assignment]
        self.act(version)
        self._cram.method.import_state(*version.state)

    def _taken(self) -> Version:
        self._count += 1
        packs = {path: module.experts for path, module in self._cram.modules.items()}
        state = self._cram.method.export_state()
        return Version(self._count, tuple(self._cram.expert_names), packs, state, self._cram.pool)
