"""docs/architecture.md says which module may import which; this holds it to the truth."""

import ast
import graphlib
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "autobatch"
ROW = re.compile(r"^\| `([\w.]+)` \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([\w.]+)`", cell))


TABLE = {
    module: (names(inside), names(outside))
    for module, inside, outside in ROW.findall((ROOT / "docs" / "architecture.md").read_text())
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name inside it: ``data.tree``."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] != "__init__":
            found[".".join(parts)] = file
    return found


def imports(file: Path) -> tuple[set[str], set[str]]:
    """What a module imports from the package, and from elsewhere beyond the standard library."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found = [node.module or ""]
            if node.module and (PACKAGE.parent / node.module.replace(".", "/")).is_dir():
                found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        for name in found:
            if name.partition(".")[0] == "autobatch":
                own.add(name.removeprefix("autobatch."))
            else:
                others.add(name.partition(".")[0])
    return own, others - sys.stdlib_module_names


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    assert TABLE.keys() == modules().keys()


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_what_its_row_says(module: str) -> None:
    assert imports(modules()[module]) == TABLE[module]


def test_no_module_imports_itself_through_others() -> None:
    graphlib.TopologicalSorter({module: row[0] for module, row in TABLE.items()}).prepare()


def room(module: str) -> str:
    """The folder of a module; the rooms of training are rooms, and a loose module is its own."""
    folder = module.rpartition(".")[0]
    return folder or module


def test_no_room_imports_itself_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for module, (inside, _) in TABLE.items():
        graph.setdefault(room(module), set()).update(set(map(room, inside)) - {room(module)})
    graphlib.TopologicalSorter(graph).prepare()


def test_search_and_training_never_import_each_other() -> None:
    for module, (inside, _) in TABLE.items():
        other = {"search": "training.", "training": "search."}.get(module.partition(".")[0])
        assert other is None or not any(name.startswith(other) for name in inside)


def test_only_display_knows_rich_and_search_knows_no_torch() -> None:
    assert [module for module, (_, outside) in TABLE.items() if "rich" in outside] == ["display"]
    assert TABLE["search.bracketing"][1] == set()
    assert TABLE["search.bracketing"][0] == {"results.search", "search.prior", "search.trial_bound"}
    assert TABLE["search.prior"] == TABLE["search.trial_bound"] == (set(), set())


def test_a_folder_is_no_crowd() -> None:
    folders = Counter(module.rpartition(".")[0] for module in modules())
    assert folders[""] <= 12, "loose modules at the top"
    assert max(folders.values()) <= 17, folders


def test_a_module_begins_with_one_sentence() -> None:
    for module, file in modules().items():
        docstring = ast.get_docstring(ast.parse(file.read_text()))
        assert docstring, f"{module} does not say what it is"
        first = docstring.partition("\n\n")[0]
        assert first.rstrip().endswith((".", ":")), f"{module} begins with {first!r}"


def test_each_file_of_a_walk_exists_and_is_named_once() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    walks = re.findall(r"^## How one .*?(?=^## )", page, re.MULTILINE | re.DOTALL)
    assert len(walks) == 3
    for walk in walks:
        files = re.findall(r"`([\w/]+\.py)`", walk)
        assert len(files) == len(set(files)) > 9
        assert all((PACKAGE / file).exists() for file in files), files
        assert len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) <= 10


def test_a_public_name_of_a_class_or_a_type_stands_for_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for module, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                name = node.name
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
            else:
                continue
            if name[0].isupper() and not name.isupper() and not name.startswith("_"):
                homes.setdefault(name, []).append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}
    assert homes["BatchGradient"] == ["training.engine.batch_gradient"], "the control"
