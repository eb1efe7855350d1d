"""What the commands share: parameter types, option groups, loading, and exit codes."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from layercache._json import parse
from layercache.cli._files import PROMPT_FILE, STATISTICS, require_kind
from layercache.cli._needs import install, require
from layercache.cli._out import STDOUT, put
from layercache.errors import LayerCacheError, ModelMismatchError, OptionError, of_network
from layercache.plan import Plan

REFERENCE = "reference"
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE_OR_FOLDER = click.Path(path_type=Path)
MOST_PROMPTS = 10_000
STEPS = click.IntRange(1, 10_000)
"""As many as a plan can have."""
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


class WrongUsage(Failure):
    """The command line asks for what there is not: one line that says so, and one where to look."""

    exit_code = 2

    def __init__(self, error: click.UsageError, path: str) -> None:
        super().__init__(error.format_message())
        self.path = error.ctx.command_path if error.ctx else path

    def format_message(self) -> str:
        """Both lines."""
        return f"{self.message}\nTry '{self.path} --help' for help."


class Interrupted(Failure):
    """Ctrl-C."""

    exit_code = 130


class Commands(click.Group):
    """Turns expected errors into a line and an exit code; unexpected ones keep their traceback."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, which asks for its imports before it does anything."""
        super().add_command(cmd, name)
        run = cmd.callback
        assert run is not None

        @functools.wraps(run)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = click.get_current_context().params
            if given.get("out") == STDOUT and given.get("as_json"):
                raise click.UsageError("--out - and --json both write to stdout; leave one out")
            require(str(cmd.name), given)
            return run(*args, **kwargs)

        cmd.callback = checked

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; names of files that are no text are shown escaped."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read what stands before the command."""
        try:
            return super().make_context(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            raise WrongUsage(error, "layercache") from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warned
                return super().invoke(ctx)
        except click.UsageError as error:
            raise WrongUsage(error, ctx.command_path) from error
        except OptionError as error:
            raise WrongUsage(click.UsageError(str(error)), _path(ctx)) from error
        except ModelMismatchError as error:
            raise Mismatch(str(error)) from error
        except LayerCacheError as error:
            raise Failure(str(error)) from error
        except KeyboardInterrupt as error:
            kept = {"calibrate": ": what was measured is kept; the same command goes on from there"}
            raise Interrupted(f"interrupted{kept.get(ctx.invoked_subcommand or '', '')}") from error
        except OSError as error:
            if error.filename is None:
                _close_stdout()
            if error.errno == errno.EPIPE:
                raise  # click ends without a word, as a reader that left expects
            place = f"{error.filename}: " if error.filename else ""
            raise Failure(f"{place}{error.strerror or error}") from error
        except ModuleNotFoundError as error:
            name = str(error.name).partition(".")[0]
            raise Failure(f"{name} is not installed: {install([name])}") from error
        except Exception as error:
            told = _told_by_others(error)
            if told is None:
                raise
            raise Failure(told) from error


def _path(ctx: click.Context) -> str:
    """The command as it was called."""
    return f"{ctx.command_path} {ctx.invoked_subcommand or ''}".rstrip()


def _warned(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning without the line of code that it comes from."""
    log(f"warning: {str(message).removeprefix('LayerCache: ')}")


def _close_stdout() -> None:
    """Let what could not be written to stdout go, at which Python would fail again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _told_by_others(error: Exception) -> str | None:
    """What a library says of a mistake of the user's; None for what may be a fault of ours."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            f"out of memory ({str(error).partition('.')[0]}): use --offload model, a smaller "
            "--batch-size or a smaller size"
        )
    if of_network(error):
        return f"the network cannot be reached ({error}): check it, or name a folder on this disk"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    where = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    if isinstance(error, TypeError | ValueError) and where.startswith("diffusers.pipelines."):
        return f"the pipeline refuses its arguments ({error}); give what it needs by --call"
    return None


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


def parse_groups(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Option callback: groups as they are written; whether the model has them is seen later."""
    if value is None:
        return None
    span = r"(\w+\[\d+:\d+\]|\d+:\d+)"
    if re.fullmatch(rf" *(\d+|blocks|auto(:\d+)?|{span}( *, *{span})*) *", value) is None:
        raise click.BadParameter(
            f'{value!r}: give a number, "blocks" (one a block), "auto", "auto:N", or ranges such '
            "as 0:4,4:28",
            ctx, param,
        )  # fmt: skip
    return value


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
        if not path.is_dir():
            require_kind(path, STATISTICS)
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


def prompts_option(least: int = 1) -> Callable[[Callable[..., Any]], Any]:
    """Add `--prompts` and `--count`, of which `least` is the smallest."""

    def decorate(command: Callable[..., Any]) -> Any:
        count = click.IntRange(least, MOST_PROMPTS)
        command = click.option("--count", type=count, help="Use only the first prompts.")(command)
        text = "A text file with one prompt a line."
        return click.option("--prompts", "prompt_file", type=PROMPT_FILE, help=text)(command)

    return decorate


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
    chosen = [line for line in lines if line]
    if not chosen:
        raise click.UsageError(f"{file} has no prompts; write one a line")
    if text.lstrip().startswith(("[", "{")) and _is_json(text):
        raise click.UsageError(f"{file} is JSON; write plain text, one prompt a line")
    if limit is not None and limit > len(chosen):
        raise click.UsageError(
            f"--count {limit}: {file} has {len(chosen)} prompts; write more, or leave --count out"
        )
    return chosen[:limit]


def _is_json(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def hand_out(plan: Plan, out: Path, as_json: bool) -> None:
    """Write a plan and show it."""
    put(out, plan.to_bytes())
    if out == STDOUT:
        return
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
