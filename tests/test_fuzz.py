"""Whatever stands in a file: a valid object comes out of it, or a LayerCacheError.

The oracle of a valid object: it is written, read back equal, shown, and used like any other.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layercache import CalibrationStats, Plan, compile_plan
from layercache.cli import main
from layercache.errors import LayerCacheError, PlanError, StatsError
from tests.prediction.strategies import random_stats
from tests.strange import SURROGATE, damaged, mutated, texts_of, values
from tests.test_stats import same

STATS = random_stats(prompts=2, steps=5, groups=2, lags=2, size=4)
OTHER = STATS.select([0])
PLANS = tuple(
    compile_plan(STATS, budget, units=units).to_dict()
    for budget, units in ((0.6, ("step", "groups")), (0.6, ("step",)), (0.8, ("groups",)))
)
EXIT_CODES = (0, 1, 2, 3)
many = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
some = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Duplicate name")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def whole_plan(plan: Plan, folder: Path) -> None:
    """All that a valid plan is used for."""
    plan.save(folder / "again.json")
    assert Plan.load(folder / "again.json") == plan
    assert Plan.from_dict(plan.to_dict()) == plan
    plan.summary().encode()
    assert set(plan.schedules) == {unit.name for unit in plan.units}
    try:
        plan.check(STATS.model, STATS.setting)
    except LayerCacheError as error:
        str(error).encode()


def whole_stats(stats: CalibrationStats, folder: Path) -> None:
    """All that valid statistics are used for; compiling them may be refused."""
    stats.save(folder / "again.npz")
    assert same(CalibrationStats.load(folder / "again.npz"), stats)
    stats.summary().encode()
    assert len(stats.prompts_sha256) == 64
    for use in (lambda: stats.merge(OTHER), lambda: OTHER.merge(stats)):
        try:
            use()
        except LayerCacheError as error:
            str(error).encode()
    for units in (("step", "groups"), ("groups",)):
        try:
            plan = compile_plan(stats, 0.6, units=units)
        except LayerCacheError as error:
            str(error).encode()
        else:
            whole_plan(plan, folder)


@st.composite
def plan_values(draw: st.DrawFn) -> Any:
    return draw(mutated(draw(st.sampled_from(PLANS))))


@many
@given(data=plan_values())
def test_plans_of_strange_values_are_valid_or_refused(folder: Path, data: Any) -> None:
    try:
        plan = Plan.from_dict(data)
    except PlanError as error:
        str(error).encode()
    else:
        whole_plan(plan, folder)


@many
@given(text=st.sampled_from(PLANS).flatmap(texts_of))
def test_plan_files_are_valid_or_refused(folder: Path, text: bytes) -> None:
    (folder / "plan.json").write_bytes(text)
    try:
        plan = Plan.load(folder / "plan.json")
    except PlanError as error:
        str(error).encode()
    else:
        whole_plan(plan, folder)


@pytest.mark.parametrize("data", [None, 3, "plan", [], {1: 2}, {"schema_version": {}}, object()])
def test_what_is_no_plan_at_all_is_refused(data: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_dict(data)


@pytest.mark.parametrize("field", ["generator", "setting", "provenance", "model"])
@pytest.mark.parametrize("key", [False, True])
def test_text_that_is_no_unicode_is_refused_by_name(field: str, key: bool) -> None:
    data = dict(PLANS[0])
    if isinstance(data[field], Mapping):
        data[field] = data[field] | ({SURROGATE: 1} if key else {"dtype": SURROGATE})
    else:
        data[field] = SURROGATE
    with pytest.raises(PlanError, match=rf"plan\.{field}.*ud800"):
        Plan.from_dict(data)


def members_of(stats: CalibrationStats, folder: Path) -> dict[str, bytes]:
    stats.save(folder / "good.npz")
    with zipfile.ZipFile(folder / "good.npz") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def array_file(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def meta_file(text: bytes) -> bytes:
    return array_file(np.frombuffer(text, dtype=np.uint8))


def archive_of(members: Mapping[str, bytes], **options: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


FACTORS = (0.0, -1.0, 1e-45, 1e-30, 1e10, 1e18, 3e38, np.nan, np.inf)
DTYPES = ("f2", "f4", "f8", "g", ">f8", "i4", "c8", "U3", "?", "O")


@st.composite
def arrays_like(draw: st.DrawFn, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array with other values, of another type, or of another shape."""
    kind = draw(st.sampled_from(("entry", "scale", "dtype", "shape", "axis")))
    changed = np.array(array)
    if kind == "entry":
        changed.flat[draw(st.integers(0, changed.size - 1))] = draw(st.sampled_from(FACTORS))
    elif kind == "scale":
        with np.errstate(all="ignore"):
            changed = changed * np.asarray(draw(st.sampled_from(FACTORS)), dtype=changed.dtype)
    elif kind == "dtype":
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = changed.astype(draw(st.sampled_from(DTYPES)))
    elif kind == "shape":
        shapes = [(), (0,), (1,) * 32, changed.shape[::-1], (*changed.shape, 1), changed.shape[1:]]
        changed = np.resize(changed, draw(st.sampled_from(shapes)))
    else:
        axis = draw(st.integers(0, changed.ndim - 1))
        again = draw(st.sampled_from((0, 1, changed.shape[axis] + 1)))
        changed = np.resize(np.moveaxis(changed, axis, 0), (again, *np.delete(changed.shape, axis)))
        changed = np.moveaxis(changed, 0, axis)
    return np.asfortranarray(changed) if draw(st.integers(0, 9)) == 0 else changed


