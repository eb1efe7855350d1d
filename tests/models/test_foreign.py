"""Private names of other libraries: all in one file, and each still there in what is installed."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModularPipeline
from diffusers.hooks import HookRegistry
from torch import nn

from layercache.models import _foreign
from tests.tiny import tiny_transformer

PACKAGE = Path(_foreign.__file__).parents[1]
STANDARD = {"_fields", "_getframe"}
"""Of the standard library."""


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    made = FlowMatchEulerDiscreteScheduler()
    made.set_timesteps(4)
    return made


def begin_index() -> bool:
    made = scheduler()
    made.set_begin_index(2)
    return _foreign.first_index(made) == 2 and _foreign.first_index(scheduler()) == 0


def step_index() -> bool:
    made = scheduler()
    before = _foreign.counts_steps(made) and _foreign.running_index(made) is None
    made.step(torch.zeros(1), made.timesteps[0], torch.zeros(1))
    return before and _foreign.running_index(made) == 1


def call_slot() -> bool:
    module = nn.Identity()
    vars(module)[_foreign.CALL_SLOT] = lambda value: value + 1
    return int(module(1)) == 2 and int(_foreign.plain_call(module)(1)) == 1


def changes() -> bool:
    tensor = torch.zeros(1)
    before = _foreign.changes_of(tensor)
    tensor.add_(1)
    return before is not None and _foreign.changes_of(tensor) == before + 1


def storage() -> bool:
    one, other = torch.zeros(4), torch.zeros(4)
    keys = [_foreign.storage_key(t.untyped_storage()) for t in (one, one[1:], other)]
    return keys[0] == keys[1] != keys[2]


def hooks() -> bool:
    module = nn.Identity()
    before = _foreign.hook_registry(module)
    made = HookRegistry.check_if_exists_or_initialize(module)
    return before is None and _foreign.hook_registry(module) is made


def hook_references() -> bool:
    registry = HookRegistry.check_if_exists_or_initialize(nn.Identity())
    return hasattr(registry, "_fn_refs") and list(_foreign.hook_references(registry)) == []


def offloaded() -> bool:
    hook = ModelHook()
    hook.execution_device = "meta"
    return _foreign.execution_device(add_hook_to_module(nn.Identity(), hook)) == "meta"


def adapters() -> bool:
    model = tiny_transformer(1)
    return hasattr(model, "_hf_peft_config_loaded") and not _foreign.has_adapters(model)


def origin(folder: Path) -> bool:
    model = tiny_transformer(1)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    return _foreign.origin_of(loaded) == str(folder) and _foreign.origin_of(model) == ""


def compiled() -> bool:
    module = nn.Identity()
    wrapped = torch.compile(module)
    return _foreign.compiled_from(wrapped) is module and _foreign.compiled_from(module) is None


def bar() -> bool:
    class Pipeline(DiffusionPipeline):
        """Has nothing but its bar."""

    pipe = Pipeline()
    with _foreign.without_bar(pipe):
        quiet = pipe.progress_bar([]).disable
    return bool(quiet) and "_progress_bar_config" not in vars(pipe)


PROBES: dict[str, Callable[[], bool]] = {
    "_begin_index": begin_index,
    "_blocks": lambda: "self._blocks = " in inspect.getsource(ModularPipeline.__init__),
    "_call_impl": call_slot,
    "_cdata": storage,
    "_compiled_call_impl": call_slot,
    "_diffusers_hook": hooks,
    "_fn_refs": hook_references,
    "_hf_hook": offloaded,
    "_hf_peft_config_loaded": adapters,
    "_orig_mod": compiled,
    "_progress_bar_config": bar,
    "_python_dispatch": lambda: inspect.isclass(_foreign.TorchDispatchMode),
    "_pytree": lambda: _foreign.tree_leaves(([1], {"a": 2})) == [1, 2],
    "_step_index": step_index,
    "_version": changes,
}


@pytest.mark.parametrize("name", sorted(set(_foreign.NAMES) - {"_name_or_path"}))
def test_each_private_name_is_still_there(name: str) -> None:
    try:
        found = PROBES[name]()
    except AttributeError as error:
        pytest.fail(f"{name} ({_foreign.NAMES[name]}): {error}")
    assert found, f"{name} is no longer {_foreign.NAMES[name]}"


def test_the_name_of_a_checkpoint_is_still_there(tmp_path: Path) -> None:
    assert origin(tmp_path), f"_name_or_path is no longer {_foreign.NAMES['_name_or_path']}"


def test_a_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FlowMatchEulerDiscreteScheduler, "step")
    with pytest.raises(AttributeError, match="step"):
        step_index()


def private(name: object) -> bool:
    return isinstance(name, str) and name[:1] == "_" and name[1:2].isalpha() and name.isidentifier()


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def own_names() -> set[str]:
    """Private names that the package itself gives to anything."""
    found = {path.stem for path, _ in trees()} | {path.parent.name for path, _ in trees()}
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
    return {name for name in found if private(name)}


def used(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Private names that are read: attributes, modules, and text that names an attribute.

    With each, whether it is an attribute of `self` or `cls`, which may be the package's own.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            value = node.value
            yield node.attr, isinstance(value, ast.Name) and value.id in ("self", "cls")
        elif isinstance(node, ast.Call):
            function = node.func
            named = function.attr if isinstance(function, ast.Attribute) else ""
            if named in ("endswith", "startswith"):
                continue
            for argument in node.args:
                if isinstance(argument, ast.Constant) and private(argument.value):
                    yield argument.value, False
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("layercache"):
            yield from ((part, False) for part in str(node.module).split(".") if private(part))
            yield from ((alias.name, False) for alias in node.names if private(alias.name))


def test_no_other_file_uses_a_private_name_of_another_library() -> None:
    own = own_names()
    for path, tree in trees():
        if path.samefile(_foreign.__file__):
            continue
        for name, of_self in used(tree):
            foreign = name in _foreign.NAMES and not of_self
            unknown = name not in own | STANDARD
            assert not (foreign or unknown), f"{path}: {name} belongs into models/_foreign.py"


def test_the_rule_catches_private_names() -> None:
    text = "from torch._dynamo import config\nx._made_up\ngetattr(x, '_other')\nself._mine\n"
    assert {name for name, of_self in used(ast.parse(text)) if not of_self} == {
        "_dynamo", "_made_up", "_other",
    }  # fmt: skip
