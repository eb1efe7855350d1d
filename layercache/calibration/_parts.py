"""A folder with one statistics file a prompt: what a killed run leaves, and where it resumes.

Files are named by prompt identity and written atomically, so that a file that is there is whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercache.errors import ModelMismatchError, StatsError
from layercache.stats import CalibrationStats, Group, difference

LATENT_SHAPE = "latent_shape"
"""Name in a setting of the shape of one image's latent, without the batch axis."""
PIXELS = "pixels"
"""Name in a setting of width and height, as the pipeline's call had them in the end."""


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

    def load_all(
        self, identities: Sequence[str], expected: Mapping[str, Any]
    ) -> list[CalibrationStats]:
        """The statistics of those prompts that have a file.

        Args:
            identities: The prompts'.
            expected: What the run under way knows of `CalibrationStats.identity`.

        Raises:
            ModelMismatchError: A file is of another run; the message names the field.
            StatsError: A file is damaged, or holds other prompts than its name says.
        """
        found = []
        for path in filter(Path.exists, map(self.path, identities)):
            stats = CalibrationStats.load(path)
            if stats.prompt_ids != (path.stem,):
                raise StatsError(f"{path} holds other prompts than its name says: remove it")
            # A sketch is never longer than the vectors.
            size = min(expected["sketch_size"], stats.numel)
            require_same(str(path), {**expected, "sketch_size": size}, stats)
            found.append(stats)
        return found

    def found_groups(self, count: int, expected: Mapping[str, Any]) -> tuple[Group, ...] | None:
        """The groups that an `auto` run found before it was killed; None if there is no file of it.

        Args:
            count: How many groups.
            expected: What the run under way knows of `CalibrationStats.identity` but its groups.

        Raises:
            ModelMismatchError: There are not `count` of them.
        """
        for path in sorted(self.folder.glob("*.npz")):
            stats = CalibrationStats.load(path)
            if _difference(expected, stats):
                continue
            if len(stats.groups) != count:
                raise ModelMismatchError(
                    f"{path} is of another run: the number of groups differs ({count} and "
                    f"{len(stats.groups)}) (this run, then the file); use another folder, or "
                    "remove it"
                )
            return stats.groups
        return None


def require_same(name: str, expected: Mapping[str, Any], stats: CalibrationStats) -> None:
    """Raise unless statistics agree with what a run knows of their identity.

    Raises:
        ModelMismatchError: They do not; the message names the field and both values.
    """
    found = _difference(expected, stats)
    if found:
        raise ModelMismatchError(
            f"{name} is of another run: {found} (this run, then the file); use another folder, or "
            "remove it"
        )


def _difference(expected: Mapping[str, Any], stats: CalibrationStats) -> str:
    theirs = {field: stats.identity[field] for field in expected}
    if "setting" in expected:
        # Sizes are known only once a run has begun.
        late = (LATENT_SHAPE, PIXELS)
        theirs["setting"] = {n: v for n, v in stats.setting.items() if n not in late}
    return difference(expected, theirs)
