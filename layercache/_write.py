"""How every file is written: whole or not at all, where its name leads, and to nothing odd.

A reader sees the old file or the whole new one. A symbolic link stays and its target is written; an
existing file keeps its mode and, where that is allowed, its owner. Pipes, terminals and the null
device are written into; folders and other devices are refused, and never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from pathlib import Path

PathLike = str | os.PathLike[str]


def write_file(path: PathLike, data: bytes) -> None:
    """Write a file; folders above it are made.

    Args:
        path: A file's name, or that of a link, a named pipe, a terminal, or a descriptor of this
            process such as `/dev/stdout`.
        data: All that the file is to hold.

    Raises:
        OSError: It cannot be written, or is a folder or a device; the old file is as it was.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_file(folder / "new" / "file", b"text")
        >>> (folder / "new" / "file").read_bytes()
        b'text'
    """
    number = _own_descriptor(path)
    if number is not None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        _fill(os.dup(number), data)
        return
    found = require_writable(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        _fill(os.open(path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0)), data)
        return
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, data, found)
    except OSError as error:
        # Not the name of the file beside it, which the user never gave.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def require_writable(path: PathLike) -> os.stat_result | None:
    """Refuse what `write_file` would refuse, before anything is spent.

    Returns:
        What is there, or None.

    Raises:
        OSError: It is a folder, a device, or may not be written.
    """
    if _own_descriptor(path) is not None:
        return None
    try:
        found = os.stat(path)
    except FileNotFoundError:
        # Also a link that leads nowhere yet.
        require_folder(Path(os.path.realpath(path)).parent, path)
        return None
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, "is a folder; give the name of a file", str(path))
    if stat.S_ISBLK(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EINVAL, "is no file; give the name of a file", str(path))
    if stat.S_ISCHR(found.st_mode) and not _takes_text(path, found):
        raise OSError(errno.EINVAL, "is a device; give the name of a file", str(path))
    if not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, "is write-protected", str(path))
    return found


def require_folder(folder: Path, path: PathLike | None = None) -> None:
    """Refuse a folder in which no file can be made; one that is not there is no obstacle.

    Args:
        folder: The folder.
        path: What is to be made, for the message; the folder itself by default.

    Raises:
        OSError: It is no folder, or may not be written.
    """
    path = folder if path is None else path
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OSError(errno.ENOTDIR, f"cannot be made, as {folder} is no folder", str(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, f"cannot be made, as {folder} is write-protected", str(path))


def _takes_text(path: PathLike, found: os.stat_result) -> bool:
    """Whether a character device is the null device or a terminal."""
    if os.path.exists(os.devnull) and found.st_rdev == os.stat(os.devnull).st_rdev:
        return True
    try:
        descriptor = os.open(
            path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_NONBLOCK", 0)
        )
    except OSError:
        return False
    try:
        return os.isatty(descriptor)
    finally:
        os.close(descriptor)


def _own_descriptor(path: PathLike) -> int | None:
    """The number of this process's descriptor that a name such as `/dev/stdout` stands for.

    What it leads to may be a file that is being written; it must go on there, and not anew.
    """
    place = os.path.abspath(path)
    for _ in range(40):
        folder, name = os.path.split(place)
        own = (f"/proc/{os.getpid()}/fd", "/dev/fd")
        if name.isdecimal() and os.path.realpath(folder) in own:
            return int(name)
        if not os.path.islink(place):
            break
        place = os.path.join(folder, os.readlink(place))
    return None


def _fill(descriptor: int, data: bytes) -> None:
    with open(descriptor, "wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


def _replace(target: Path, data: bytes, found: os.stat_result | None) -> None:
    """Write beside a file, and move it into its place."""
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            if found is not None:
                with contextlib.suppress(OSError, AttributeError):
                    os.fchown(file.fileno(), found.st_uid, found.st_gid)
                os.chmod(partial, stat.S_IMODE(found.st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
