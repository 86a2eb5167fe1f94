"""The builds of sweeps that still have their folder: `gc` keeps them, and no other sweep removes them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_build.proof.sweep_record import SWEEP_NAME, SweepRecord, read_sweep


def sweeps_in(folders: Iterable[Path]) -> list[SweepRecord]:
    """Return the sweeps whose folder is one of some folders.

    Raises:
        VerificationError: one cannot be read: which builds are its own nobody knows.
    """
    return [read_sweep(folder) for folder in dict.fromkeys(folders) if os.path.lexists(folder / SWEEP_NAME)]


def builds_of(sweeps: Iterable[SweepRecord]) -> Mapping[Path, str]:
    """Return the folders of builds that are points of some sweeps, each with what it is."""
    return {
        Path(os.path.realpath(Path(point.dir).parent)) / Path(point.dir).name: f"is a point of sweep {sweep.name}"
        for sweep in sweeps
        for point in sweep.points
        if point.dir is not None and point.kept is not False and (point.error is None or point.kept)
    }
