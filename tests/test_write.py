"""Files are written whole, where their names lead, and to nothing odd; as root, too."""

from __future__ import annotations

import os
import pty
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from layercache import Plan, PlanSet, _write
from layercache._write import require_folder, require_writable, write_file
from layercache.cli import main
from layercache.stats import CalibrationStats
from tests.prediction.strategies import random_stats
from tests.test_plan_format import example

ROOT = os.geteuid() == 0


def test_a_new_file_and_its_folders_are_made_with_the_usual_mode(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b" / "file", b"new")
    path = tmp_path / "a" / "b" / "file"
    assert path.read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert [p.name for p in path.parent.iterdir()] == ["file"], "nothing is left beside it"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_mode_of_a_file_is_kept(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(not ROOT, reason="only root gives files away")
def test_the_owner_of_a_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 12345, 12346)
    write_file(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12346)


def test_links_stay_and_lead_to_what_is_written(tmp_path: Path) -> None:
    target, link, second = tmp_path / "real", tmp_path / "sub" / "link", tmp_path / "second"
    link.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to("../real")
    second.symlink_to(link)
    write_file(second, b"new")
    assert second.is_symlink() and link.is_symlink() and not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["real", "second", "sub"]


def test_a_link_that_leads_nowhere_yet_makes_its_target(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "later" / "file")
    write_file(link, b"new")
    assert link.is_symlink() and (tmp_path / "later" / "file").read_bytes() == b"new"


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links"):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "b").is_symlink()


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_file(tmp_path, b"new")
    (tmp_path / "file").write_bytes(b"")
    for check in (write_file, lambda path, _: require_writable(path)):
        with pytest.raises(NotADirectoryError):
            check(tmp_path / "file" / "inside", b"new")
    with pytest.raises(NotADirectoryError):
        require_folder(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
@pytest.mark.parametrize("through_link", [False, True])
def test_a_device_is_refused_and_stays(tmp_path: Path, through_link: bool) -> None:
    before = os.stat("/dev/full")
    path = Path("/dev/full")
    if through_link:
        path = tmp_path / "link"
        path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="is a device"):
        write_file(path, b"new")
    after = os.stat("/dev/full")
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_rdev, after.st_ino) == (before.st_rdev, before.st_ino)


@pytest.mark.skipif(not ROOT, reason="only root makes devices")
def test_a_block_device_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    try:
        os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(7, 250))
    except OSError as error:
        pytest.skip(f"devices cannot be made here: {error}")
    with pytest.raises(OSError, match="is no file"):
        write_file(path, b"new")
    assert stat.S_ISBLK(path.stat().st_mode)


def test_the_null_device_takes_everything_and_stays() -> None:
    write_file(os.devnull, b"new")
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)


def test_a_named_pipe_is_written_into(tmp_path: Path) -> None:
    pipe, data, read = tmp_path / "pipe", os.urandom(300_000), []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, data)
    reader.join(timeout=30)
    assert read == [data] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_terminal_is_written_into() -> None:
    leader, follower = pty.openpty()
    try:
        write_file(os.ttyname(follower), b"seen")
        assert os.read(leader, 10) == b"seen"
    finally:
        os.close(leader)
        os.close(follower)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "link"])
def test_stdout_that_leads_to_a_file_goes_on_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log"
    if name == "link":
        name = str(tmp_path / "link")
        os.symlink("/dev/stdout", name)
    code = (
        "import sys; from layercache._write import write_file; print('before');"
        f"write_file({name!r}, b'data\\n'); print('after')"
    )
    with open(path, "wb") as stream:
        subprocess.run([sys.executable, "-c", code], stdout=stream, check=True)
    assert path.read_text().splitlines() == ["before", "data", "after"]


def test_a_write_protected_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o444)
    if ROOT:  # who may write everything
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="write-protected"):
        write_file(path, b"new")
    with pytest.raises(PermissionError, match="write-protected"):
        require_writable(tmp_path / "new" if ROOT else path)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left")])
def test_what_breaks_off_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(_write.os, "fsync", fail)
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind) as caught:
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(path), "not that of the file beside it"


def test_everything_that_is_saved_goes_through_links(tmp_path: Path) -> None:
    plan = Plan.from_dict(example())
    plans = PlanSet.from_dict({"schema_version": 1, "plans": [example()]})
    for value in (plan, plans, random_stats(0)):
        target, link = tmp_path / f"{type(value).__name__}", tmp_path / "link"
        target.write_bytes(b"old")
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        value.save(link)
        assert link.is_symlink() and target.read_bytes() == value.to_bytes()
        assert type(value).load(target) == value or isinstance(value, CalibrationStats)


# -- `--out` of the commands ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def stats_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "stats.npz"
    random_stats(0).save(path)
    return path


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    Plan.from_dict(example()).save(path)
    return path


def commands(stats_file: Path, plan_file: Path) -> dict[str, list[str]]:
    return {
        "merge": ["merge", str(stats_file)],
        "compile": ["compile", str(stats_file), "--budget", "0.8"],
        "bundle": ["bundle", str(plan_file)],
        "explore": ["explore", str(stats_file)],
    }


@pytest.mark.parametrize("name", ["merge", "compile", "bundle", "explore"])
def test_a_dash_is_stdout_and_nothing_else_goes_there(
    name: str, stats_file: Path, plan_file: Path, tmp_path: Path
) -> None:
    command = commands(stats_file, plan_file)[name]
    file = tmp_path / "file"
    runner = CliRunner()
    assert runner.invoke(main, [*command, "--out", str(file)]).exit_code == 0
    result = runner.invoke(main, [*command, "--out", "-"])
    assert result.exit_code == 0, result.output
    assert result.stdout_bytes == file.read_bytes()
    both = runner.invoke(main, [*command, "--out", "-", "--json"])
    assert both.exit_code == 2 and both.stdout == ""


def test_a_file_whose_name_is_a_dash_can_be_written(
    plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["bundle", str(plan_file), "--out", "./-"])
    assert result.exit_code == 0 and (tmp_path / "-").exists()


def test_stdout_that_is_full_is_one_line(plan_file: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no such device here")
    for command in (["bundle", str(plan_file), "--out", "-"], ["inspect", str(plan_file)]):
        with open("/dev/full", "wb") as full:
            result = subprocess.run(
                [sys.executable, "-m", "layercache", *command],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert result.returncode == 1
        assert result.stderr == "Error: No space left on device\n"


def test_a_reader_that_leaves_is_no_error(plan_file: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "layercache", "inspect", str(plan_file)],
            stdout=write,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (1, b"")
