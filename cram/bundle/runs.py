"""Where the bundles of a run folder are: its `run.json`, and the newest complete state among its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cram.atomic import recover_folder
from cram.bundle.format import MANIFEST
from cram.bundle.records import run_record

RUN_FORMAT = 1
RUN = "run.json"


def read_run(folder: Path) -> dict[str, Any]:
    """The `run.json` of a run folder.

    Raises:
        ValueError: If there is none, it is damaged or of another format.
    """
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} must be a run folder with a {RUN}, got none")
    return run_record(folder / RUN, RUN_FORMAT)


def newest_bundle(folder: Path) -> tuple[Path, list[str]]:
    """The newest bundle of a run, and the tasks that it has learnt.

    Raises:
        ValueError: If the folder is not a run, or no task has been trained yet.
    """
    names: list[str] = read_run(folder)["identity"]["stream"]["tasks"]
    bundles = [folder / "tasks" / f"{index + 1:02d}-{name}" / "bundle" for index, name in enumerate(names)]
    for bundle in bundles:
        recover_folder(bundle)
    trained = [index for index, bundle in enumerate(bundles) if (bundle / MANIFEST).is_file()]
    if not trained:
        raise ValueError(f"{folder} must have a trained task, got none")
    return bundles[trained[-1]], names[: trained[-1] + 1]


def bundle_at(folder: Path) -> Path:
    """The newest bundle of a run folder; any other folder is returned as it is.

    Raises:
        ValueError: If the folder is a run without a trained task.
    """
    return newest_bundle(folder)[0] if (folder / RUN).is_file() else folder
