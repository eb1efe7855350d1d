"""Where commands put what they make: files, folders, and `-` for stdout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from layercache._write import require_folder, require_writable, write_file

STDOUT = Path("-")
"""The destination that is stdout. A file of this name is `./-`."""


class OutFile(click.Path):
    """A file to write, a link, a pipe, or `-`; what cannot be written is refused at once."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; `STDOUT` for `-`."""
        if str(value) == "-":
            return STDOUT
        if not str(value):
            self.fail("a file needs a name", param, ctx)
        try:
            require_writable(value)
        except (OSError, ValueError) as error:
            self.fail(_told(value, error), param, ctx)
        path = Path(value)
        return path.absolute() if path == STDOUT else path


class OutFolder(click.Path):
    """A folder to write, made where it is missing."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        if str(value) == "-":
            self.fail("this command writes a folder of files; name a folder", param, ctx)
        try:
            require_folder(Path(value))
        except (OSError, ValueError) as error:
            self.fail(_told(value, error), param, ctx)
        return Path(value)


OUT_FILE, OUT_FOLDER = OutFile(), OutFolder()


def put(out: Path, data: bytes) -> None:
    """Write what a command makes."""
    if out != STDOUT:
        write_file(out, data)
    else:
        click.echo(data, nl=False)


def _told(value: Any, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{os.fspath(value)!r} {reason}"
