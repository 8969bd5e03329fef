"""The sheet of pictures shows the test samples of each task."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cram.streams import load_stream
from cram.streams.real import show


def test_sheet_holds_the_first_test_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["show", "--out", str(file), "--seed", "5"])
    show.main()
    sheet, stream = np.asarray(Image.open(file)), load_stream("builtin-real", 5, 10)
    assert sheet.shape == (980, 980, 3)
    for row, task in enumerate(stream.tasks):
        for column, sample in enumerate(task.test):
            cell = sheet[98 * row : 98 * row + 96, 98 * column : 98 * column + 96]
            assert np.array_equal(cell, np.asarray(sample.images[0]))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [task.name for task in stream.tasks]
    assert printed[0].endswith(f"-> {stream.tasks[0].test[0].answer}")
