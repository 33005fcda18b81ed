"""No module sets an attribute of an object that another module has made.

What an object needs is passed when it is made, so that nobody reads a half-built one.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "autobatch"

# Attributes that may be set from anywhere, with the reason.
ALLOWED = {
    "grad": "torch keeps gradients on the parameters, and optimizers read them there",
    "training": "torch keeps the mode on the modules",
    "data": "torch exchanges the memory of a tensor through this attribute",
    "state": "NumPy's and torch's own way to restore a generator or an optimizer",
    "__signature__": "a decorator describes the function that it decorates",
    "__doc__": "a decorator describes the function that it decorates",
}
# Attributes that one module may set, with the reason.
ALLOWED_IN = {
    "api.accumulator": {"micro_batch_size": "the setter of the public property micro_batch"},
    "compat.torch_settings": {
        "enabled": "a global setting of torch",
        "benchmark": "a global setting of torch",
    },
    "display": {"width": "rich has no argument for an unlimited width of a terminal's console"},
    "isolation.serialization": {"step": "torch's schedulers wrap the method step of an optimizer"},
    "prediction.activation_checkpointing": {"forward": "the wrapped forward is the feature"},
    "prediction.fake_cuda": {"_autobatch_nan_check": "a fake tensor carries its own mark"},
    "prediction.tracing_process": {"persistent_id": "the documented hook of a pickler"},
    "training.engine.step_runner": {"skipped": "restored from the state dict of the runner"},
}
LOSSES = ("batch_independence", "batch_loss", "model_loss", "supervised")
ALLOWED_IN |= {
    f"training.losses.{name}": {
        "seen": "restored from the state dict of the objective, which owns its schedule",
        "passed": "restored from the state dict of the objective, which owns its schedule",
    }
    for name in LOSSES
}


def assigned(node: ast.AST) -> Iterator[ast.expr]:
    """The targets of an assignment, without tuples around them."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        targets = [node.optional_vars]
    else:
        return
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]


def declared(tree: ast.Module) -> set[str]:
    """The attributes of the classes of a module: fields, and what their methods set on ``self``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = [target for line in node.body for target in assigned(line)]
            found |= {target.id for target in fields if isinstance(target, ast.Name)}
            found |= {
                target.attr
                for inside in ast.walk(node)
                for target in assigned(inside)
                if isinstance(target, ast.Attribute) and is_own(target)
            }
    return found


def is_own(target: ast.Attribute) -> bool:
    return isinstance(target.value, ast.Name) and target.value.id in ("self", "cls")


def injected(tree: ast.Module) -> Iterator[str]:
    """The attributes that a module sets on objects of classes that it does not define."""
    own = declared(tree)
    for node in ast.walk(tree):
        for target in assigned(node):
            if isinstance(target, ast.Attribute) and not is_own(target) and target.attr not in own:
                yield target.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.args[1] if node.func.id in ("setattr", "delattr") else None
            if isinstance(name, ast.Constant):
                yield str(name.value)


MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_sets_no_attribute_of_an_object_of_another_module(module: str) -> None:
    found = set(injected(ast.parse(MODULES[module].read_text())))
    assert found <= ALLOWED.keys() | ALLOWED_IN.get(module, {}).keys()


def test_every_exception_is_needed() -> None:
    found = {module: set(injected(ast.parse(file.read_text()))) for module, file in MODULES.items()}
    assert set().union(*found.values()) >= ALLOWED.keys()
    for module, entries in ALLOWED_IN.items():
        assert found[module] >= entries.keys(), module


@pytest.mark.parametrize(
    "code",
    [
        "def make(runner, evaluator):\n    evaluator.limited = runner.limited",
        "class A:\n    def __init__(self, other):\n        other.part.size += 1",
        "def both(a, b):\n    a.x, b.y = 1, 2",
        "def named(a):\n    setattr(a, 'x', 1)",
    ],
)
def test_an_injection_is_seen(code: str) -> None:
    assert set(injected(ast.parse(code))) & {"limited", "size", "x"}
    assert not set(injected(ast.parse("class A:\n    def __init__(self):\n        self.x = 1")))
