"""The laws of the design, read from the source: who imports whom, who prints, who rounds, and how long things are.

Every law walks the files that exist; a new room is under the law from its first commit.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("signround", "exporters")
RUNTIMES = {"gguf", "onnxruntime", "onnxruntime_genai", "xllamacpp", "llama_cpp", "gptqmodel", "optimum"}
HEAVY = RUNTIMES | {"onnx", "onnx_ir", "transformers", "datasets", "matplotlib"}
TUNER = {"signround.tuning", "signround.pipeline", "signround.calibration", "signround.blocks"}
MAX_FILE, MAX_FUNCTION = 500, 60
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported module or name, with its dots resolved."""

    target: str
    line: int
    lazy: bool  # inside a function, or for type checkers only


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of ours."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _walk_imports(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        else:
            yield from _walk_imports(child, lazy or isinstance(child, Function) or _typing_only(child))


def imports(module: str) -> Iterator[Import]:
    for node, lazy in _walk_imports(tree(module), lazy=False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        else:
            package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(name if name in modules() else base, node.lineno, lazy)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def room(module: str) -> str:
    """`signround.tuning.loop` -> `signround.tuning`."""
    return ".".join(module.split(".")[:2])


def calls(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, ast.Call))


def called(call: ast.Call) -> str:
    return ast.unparse(call.func)


def place(module: str, line: int) -> str:
    return f"{modules()[module].relative_to(ROOT)}:{line}"


def functions(module: str) -> Iterator[Function]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, Function))


ours = pytest.mark.parametrize("module", modules())
core = pytest.mark.parametrize("module", [name for name in modules() if within(name, {"signround"})])
writers = pytest.mark.parametrize("module", [name for name in modules() if within(name, {"exporters"})])


# ---- rooms


@pytest.mark.parametrize("unit", [room, str], ids=["rooms", "modules"])
def test_rooms_form_a_line(unit: type[str]) -> None:
    """No two rooms (and no two modules) import each other, not even through others, not even inside a function."""
    graph: dict[str, set[str]] = {}
    for module in modules():
        targets = {unit(entry.target) for entry in imports(module) if entry.target in modules()}
        graph.setdefault(unit(module), set()).update(targets - {unit(module)})
    try:
        line = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert set(line) == {unit(module) for module in modules()}


@core
def test_signround_does_not_know_the_exporters(module: str) -> None:
    """The CLI finds them through entry points."""
    assert [place(module, entry.line) for entry in imports(module) if within(entry.target, {"exporters"})] == []


@ours
def test_runtimes_and_transformers_are_imported_where_they_are_used(module: str) -> None:
    early = [entry for entry in imports(module) if not entry.lazy and within(entry.target, HEAVY)]
    assert [f"{place(module, entry.line)} {entry.target}" for entry in early] == []


@writers
def test_exporters_do_not_know_the_tuner(module: str) -> None:
    wrong = [entry for entry in imports(module) if within(entry.target, TUNER)]
    assert [f"{place(module, entry.line)} {entry.target}" for entry in wrong] == []


def test_importing_stays_light() -> None:
    """One fresh interpreter (this one has everything loaded) imports room after room and tells what came along."""
    names = ["signround", "signround.grid", "exporters", *sorted(TUNER & modules().keys())]
    program = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, *({HEAVY} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == names


# ---- who may do what


@ours
def test_only_the_cli_prints_and_exits(module: str) -> None:
    if within(module, {"signround.cli"}):
        pytest.skip("the CLI draws, prints and exits")
    forbidden = {"print", "exit", "quit", "sys.exit", "os._exit", "os.abort", "sys.stdout.write", "sys.stderr.write"}
    wrong = [place(module, call.lineno) for call in calls(module) if called(call) in forbidden]
    raised = [
        place(module, node.lineno)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc)
    ]
    assert wrong + raised == []


@ours
def test_only_the_grid_rounds(module: str) -> None:
    if module == "signround.grid":
        pytest.skip("the only rounding in the project")
    forbidden = {"round", "round_", "rint", "around"}
    wrong = [
        f"{place(module, call.lineno)} {called(call)}"
        for call in calls(module)
        if isinstance(call.func, ast.Attribute) and call.func.attr in forbidden
    ]
    assert wrong == []


def test_the_grid_does_round() -> None:
    """So that the law above looks for what the grid really calls."""
    assert any(isinstance(call.func, ast.Attribute) and call.func.attr == "round" for call in calls("signround.grid"))


@ours
def test_no_blanket_except(module: str) -> None:
    wrong = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler):
            names = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else {"bare"}
            if names & {"bare", "Exception", "BaseException"}:
                wrong.append(place(module, node.lineno))
    assert wrong == []


@ours
def test_no_options_travel_unnamed(module: str) -> None:
    wrong = [place(module, function.lineno) for function in functions(module) if function.args.kwarg]
    assert wrong == []


@ours
def test_nothing_is_found_out_by_hasattr(module: str) -> None:
    assert [place(module, call.lineno) for call in calls(module) if called(call) == "hasattr"] == []


@ours
def test_no_pickle_and_no_remote_code(module: str) -> None:
    assert [entry.target for entry in imports(module) if within(entry.target, {"pickle", "dill", "cloudpickle"})] == []
    wrong = []
    for call in calls(module):
        loads = called(call) == "torch.load"
        trusts = any(
            keyword.arg == "trust_remote_code"
            and isinstance(keyword.value, ast.Constant)
            and keyword.value.value is True
            for keyword in call.keywords
        )
        if loads or trusts:
            wrong.append(place(module, call.lineno))
    assert wrong == []


# ---- sizes and names


@ours
def test_files_and_functions_are_short(module: str) -> None:
    lines = len(modules()[module].read_text().splitlines())
    assert lines <= MAX_FILE, f"{lines} lines"
    long = {
        f"{place(module, function.lineno)} {function.name}": size
        for function in functions(module)
        if (size := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION
    }
    assert long == {}


@ours
def test_each_module_says_what_it_does(module: str) -> None:
    source = tree(module)
    assert not source.body or ast.get_docstring(source), "a module opens with what it does"


@ours
def test_no_module_is_a_drawer(module: str) -> None:
    assert not {"utils", "util", "helpers", "helper", "common", "misc"} & set(module.split("."))


def test_the_laws_see_the_code() -> None:
    """A walk that finds nothing would keep every law."""
    assert {"signround.grid", "signround.plan", "exporters", "signround.runtimes.protocol"} <= modules().keys()
    targets = {entry.target for entry in imports("signround.artifact")}
    assert {"signround.plan", "signround.qtensor", "safetensors", "torch"} <= targets
    assert any(entry.lazy for entry in imports("signround.checkpoint"))
    assert not all(entry.lazy for entry in imports("signround.checkpoint"))
