"""A folder with one statistics file a prompt: what a killed run leaves, and where it resumes.

Files are named by prompt identity and written atomically, so that a file that is there is whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercache.errors import ModelMismatchError
from layercache.stats import CalibrationStats, difference


class Parts:
    """The folder.

    Args:
        folder: Made when the first file is written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, identity: str) -> Path:
        """The file of a prompt."""
        return self.folder / f"{identity}.npz"

    def save(self, stats: CalibrationStats) -> None:
        """Write one file for each prompt."""
        for index, identity in enumerate(stats.prompt_ids):
            path = self.path(identity)
            stats.select([index]).save(path)
            # What a killed process was writing when it died.
            for stale in self.folder.glob(f"{path.name}.*.partial"):
                stale.unlink(missing_ok=True)

    def load(self, identity: str, expected: Mapping[str, Any]) -> CalibrationStats | None:
        """The statistics of a prompt, or None if there are none yet.

        Args:
            identity: The prompt's.
            expected: What the run under way knows of `CalibrationStats.identity`.

        Raises:
            ModelMismatchError: The file is of another run; the message names the field.
            StatsError: The file is damaged.
        """
        path = self.path(identity)
        if not path.exists():
            return None
        stats = CalibrationStats.load(path)
        found = difference(expected, {name: stats.identity[name] for name in expected})
        if found:
            raise ModelMismatchError(
                f"{path} is of another run: {found} (this run, the file); use another folder, or "
                "remove it"
            )
        return stats

    def groups_of_first(self) -> Any:
        """The groups of some file in the folder, or None."""
        for path in sorted(self.folder.glob("*.npz")):
            return CalibrationStats.load(path).groups
        return None
