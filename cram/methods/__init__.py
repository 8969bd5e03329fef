"""Continual-learning methods. All use the same expert layer; `METHODS` lists them by name."""

from __future__ import annotations

from cram.methods.base import Method
from cram.methods.baselines.isolated import IsolatedMethod
from cram.methods.baselines.replay import ReplayMethod
from cram.methods.baselines.sequential import SequentialMethod
from cram.methods.branchlora import BranchLoraMethod
from cram.methods.cram import CramMethod
from cram.methods.disco import DiscoMethod
from cram.methods.hide import HideMethod
from cram.methods.keeplora import KeepLoraMethod
from cram.methods.many import ManyMethod
from cram.methods.moelora import MoELoraMethod
from cram.methods.olora import OLoraMethod
from cram.methods.same import SameMethod
from cram.methods.smolora import SMoLoraMethod

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        CramMethod,
        SequentialMethod,
        ReplayMethod,
        MoELoraMethod,
        BranchLoraMethod,
        SMoLoraMethod,
        SameMethod,
        OLoraMethod,
        ManyMethod,
        HideMethod,
        DiscoMethod,
        KeepLoraMethod,
        IsolatedMethod,
    )
}

__all__ = ["METHODS", "Method"]
