"""Statistics files: whole ones survive, all others are refused with one clear error."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.errors import ModelMismatchError, StatsError
from layercache.stats import CalibrationStats, Group, difference, merge_all


def make_stats(ids: tuple[str, ...] = ("a", "b"), seed: int = 0, **changes: Any) -> Any:
    rng = np.random.default_rng(seed)
    count = len(ids)
    fields: dict[str, Any] = {
        "sigmas": np.linspace(1.0, 0.0, 6),
        "groups": (
            Group(block_list="blocks", start=0, stop=2),
            Group(block_list="blocks", start=2, stop=4),
        ),
        "branches": 2,
        "velocities": rng.standard_normal((count, 5, 8)).astype(np.float32),
        "deltas": rng.standard_normal((count, 5, 2, 3, 8)).astype(np.float32),
        "times_ms": rng.uniform(1, 2, (count, 4)),
        "image_gain": np.full(count, 0.06),
        "group_bytes": (100, 120),
        "velocity_bytes": 50,
        "output_bytes": 60,
        "numel": 12,
        "sketch_seed": 0,
        "prompt_ids": ids,
        "model": {"class_name": "M", "block_lists": {"blocks": 4}, "architecture": "x"},
        "setting": {"num_inference_steps": 5},
    }
    return CalibrationStats(**(fields | changes))


def same(a: CalibrationStats, b: CalibrationStats) -> bool:
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name))
        if isinstance(getattr(a, f.name), np.ndarray)
        else getattr(a, f.name) == getattr(b, f.name)
        for f in dataclasses.fields(a)
    )


def test_saved_statistics_are_loaded_equal(tmp_path: Path) -> None:
    stats = make_stats()
    stats.save(tmp_path / "deep" / "stats.npz")
    assert same(CalibrationStats.load(tmp_path / "deep" / "stats.npz"), stats)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["stats.npz"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stats.npz"
    make_stats().save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("layercache.stats.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        make_stats(("c",)).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["stats.npz"]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "stats.npz"
    make_stats().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(StatsError):
        CalibrationStats.load(path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 100_000), value=st.integers(1, 255))
def test_a_damaged_file_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    """A flipped byte gives `StatsError`, unless it lies where nothing is read from."""
    path = tmp_path_factory.mktemp("flip") / "stats.npz"
    stats = make_stats()
    stats.save(path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= value
    path.write_bytes(bytes(data))
    try:
        loaded = CalibrationStats.load(path)
    except StatsError:
        return
    assert same(loaded, stats)


def rewrite(path: Path, edit: Any, compress: bool = False) -> None:
    """Apply `edit` to the members of a statistics file, as a hand or a foreign tool would."""
    with np.load(path) as file:
        members = {name: file[name] for name in file.files}
    meta = json.loads(members["meta"].tobytes())
    edit(members, meta)
    if "meta" in members:
        members["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    (np.savez_compressed if compress else np.savez)(path, **members)


def nan(members: Any, meta: Any) -> None:
    members["deltas"] = members["deltas"].copy()
    members["deltas"][0, 1, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m, meta: meta.update(schema_version=5), r"schema version 5.*upgrade"),
        (lambda m, meta: meta.pop("schema_version"), "schema version None"),
        (lambda m, meta: meta.update(surprise=1), "unknown metadata.*surprise"),
        (lambda m, meta: meta.pop("numel"), "metadata is malformed"),
        (lambda m, meta: meta.update(numel="many"), "metadata is malformed"),
        (lambda m, meta: meta.update(numel="12"), r"numel is \['12'\]; each must be int"),
        (lambda m, meta: meta.update(numel=12.7), "each must be int"),
        (lambda m, meta: meta.update(numel=True), "each must be int"),
        (lambda m, meta: meta.update(numel=float("inf")), "Infinity is no JSON number"),
        (lambda m, meta: meta.update(setting={"x": float("nan")}), "NaN is no JSON number"),
        (lambda m, meta: meta.update(group_bytes="12"), "group_bytes is 12"),
        (lambda m, meta: meta.update(group_bytes=[-1, 2]), "bytes cannot be negative"),
        (lambda m, meta: meta.update(velocity_bytes=-5), "velocity_bytes is -5"),
        (lambda m, meta: meta.update(prompt_ids="ab"), "each must be str"),
        (lambda m, meta: meta.update(prompt_ids=[1, 2]), "each must be str"),
        (lambda m, meta: meta.update(model={}), "metadata is malformed.*class_name"),
        (lambda m, meta: meta["model"].update(class_name=3), "model is .*each must be str"),
        (lambda m, meta: meta["model"].update(block_lists=["a"]), "metadata is malformed"),
        (lambda m, meta: meta["model"].update(block_lists={"a": "b"}), "each must be int"),
        (lambda m, meta: meta["groups"][0].update(start=0.5), "metadata is malformed"),
        (lambda m, meta: meta["groups"][0].update(block_list=7), "metadata is malformed"),
        (lambda m, meta: meta["groups"][1].update(start=1), r"blocks\[1:4\] overlaps or precedes"),
        (lambda m, meta: m.update(deltas=np.zeros((2, 5, 2, 0, 8))), "lags=0"),
        (lambda m, meta: m.update(response_sigmas=np.full(2, 0.5)), "responses has shape"),
        (
            lambda m, meta: m.update(responses=-np.ones((2, 1, 1, 3)), response_sigmas=np.ones(1)),
            "squared norm below 0",
        ),
        (
            lambda m, meta: m.update(responses=np.ones((2, 2, 1, 3)), response_sigmas=np.ones(2)),
            "response_sigmas must fall",
        ),
        (lambda m, meta: m.update(times_ms=np.zeros((2, 4))), "times_ms is 0 throughout"),
        (lambda m, meta: meta.update(mode="guess"), "mode is 'guess'"),
        (lambda m, meta: meta.update(mode=["replay"]), "mode is"),
        (lambda m, meta: meta.update(probes=-1), "probes -1"),
        (lambda m, meta: meta.update(model=7), "metadata is malformed"),
        (lambda m, meta: meta.update(groups=[["blocks", 0, 2]]), "metadata is malformed"),
        (lambda m, meta: m.pop("deltas"), "missing.*deltas"),
        (lambda m, meta: m.update(extra=np.zeros(1)), "unknown.*extra"),
        (lambda m, meta: m.update(deltas=np.zeros((2, 5, 3, 3, 8))), "deltas has shape"),
        (lambda m, meta: m.update(sigmas=np.ones(6)), "sigmas must fall strictly"),
        (lambda m, meta: m.update(velocities=np.zeros((2, 5, 8), int)), "not a float"),
        (lambda m, meta: meta.update(prompt_ids=["b", "a"]), "prompt_ids must be sorted"),
        (nan, "deltas holds NaN or infinity.*calibrate again"),
    ],
)
def test_edited_files_are_refused(tmp_path: Path, edit: Any, message: str) -> None:
    path = tmp_path / "stats.npz"
    make_stats().save(path)
    rewrite(path, edit)
    with pytest.raises(StatsError, match=message):
        CalibrationStats.load(path)


def test_compressed_files_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    make_stats().save(path)
    rewrite(path, lambda m, meta: None, compress=True)
    with pytest.raises(StatsError, match="is compressed"):
        CalibrationStats.load(path)


def test_a_header_that_promises_more_than_the_file_holds_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    make_stats().save(path)
    bomb = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)}
    np.lib.format.write_array_header_1_0(bomb, header)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members["deltas.npy"] = bomb.getvalue()
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)
    with pytest.raises(StatsError, match="declares 4398046511104 bytes"):
        CalibrationStats.load(path)


def npy(header: str, data: bytes = b"") -> bytes:
    """An array file with any text for its header."""
    text = f"{header:<{-(len(header) + 11) % 64 + len(header)}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def described(descr: str, shape: str, data: bytes = b"") -> bytes:
    return npy(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}", data)


@pytest.mark.parametrize(
    "member",
    [
        described("<f4", "(-2, -3)", b"0" * 24),
        described("<f4", f"({'1, ' * 100})", b"0" * 4),
        described("<U0", "(3,)"),
        described("|V0", "(3,)"),
        npy("{[]: 1}"),
        npy("{'descr': ("),
        npy("-" * 9000 + "1"),
        npy("(" * 9000),
        b"\x93NUM",
    ],
)
def test_headers_that_are_none_are_one_clear_error(tmp_path: Path, member: bytes) -> None:
    path = tmp_path / "stats.npz"
    make_stats().save(path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in (members | {"sigmas.npy": member}).items():
            new.writestr(name, data)
    with pytest.raises(StatsError, match=r"stats\.npz: .*(sigmas|statistics file)"):
        CalibrationStats.load(path)


def in_directory(path: Path, member: bytes, offset: int, layout: str, *values: int) -> None:
    """Overwrite fields of a member's entry in the archive's directory."""
    data = bytearray(path.read_bytes())
    entry = data.find(member, data.find(b"PK\x01\x02")) - 46
    struct.pack_into(layout, data, entry + offset, *values)
    path.write_bytes(bytes(data))


def test_a_directory_that_promises_more_than_the_file_holds_allocates_nothing(
    tmp_path: Path,
) -> None:
    path, size = tmp_path / "stats.npz", 3 * 2**30
    make_stats().save(path)
    header = described("<f4", f"({size // 4},)")
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in (members | {"deltas.npy": header}).items():
            new.writestr(name, data)
    in_directory(path, b"deltas.npy", 20, "<II", len(header) + size, len(header) + size)
    tracemalloc.start()
    try:
        with pytest.raises(StatsError, match="'deltas' declares more bytes than the file has"):
            CalibrationStats.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_encrypted_members_and_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    make_stats().save(path)
    in_directory(path, b"sigmas.npy", 8, "<H", 1)
    with pytest.raises(StatsError, match="encrypted"):
        CalibrationStats.load(path)
    make_stats().save(path)
    in_directory(path, b"sigmas.npy", 8, "<H", 0x800)
    in_directory(path, b"sigmas.npy", 46, "<B", 0xFF)
    with pytest.raises(StatsError, match="not a whole statistics file"):
        CalibrationStats.load(path)


@pytest.mark.parametrize("name", ["sigmas", "sigmas.npy"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "stats.npz"
    make_stats().save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, archive.read("sigmas.npy"))
    with pytest.raises(StatsError, match="two members of one name"):
        CalibrationStats.load(path)


def test_a_missing_entry_does_not_hide_what_differs_after_it() -> None:
    assert difference({"a": {"x": None}, "b": 1}, {"a": {}, "b": 2}) == "b differs (1 and 2)"


def test_integers_of_numpy_survive_the_disk(tmp_path: Path) -> None:
    group = Group(block_list="blocks", start=np.int64(0), stop=np.int64(4))
    whole = {"groups": (group,), "deltas": np.ones((2, 5, 1, 3, 8), np.float32)}
    stats = make_stats(times_ms=np.ones((2, 3)), group_bytes=(1,), **whole)
    stats.save(tmp_path / "stats.npz")
    assert CalibrationStats.load(tmp_path / "stats.npz").groups == (group,)


def test_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    make_stats().save(path)
    rewrite(path, lambda m, meta: m.update(sigmas=np.array([object()] * 6)))
    with pytest.raises(StatsError):
        CalibrationStats.load(path)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(StatsError, match="no such statistics file"):
        CalibrationStats.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(StatsError, match="not a whole statistics file"):
        CalibrationStats.load(tmp_path / "text.npz")


def test_merge_does_not_depend_on_order() -> None:
    a, b, c = make_stats(("a", "d"), 1), make_stats(("b",), 2), make_stats(("c",), 3)
    merged = a.merge(b).merge(c)
    assert same(merged, c.merge(b.merge(a)))
    assert merged.prompt_ids == ("a", "b", "c", "d")
    np.testing.assert_array_equal(merged.velocities[0], a.velocities[0])
    np.testing.assert_array_equal(merged.velocities[3], a.velocities[1])
    np.testing.assert_array_equal(merged.select([1, 2]).velocities[1], c.velocities[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"class_name": "N"}}, "model.class_name differs ('M' and 'N')"),
        (
            {"setting": {"num_inference_steps": 6}},
            "setting.num_inference_steps differs (5 and 6)",
        ),
        ({"sketch_seed": 1}, "sketch_seed differs (0 and 1)"),
        ({"branches": 1}, "branches differs (2 and 1)"),
        ({"numel": 13}, "numel differs (12 and 13)"),
        ({"mode": "residual"}, "mode differs ('replay' and 'residual')"),
        ({"probes": 4}, "probes differs (0 and 4)"),
        ({"sigmas": np.linspace(1.0, 0.0, 6) ** 2}, "sigmas[1] differs (0.8 and 0.64"),
        ({"deltas": np.zeros((1, 5, 2, 2, 8), np.float32)}, "lags differs (3 and 2)"),
        (
            {
                "velocities": np.zeros((1, 5, 4), np.float32),
                "deltas": np.zeros((1, 5, 2, 3, 4), np.float32),
            },
            "sketch_size differs (8 and 4)",
        ),
        (
            {
                "groups": (
                    Group(block_list="blocks", start=0, stop=1),
                    Group(block_list="blocks", start=1, stop=4),
                )
            },
            "groups differs (['blocks[0:2]', 'blocks[2:4]'] and ['blocks[0:1]', 'blocks[1:4]'])",
        ),
    ],
)
def test_merge_refuses_what_differs_and_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelMismatchError, match=re.escape(message)):
        make_stats(("a",)).merge(make_stats(("b",), **change))


def test_merge_refuses_prompts_that_stand_in_both() -> None:
    with pytest.raises(StatsError, match="1 prompts stand in more than one part"):
        make_stats(("a", "b")).merge(make_stats(("b", "c")))
    with pytest.raises(StatsError, match="no statistics to merge"):
        merge_all([])


def test_drafts_of_the_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.npz"
    make_stats().save(path)
    rewrite(path, lambda members, meta: meta.update(schema_version=2))
    with pytest.raises(StatsError, match=r"schema version 2.*calibrate again"):
        CalibrationStats.load(path)


def test_a_deeply_nested_header_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    make_stats().save(path)
    with np.load(path) as file:
        members = {name: file[name] for name in file.files}
    members["meta"] = np.frombuffer(b"[" * 200_000, dtype=np.uint8)
    np.savez(path, **members)
    with pytest.raises(StatsError, match="metadata is not JSON"):
        CalibrationStats.load(path)


def test_arrays_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_stats().deltas[0] = 1