@st.composite
def stats_files(draw: st.DrawFn, members: dict[str, bytes]) -> bytes:
    """A statistics file with other metadata, other arrays, other members, or damaged bytes."""
    kind = draw(st.sampled_from(("meta", "meta", "array", "array", "member", "bytes")))
    changed = dict(members)
    if kind == "bytes":
        return draw(damaged(archive_of(members)))
    if kind == "meta":
        meta = json.loads(np.load(io.BytesIO(members["meta.npy"])).tobytes())
        changed["meta.npy"] = meta_file(draw(texts_of(meta)))
    elif kind == "array":
        for name in draw(
            st.lists(st.sampled_from(sorted(set(members) - {"meta.npy"})), max_size=2)
        ):
            changed[name] = array_file(
                draw(arrays_like(np.load(io.BytesIO(members[name]), allow_pickle=False)))
            )
    else:
        name = draw(st.sampled_from(sorted(members)))
        what = draw(st.sampled_from(("remove", "damage", "rename", "again", "compress")))
        if what == "compress":
            return archive_of(changed, compression=zipfile.ZIP_DEFLATED)
        if what == "damage":
            changed[name] = draw(damaged(changed[name]))
        if what in ("remove", "rename"):
            data = changed.pop(name)
        if what == "rename":
            changed[draw(st.sampled_from((" ", "é", "../meta.npy", name.upper())))] = data
        if what == "again":
            changed[name.removesuffix(".npy")] = changed[name]
    return archive_of(changed)


@pytest.fixture(scope="module")
def members(folder: Path) -> dict[str, bytes]:
    return members_of(STATS, folder)


@many
@given(data=st.data())
def test_statistics_files_are_valid_or_refused(
    folder: Path, members: dict[str, bytes], data: st.DataObject
) -> None:
    (folder / "stats.npz").write_bytes(data.draw(stats_files(members)))
    try:
        stats = CalibrationStats.load(folder / "stats.npz")
    except StatsError as error:
        str(error).encode()
    else:
        whole_stats(stats, folder)


@many
@given(data=st.data())
def test_statistics_of_strange_arrays_are_valid_or_refused(
    folder: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(("sigmas", "velocities", "deltas", "times_ms", "loads",
                                      "image_gain", "amplification", "latents")))  # fmt: skip
    array = data.draw(arrays_like(getattr(STATS, name)))
    (folder / "stats.npz").write_bytes(
        archive_of(members_of(STATS, folder) | {f"{name}.npy": array_file(array)})
    )
    try:
        stats = CalibrationStats.load(folder / "stats.npz")
    except StatsError:
        return
    whole_stats(stats, folder)


@pytest.mark.parametrize("field", ["setting", "model", "prompt_ids", "component"])
def test_statistics_that_could_not_be_written_are_refused_when_made(field: str) -> None:
    good = getattr(STATS, field)
    bad: Any = SURROGATE
    if isinstance(good, dict):
        bad = good | {"architecture": SURROGATE}
    elif isinstance(good, tuple):
        bad = (good[0], SURROGATE)
    fields = {name: getattr(STATS, name) for name in STATS.__dataclass_fields__}
    with pytest.raises(StatsError, match=f"{field}.*ud800"):
        CalibrationStats(**fields | {field: bad})


def exits(*arguments: object) -> None:
    """The command ends with a documented exit code and no traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code in EXIT_CODES, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    if result.exit_code:
        assert result.stderr


@some
@given(data=st.data())
def test_commands_end_with_an_exit_code(
    folder: Path, members: dict[str, bytes], data: st.DataObject
) -> None:
    plan, stats = folder / "plan.json", folder / "stats.npz"
    plan.write_bytes(data.draw(st.sampled_from(PLANS).flatmap(texts_of)))
    stats.write_bytes(
        archive_of(members) if data.draw(st.booleans()) else data.draw(stats_files(members))
    )
    exits("inspect", plan)
    exits("inspect", plan, "--json")
    exits("inspect", stats)
    exits("check", plan, "--stats", stats)
    exits("check", plan, "--stats", stats, "--json")
    exits("merge", stats, "--out", folder / "merged.npz", "--json")
    exits("compile", stats, "--budget", "0.6", "--out", folder / "compiled.json")


@some
@given(value=values)
def test_pipeline_arguments_of_any_text_end_with_an_exit_code(folder: Path, value: Any) -> None:
    exits("check", folder / "none.json", "--call", json.dumps(value))


@pytest.mark.parametrize("option", ["--forced", "--sigmas", "--units", "--budget"])
@pytest.mark.parametrize("text", ["a", "1,,x", "nan", "inf", "1e999", "-1", "9" * 30, "0.5.5", ","])
def test_options_of_any_text_end_with_an_exit_code(
    folder: Path, members: dict[str, bytes], option: str, text: str
) -> None:
    (folder / "good.npz").write_bytes(archive_of(members))
    budget = [] if option == "--budget" else ["--budget", "0.6"]
    out = folder / "compiled.json"
    exits("compile", folder / "good.npz", *budget, f"{option}={text}", "--out", out)


@pytest.mark.parametrize("name", ["é.json", "\udcff.json"])
def test_names_that_no_terminal_can_show_end_with_an_exit_code(
    folder: Path, members: dict[str, bytes], name: str
) -> None:
    exits("inspect", folder / name)
    Plan.from_dict(PLANS[0]).save(folder / name)
    (folder / "good.npz").write_bytes(archive_of(members))
    exits("check", folder / name, "--stats", folder / "good.npz")
    (folder / name).unlink()


@pytest.mark.parametrize("load", [Plan.load, CalibrationStats.load])
@pytest.mark.parametrize("name", [SURROGATE, "a\0b"])
def test_names_that_no_file_has_are_refused(load: Any, name: str) -> None:
    with pytest.raises(LayerCacheError):
        load(name)
