"""Trained experts and their routing as a folder."""

from cram.attach import attached
from cram.bundle.bundle import load, save

__all__ = ["attached", "load", "save"]
