"""What the commands share: parameter types, option groups, loading, and exit codes."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from layercache._json import parse
from layercache.errors import LayerCacheError, ModelMismatchError
from layercache.plan import Plan

REFERENCE = "reference"
PATH = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE_OR_FOLDER = click.Path(path_type=Path)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Failure(click.ClickException):
    """One line on stderr, exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Mismatch(Failure):
    """A plan or statistics belong to another model."""

    exit_code = 3


class GateFailed(Failure):
    """A measured figure is below its gate."""

    exit_code = 4


class Commands(click.Group):
    """Turns expected errors into a line and an exit code; unexpected ones keep their traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; names of files that are no text are shown escaped."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ModelMismatchError as error:
            raise Mismatch(str(error)) from error
        except LayerCacheError as error:
            raise Failure(str(error)) from error
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise Failure(f"{place}{error.strerror or error}") from error
        except ModuleNotFoundError as error:
            raise Failure(
                f"{error.name} is not installed: pip install 'layercache-flow[diffusers,plot,eval]'"
            ) from error


def parse_shard(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    """Option callback: `i/n`."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or not int(match[1]) < int(match[2]):
        raise click.BadParameter(f"{value!r} is not i/n with i from 0 to n-1", ctx, param)
    return int(match[1]), int(match[2])


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Option callback: bytes, with or without a unit."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) ?([A-Za-z]*)", value.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise click.BadParameter(f"{value!r} is no size such as 12GB or 500MiB", ctx, param)
    return int(float(match[1]) * _UNITS[match[2].upper()])


def expand_folders(paths: Sequence[Path]) -> list[Path]:
    """The files, with each folder replaced by the statistics files in it."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not inside:
            raise click.UsageError(f"{path} holds no statistics file (*.npz)")
        found += inside
    return found


def remove_parts(folder: Path, identities: Sequence[str]) -> None:
    """Remove the files of prompts that a merged file holds, and the folder if it is then empty."""
    for identity in identities:
        (folder / f"{identity}.npz").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def parse_json_object(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, Any]:
    """Option callback: a JSON object."""
    try:
        result = parse(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON ({error})", ctx, param) from error
    if not isinstance(result, dict):
        example = '{"height": 512}'
        raise click.BadParameter(f"{value!r} is no JSON object such as {example}", ctx, param)
    return result


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        command
    )


def read_prompts(
    file: Path | None, model: str, split: Any, default_count: int, limit: int | None
) -> list[str]:
    """The prompts of a file, or those of a split for the reference model."""
    if file is None:
        if model != REFERENCE:
            raise click.UsageError("--prompts is needed for every model but the reference one")
        from layercache.reference import prompts

        return prompts(split, default_count)
    try:
        # Editors of Windows begin a file with a byte order mark.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file} is no UTF-8 text ({error}); save it as UTF-8") from error
    lines = [line.strip() for line in text.splitlines()]
    chosen = [line for line in lines if line][:limit]
    if not chosen:
        raise click.UsageError(f"{file} has no prompts; write one a line")
    return chosen


def hand_out(plan: Plan, out: Path, as_json: bool) -> None:
    """Write a plan and show it."""
    plan.save(out)
    if as_json:
        print_json({"file": str(out), "plan": plan.to_dict()})
    else:
        click.echo(plan.summary())
        log(f"wrote {out}")


def print_json(value: Any) -> None:
    """Results for programs, on stdout."""
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def log(text: str) -> None:
    """What is not a result goes to stderr."""
    click.echo(text, err=True)


def progress() -> bool:
    """Progress bars are for people who watch, not for log files."""
    return sys.stderr.isatty()
