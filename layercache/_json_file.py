"""What plans and sets of plans have in common: a versioned JSON file, on a disk or on the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ValidationError

from layercache import _hub
from layercache._json import parse, require_plain
from layercache._plan_rows import Frozen
from layercache._write import write_file
from layercache.errors import PlanError


class JsonFile(Frozen):
    """A value that is read from and written to a JSON file with a `schema_version`."""

    VERSION: ClassVar[int]
    KIND: ClassVar[str]
    FILE_NAME: ClassVar[str]
    """What the file is called in a model's repository."""
    MAX_BYTES: ClassVar[int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back to an equal value."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Validate plain values.

        Raises:
            PlanError: The version is unknown, or a value is wrong; the message gives its path.
        """
        try:
            require_plain(data, cls.KIND)
        except ValueError as error:
            raise PlanError(str(error)) from error
        found = data.get("schema_version") if isinstance(data, Mapping) else None
        if found is None:
            raise PlanError(f"this is no {cls.KIND}: it has no schema_version")
        if type(found) is not int or found != cls.VERSION:
            raise PlanError(
                f"the {cls.KIND} has schema_version {found!r}; this LayerCache reads version "
                f"{cls.VERSION}: upgrade LayerCache or compile again"
            )
        try:
            # As JSON, where a list may stand for a tuple but text for no number.
            return cls.model_validate_json(json.dumps(dict(data)), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            text = f"{cls.KIND}{path}: {first['msg']}{more}"
            # An unknown key may hold what no terminal can show.
            raise PlanError(text.encode("utf-8", "backslashreplace").decode()) from error

    def to_bytes(self) -> bytes:
        """The contents of the file: a line a row of cells."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return (_one_line_arrays(text) + "\n").encode()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: a reader sees the old one or the whole new one, and links stay."""
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and validate a file.

        Raises:
            PlanError: The file is missing, truncated, malformed, or of an unsupported version.
        """
        source = Path(path)
        try:
            if source.stat().st_size > cls.MAX_BYTES:
                size = source.stat().st_size
                raise PlanError(f"{path}: {size} bytes are no {cls.KIND}; refused")
            data = parse(source.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(f"{path}: no such {cls.KIND} file") from None
        except (OSError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                f"{path}: not a whole {cls.KIND} file ({error}); compile it again or restore a copy"
            ) from error
        if not isinstance(data, dict):
            raise PlanError(f"{path}: a {cls.KIND} is a JSON object, not a {type(data).__name__}")
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    # -- repositories of models ----------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | os.PathLike[str],
        *,
        filename: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        **hub: Any,
    ) -> Self:
        """Read the file that ships with a model.

        Args:
            repo_or_path: A folder, a file, or a repository of the Hugging Face hub such as
                `"someone/model"`. A folder or file needs no network and no `huggingface_hub`.
            filename: The file's name in it, if not the default one.
            subfolder: The folder in the repository that holds it.
            revision: Branch, tag or commit of the repository.
            hub: More arguments of `huggingface_hub.hf_hub_download`: `token`, `cache_dir`,
                `local_files_only` and so on.

        Raises:
            PlanError: There is no such file, it cannot be had, or it is malformed.

        Example:
            >>> from layercache import Plan
            >>> plan = Plan.from_pretrained("someone/model")  # doctest: +SKIP
        """
        name = cls.FILE_NAME if filename is None else filename
        return cls.load(_hub.located(repo_or_path, name, subfolder, revision, hub))

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        filename: str | None = None,
        subfolder: str | None = None,
    ) -> Path:
        """Write the file into a model's folder; returns its path."""
        path = Path(folder, subfolder or "", filename or self.FILE_NAME)
        self.save(path)
        return path

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        private: bool | None = None,
        prompts_license: str | None = None,
        picture: bytes | None = None,
        **hub: Any,
    ) -> str:
        """Put the file into a repository of the hub, with a section in its model card.

        The section (what the plan does, how it is used, how it was calibrated) stands between two
        marks in `README.md` and is written anew at every push; the rest of the card stays.

        Args:
            repo_id: The repository, such as `"someone/model"`; made if there is none.
            filename: The file's name in it, if not the default one.
            subfolder: The folder that holds it.
            revision: The branch.
            commit_message: Of the one commit.
            create_pr: Open a pull request, as one does for a repository of others.
            private: Whether a repository that is made is private.
            prompts_license: Licence of the calibration prompts, for the card.
            picture: A PNG of the plan, for the card.
            hub: Arguments of `huggingface_hub.HfApi`: `token`, `endpoint`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            PlanError: The hub refuses, or cannot be reached.
        """
        from layercache._card import section

        name = "/".join(part for part in (subfolder, filename or self.FILE_NAME) if part)
        files = {name: self.to_bytes()}
        image = None
        if picture is not None:
            image = name.removesuffix(".json") + ".png"
            files[image] = picture
        return _hub.pushed(
            repo_id,
            files,
            section(self._plans, repo_id, type(self).__name__, name, prompts_license, image),
            message=commit_message or f"Add {name}",
            revision=revision,
            create_pr=create_pr,
            private=private,
            options=hub,
        )

    @property
    def _plans(self) -> tuple[Any, ...]:
        """The plans in the file."""
        raise NotImplementedError


def _one_line_arrays(text: str) -> str:
    """Put every array of numbers on one line, so that a diff shows a row as a line."""
    # A raw line break cannot stand inside a JSON string, so no string is touched.
    return re.sub(r"\[\n[-+.0-9eE,\s]*\]", lambda match: " ".join(match[0].split()), text)
