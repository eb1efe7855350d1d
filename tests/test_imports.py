"""Imports point one way, and what runs without torch does not import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "layercache"

# Which parts of the package each part may import, at module level or inside functions.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "_json": set(),
    "_write": set(),
    "stats": {"errors", "_json", "_write"},
    "options": {"errors"},
    "_plan_rows": {"errors"},
    "costs": {"stats", "_plan_rows"},
    "_plan_parts": {"errors", "stats", "costs", "_plan_rows"},
    "_version": set(),
    "_hub": {"errors"},
    "_json_file": {"errors", "_json", "_write", "_hub", "_card", "_plan_rows"},
    "plan": {
        "errors", "_json", "_json_file", "_version", "stats", "options", "costs", "_plan_parts",
        "_plan_rows",
    },
    "plan_set": {"errors", "_json_file", "plan"},
    "_card": {"plan"},
    "solver": {"errors"},
    "prediction": {"errors", "stats", "costs", "solver"},
    "paying": {"stats", "costs", "prediction"},
    "_verify_error": {"stats", "_plan_rows"},
    "verify": {"errors", "stats", "plan", "_verify_error"},
    "_fit_rows": {"errors", "stats", "options", "plan", "prediction"},
    "compile": {
        "errors", "stats", "options", "costs", "plan", "_fit_rows", "solver", "prediction",
        "verify",
    },
    "retarget": {"errors", "stats"},
    "choices": {"errors", "stats", "options", "plan", "compile"},
    "models": {"errors"},
    "calibration": {"errors", "stats", "models"},
    "runtime": {"errors", "costs", "plan", "plan_set", "models"},
    "reference": {"errors"},
    "refine": {
        "errors", "stats", "costs", "plan", "prediction", "verify", "models", "calibration",
        "runtime", "evaluation",
    },
    "evaluation": {
        "errors", "_json", "_write", "stats", "options", "costs", "plan", "prediction", "choices",
        "models", "paying",
        "compile", "calibration", "runtime", "reference",
    },
    "cli": {
        "choices", "errors", "_json", "_write", "stats", "options", "plan", "plan_set", "compile",
        "prediction", "retarget", "models", "calibration", "runtime", "evaluation", "reference",
        "refine", "paying",
    },
    "__main__": {"cli"},
    "__init__": {"_version", "errors", "stats", "plan", "plan_set", "options", "compile"},
}  # fmt: skip
TORCH_FREE = (
    "errors", "_json", "_write", "stats", "options", "_plan_rows", "_plan_parts", "costs", "_hub",
    "_version", "_card", "_json_file",
    "plan", "plan_set", "solver", "prediction",
    "verify", "_verify_error", "paying", "_fit_rows", "compile", "choices", "retarget", "cli",
    "__init__",
)  # fmt: skip
HEAVY = {"torch", "diffusers", "transformers", "torchmetrics", "matplotlib", "PIL"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = str(node.module)
            # `from layercache import plan` imports a part, not a name of the package.
            found |= (
                {f"{module}.{a.name}" for a in node.names} if module == "layercache" else {module}
            )
    return found


def crosses(path: Path, name: str) -> bool:
    """Whether a file imports the underscored module of another part of the package."""
    parts = name.split(".")
    mine = ["layercache", *path.relative_to(PACKAGE).with_suffix("").parts]
    hidden = next((i for i, part in enumerate(parts) if part[:1] == "_" and part[:2] != "__"), 0)
    return hidden > 0 and parts[:hidden] != mine[:hidden]


def top_level(tree: ast.Module) -> ast.Module:
    """The statements that run on import, without `if TYPE_CHECKING` blocks."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return ast.Module(body=kept, type_ignores=[])


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: say here what it may import"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = imports(tree)
    used = {name.split(".")[1] for name in found if name.startswith("layercache.")}
    assert used <= ALLOWED[part] | {part}
    assert not {name.split(".")[0] for name in found} & {"bench", "tests"}, "not installed"


# What models hides from users it shares with calibration and the runtime.
SHARED = {"layercache.models._foreign"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_underscored_modules_are_imported_within_their_part_only(path: Path) -> None:
    found = imports(ast.parse(path.read_text(encoding="utf-8")))
    wrong = {name for name in found if name.startswith("layercache.") and crosses(path, name)}
    assert wrong <= SHARED


@pytest.mark.parametrize("part", TORCH_FREE)
def test_torch_free_parts_import_nothing_heavy_when_imported(part: str) -> None:
    for path in sources():
        if part_of(path) == part:
            tree = top_level(ast.parse(path.read_text(encoding="utf-8")))
            assert not {name.split(".")[0] for name in imports(tree)} & HEAVY, path.name


def test_the_solver_imports_only_numpy_and_in_milp_scipy() -> None:
    for path in sources():
        if part_of(path) == "solver":
            roots = {name.split(".")[0] for name in imports(ast.parse(path.read_text("utf-8")))}
            third_party = roots - set(sys.stdlib_module_names) - {"layercache"}
            assert third_party <= ({"numpy", "scipy"} if path.stem == "milp" else {"numpy"})


@pytest.mark.parametrize(
    "module",
    ["layercache", "layercache.compile", "layercache.cli", "layercache.runtime.executor"],
)
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(sorted(set(sys.modules) & {HEAVY!r}) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_rules_catch_a_wrong_import() -> None:
    tree = ast.parse("from layercache import plan\nimport layercache.solver.dp\n")
    assert imports(tree) == {"layercache.plan", "layercache.solver.dp"}
