"""The file: an *uncompressed* `.npz` of named arrays and one JSON object, without pickled objects.

Without compression a member takes as many bytes as its array, so that one which declares more than
the file has is refused before anything large is allocated.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from layercache._json import parse
from layercache.errors import StatsError

_META = "meta"
_MAX_META_BYTES = 16 * 2**20


def archive_bytes(arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> bytes:
    """The contents of the file."""
    text = json.dumps(meta, sort_keys=True, allow_nan=False).encode()
    buffer = io.BytesIO()
    members: dict[str, Any] = {**arrays, _META: np.frombuffer(text, dtype=np.uint8)}
    np.savez(buffer, **members)
    return buffer.getvalue()


def read_archive(
    path: str | os.PathLike[str], names: Sequence[str]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays and the JSON object of a file that holds just these.

    Raises:
        StatsError: The file is missing, truncated, malformed or compressed, or holds other members.
    """
    try:
        held = os.path.getsize(path)
        with zipfile.ZipFile(path) as archive:
            return _read(archive, names, str(path), held)
    except FileNotFoundError:
        raise StatsError(f"{path}: no such statistics file") from None
    except StatsError:
        raise
    # Encrypted members are a RuntimeError, names that are no text and sizes that fit no array a
    # ValueError.
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        KeyError,
        RuntimeError,
        ValueError,
    ) as error:
        raise StatsError(
            f"{path}: not a whole statistics file ({error}); calibrate again or restore a copy"
        ) from error


def _read(
    archive: zipfile.ZipFile, names: Sequence[str], path: str, held: int
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    found = archive.infolist()
    members = {info.filename.removesuffix(".npy"): info for info in found}
    if len(members) < len(found):
        raise StatsError(f"{path}: not a statistics file (two members of one name)")
    unknown = sorted(set(members) - {_META, *names})
    missing = sorted({_META, *names} - set(members))
    if missing or unknown:
        raise StatsError(f"{path}: not a statistics file (missing {missing}, unknown {unknown})")
    for name, info in members.items():
        if info.compress_type != zipfile.ZIP_STORED:
            raise StatsError(f"{path}: member {name!r} is compressed; statistics files never are")
        # `read` allocates what the directory of the archive declares.
        if info.header_offset + info.compress_size > held:
            raise StatsError(f"{path}: member {name!r} declares more bytes than the file has")
    if members[_META].file_size > _MAX_META_BYTES:
        raise StatsError(f"{path}: its metadata has {members[_META].file_size} bytes; refused")
    with archive.open(members[_META]) as file:
        try:
            text = _array(file, members[_META], path).tobytes()
            meta = parse(text)
        except ValueError as error:
            raise StatsError(f"{path}: its metadata is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise StatsError(f"{path}: its metadata is not a JSON object")
    arrays = {}
    for name in names:
        with archive.open(members[name]) as file:
            arrays[name] = _array(file, members[name], path)
    return arrays, meta


def _array(file: Any, info: zipfile.ZipInfo, path: str) -> NDArray[Any]:
    """Read one `.npy` member, checking the declared size against the real one first."""
    stream: BinaryIO = file
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    # Text that is no header makes numpy's parser raise errors that have no common base.
    except Exception as error:
        raise StatsError(f"{path}: {info.filename} is not an array ({error!r})") from error
    if version != (1, 0):
        raise StatsError(f"{path}: {info.filename} has .npy version {version}, not (1, 0)")
    if dtype.itemsize < 1 or any(length < 0 for length in shape):
        raise StatsError(f"{path}: {info.filename} has dtype {dtype} and shape {shape}; refused")
    size = dtype.itemsize
    for length in shape:
        size *= int(length)
    if dtype.hasobject or fortran or stream.tell() + size != info.file_size:
        raise StatsError(f"{path}: {info.filename} declares {size} bytes and has other contents")
    data = bytearray(stream.read(size))
    if len(data) != size:
        raise StatsError(f"{path}: {info.filename} is truncated")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
