"""Files in model repositories: folders, and the Hugging Face hub through `huggingface_hub`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercache.errors import LayerCacheError, PlanError, of_network

START, END = "<!-- layercache: begin -->", "<!-- layercache: end -->"
"""What stands between is LayerCache's; what is outside stays as it is."""
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_INSTALL = "pip install 'layercache-flow[hub]'"


def located(
    repo_or_path: str | os.PathLike[str],
    filename: str,
    subfolder: str | None,
    revision: str | None,
    options: Mapping[str, Any],
) -> Path:
    """The local path of a file in a folder, or in a repository of the hub.

    Raises:
        PlanError: There is none, or the hub cannot be reached.
    """
    place = Path(repo_or_path)
    if place.is_file():
        return place
    if place.is_dir():
        path = place / (subfolder or "") / filename
        if not path.is_file():
            found = sorted(p.relative_to(place).as_posix() for p in place.rglob("*plan*.json"))[:5]
            there = f"; there are {', '.join(found)}: pass filename=" if found else ""
            raise PlanError(f"{path}: no such file{there}")
        return path
    name = os.fspath(repo_or_path)
    if not _REPOSITORY.fullmatch(str(name)):
        raise PlanError(f"{name!r} is no folder, no file and no name of a repository (owner/name)")
    hub = _huggingface_hub(f"to read {filename} from the repository {name!r}")
    try:
        path = hub.hf_hub_download(
            str(name), filename, subfolder=subfolder, revision=revision, **options
        )
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise PlanError(
            f"{filename} could not be had from the repository {name!r}"
            f"{f' at {revision}' if revision else ''}: {_first_line(error)}. Check the name, the "
            "file and the network, or pass a folder"
        ) from error
    except hub.errors.HFValidationError as error:
        raise PlanError(f"{name!r} is no name of a repository: {_first_line(error)}") from error
    except Exception as error:
        if not of_network(error):
            raise
        raise PlanError(
            f"the hub cannot be reached to read {filename} from {name!r}: {_first_line(error)}. "
            "Check the network, or pass a folder"
        ) from error
    return Path(path)


def pushed(
    repo_id: str,
    files: Mapping[str, bytes],
    section: str,
    *,
    message: str,
    revision: str | None,
    create_pr: bool,
    private: bool | None,
    options: Mapping[str, Any],
) -> str:
    """Put files and a section of the model card into a repository, in one commit."""
    hub = _huggingface_hub(f"to write to the repository {repo_id!r}")
    api = hub.HfApi(**options)
    try:
        if not create_pr:
            api.create_repo(repo_id, exist_ok=True, private=private)
        card = ""
        if api.file_exists(repo_id, "README.md", revision=revision):
            card = Path(
                hub.hf_hub_download(repo_id, "README.md", revision=revision, **options)
            ).read_text(encoding="utf-8")
        contents = {**files, "README.md": with_section(card, section).encode()}
        commit = api.create_commit(
            repo_id,
            [hub.CommitOperationAdd(path, data) for path, data in contents.items()],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        raise PlanError(
            f"the repository {repo_id!r} could not be written: {_first_line(error)}. Check its "
            "name and your token (`hf auth login`), or pass create_pr=True for one of others"
        ) from error
    except Exception as error:
        if not of_network(error):
            raise
        raise PlanError(
            f"the hub cannot be reached to write {repo_id!r}: {_first_line(error)}. Check the "
            "network, or write to a folder with save_pretrained(folder) and upload that"
        ) from error
    return str(commit.pr_url or commit.commit_url)


def with_section(card: str, section: str) -> str:
    """A model card with the section in the place of an earlier one, or at its end."""
    block = f"{START}\n{section.strip()}\n{END}"
    before, found, rest = card.partition(START)
    if not found:
        return f"{card.rstrip()}\n\n{block}\n" if card.strip() else block + "\n"
    _, ended, after = rest.partition(END)
    if not ended:
        raise PlanError(
            f"the model card has {START!r} without {END!r}: remove the first, or put in the second"
        )
    return before + block + after


def _huggingface_hub(why: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise LayerCacheError(f"huggingface_hub is needed {why}: {_INSTALL}") from error
    return huggingface_hub


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
