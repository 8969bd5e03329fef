"""Files that are written whole, and folders that are held alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from cram.atomic import LOCK, locked


def test_a_folder_that_is_not_there_is_made_with_its_parents_and_taken_away(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    with locked(folder):
        assert (folder / LOCK).is_file()
        with pytest.raises(ValueError, match="b must have one writer, got process"), locked(folder):
            pass
    assert not folder.exists() and folder.parent.is_dir()
