"""Trained experts and their routing as a folder."""

from cram.attach import attached
from cram.bundle.bundle import expert_ranks, load, save

__all__ = ["attached", "expert_ranks", "load", "save"]
