"""Plans in folders of models and in repositories of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layercache import BudgetError, LayerCacheError, Plan, PlanError, PlanSet, compile_plan, pareto
from layercache._hub import END, START, with_section
from layercache.stats import CalibrationStats
from tests.hub_server import Repositories, running
from tests.prediction.oracle import polynomial_stats


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    return polynomial_stats(2)


@pytest.fixture(scope="module")
def plans(stats: CalibrationStats) -> list[Plan]:
    return pareto(stats, [0.8, 0.5])


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[dict[str, Any], Repositories]]:
    """What to pass to reach the stand-in, and what it holds."""
    # The variable is read when the library is imported, which other tests may have done.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with running() as (endpoint, repositories):
        yield {"endpoint": endpoint, "token": "hf_x"}, repositories


def test_a_plan_goes_to_a_folder_and_comes_back(plans: list[Plan], tmp_path: Path) -> None:
    path = plans[0].save_pretrained(tmp_path)
    assert path == tmp_path / "layercache_plan.json"
    assert Plan.from_pretrained(tmp_path) == plans[0] == Plan.from_pretrained(path)
    plans[1].save_pretrained(tmp_path, filename="fast.json", subfolder="plans")
    assert Plan.from_pretrained(tmp_path, filename="fast.json", subfolder="plans") == plans[1]


def test_a_missing_file_in_a_folder_is_named_with_what_is_there(
    plans: list[Plan], tmp_path: Path
) -> None:
    plans[0].save(tmp_path / "my_plan.json")
    with pytest.raises(PlanError) as caught:
        Plan.from_pretrained(tmp_path)
    assert "layercache_plan.json" in str(caught.value) and "my_plan.json" in str(caught.value)
    with pytest.raises(PlanError):
        Plan.from_pretrained(tmp_path / "no" / "such" / "folder")


def test_a_plan_goes_to_the_hub_and_comes_back(
    plans: list[Plan], hub: tuple[dict[str, Any], Repositories], tmp_path: Path
) -> None:
    options, repositories = hub
    address = plans[0].push_to_hub("me/model", picture=b"png", prompts_license="CC0", **options)
    assert address.endswith("/me/model/commit/1")
    files = repositories["me/model"]
    assert set(files) == {"layercache_plan.json", "layercache_plan.png", "README.md"}
    card = files["README.md"].decode()
    for needed in ("me/model", "CC0", "layercache_plan.png", f"{plans[0].predicted.speedup:.2f}x"):
        assert needed in card
    found = Plan.from_pretrained("me/model", cache_dir=tmp_path, **options)
    assert found == plans[0]
    # From the cache, with nothing at the other end.
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    assert Plan.from_pretrained("me/model", **offline) == plans[0]


def test_a_push_keeps_the_rest_of_the_card(
    plans: list[Plan], hub: tuple[dict[str, Any], Repositories]
) -> None:
    options, repositories = hub
    repositories["me/model"] = {"README.md": b"---\nlicense: mit\n---\n# Mine\n"}
    for plan in plans:
        plan.push_to_hub("me/model", **options)
    card = repositories["me/model"]["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n---\n# Mine\n")
    assert card.count(START) == card.count(END) == 1
    assert f"{plans[1].predicted.speedup:.2f}x" in card


def test_a_pull_request_is_opened_where_one_is_asked_for(
    plans: list[Plan], hub: tuple[dict[str, Any], Repositories]
) -> None:
    options, repositories = hub
    repositories["them/model"] = {}
    assert "discussions" in plans[0].push_to_hub("them/model", create_pr=True, **options)


@pytest.mark.parametrize(
    ("repository", "arguments"),
    [
        ("me/none", {}),
        ("me/empty", {}),
        ("me/empty", {"revision": "v9"}),
        ("not a name!", {}),
        ("a/b/c/d", {}),
    ],
)
def test_what_the_hub_does_not_have_is_one_error(
    repository: str,
    arguments: dict[str, Any],
    hub: tuple[dict[str, Any], Repositories],
    tmp_path: Path,
) -> None:
    options, repositories = hub
    repositories["me/empty"] = {}
    with pytest.raises(PlanError) as caught:
        Plan.from_pretrained(repository, cache_dir=tmp_path, **arguments, **options)
    assert repository in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_error(plans: list[Plan], tmp_path: Path) -> None:
    # Nothing listens on port 1.
    options = {"endpoint": "http://127.0.0.1:1", "token": "hf_x"}
    for create_pr in (False, True):
        with pytest.raises(PlanError) as caught:
            plans[0].push_to_hub("me/model", create_pr=create_pr, **options)
        assert "me/model" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(PlanError, match="me/model"):
        Plan.from_pretrained("me/model", cache_dir=tmp_path, etag_timeout=0.1, **options)


def test_without_the_library_folders_work_and_the_hub_says_what_to_install(
    plans: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    plans[0].save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == plans[0]
    with pytest.raises(LayerCacheError, match=r"layercache-flow\[hub\]"):
        Plan.from_pretrained("me/model")


def test_half_a_section_is_refused() -> None:
    with pytest.raises(PlanError):
        with_section(f"# Mine\n{START}\nold", "new")


# -- sets ----------------------------------------------------------------------------------------


def test_a_set_holds_plans_and_finds_one_by_budget(plans: list[Plan], tmp_path: Path) -> None:
    whole = PlanSet(plans=tuple(plans))
    whole.save_pretrained(tmp_path)
    assert PlanSet.from_pretrained(tmp_path) == whole
    assert whole.at(0.8).plans == (plans[0],)
    assert whole.at(0.6).plans == (plans[1],)
    assert whole.at(plans[1].budget).plans == (plans[1],)
    with pytest.raises(BudgetError):
        whole.at(0.1)
    assert len(whole.summary().splitlines()) == 3


def test_a_set_keeps_one_plan_for_every_schedule(stats: CalibrationStats) -> None:
    levels = [float(s) for s in np.linspace(1, 0, stats.num_steps // 2 + 1)]
    other = compile_plan(stats, 0.8, sigmas=levels)
    both = PlanSet(plans=(*pareto(stats, [0.9, 0.6]), other))
    assert [plan.num_steps for plan in both.at(0.8).plans] == [stats.num_steps, len(levels) - 1]


def test_a_set_is_of_one_model(plans: list[Plan]) -> None:
    other = plans[0].to_dict()
    other["model"]["architecture"] = "another"
    data = {"schema_version": 1, "plans": [plans[0].to_dict(), other]}
    with pytest.raises(PlanError, match=r"plans\[1\]"):
        PlanSet.from_dict(data)


def test_a_plan_read_as_a_set_says_so(plans: list[Plan], tmp_path: Path) -> None:
    plans[0].save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="plan set"):
        PlanSet.load(tmp_path / "plan.json")
