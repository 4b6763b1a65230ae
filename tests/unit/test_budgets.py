"""The rules of CONTRIBUTING.md that a linter does not know, read from the sources' syntax trees.

Layers and whole external packages are import-linter's (`make check`). It sees an external package
as one node, so the rules about a part of one (`megatron.core.parallel_state`) are here. Each rule
is a function from a source to findings, and is tried on a made-up offender first.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LOOP_LINES = 150
LOOP = "minitron/train/loop.py"


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the root of the repository, its text and its syntax tree."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def in_package(self) -> bool:
        return self.path.startswith("minitron/")


Rule = Callable[[Source], Iterator[str]]


def _docstring_lines(node: ast.AST) -> int:
    body = getattr(node, "body", [])
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        first = body[0]
        if isinstance(first.value.value, str):
            return (first.end_lineno or first.lineno) - first.lineno + 1
    return 0


def _dotted(node: ast.AST) -> str:
    """`a.b.c` for an attribute chain on a name, an empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported: `from a.b import c` gives `a.b.c`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _used_names(source: Source) -> Iterator[tuple[int, str]]:
    """Imports, and attribute chains such as `os.environ` with import aliases resolved."""
    aliases: dict[str, str] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    yield from _imports(source)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node)):
            head, _, rest = name.partition(".")
            yield node.lineno, f"{aliases.get(head, head)}.{rest}"


def file_size(source: Source) -> Iterator[str]:
    limit = MAX_LOOP_LINES if source.path == LOOP else MAX_FILE_LINES
    lines = len(source.text.splitlines())
    if lines > limit:
        yield f"{source.path}: {lines} lines, limit {limit}"


def function_size(source: Source) -> Iterator[str]:
    """From `def` to the last line, decorators and the docstring not counted."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - _docstring_lines(node)
            if lines > MAX_FUNCTION_LINES:
                where = f"{source.path}:{node.lineno}: {node.name}"
                yield f"{where} has {lines} lines, limit {MAX_FUNCTION_LINES}"


def no_print(source: Source) -> Iterator[str]:
    """The package speaks through its logger; the report's console writer has `console.print`."""
    if not source.in_package:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and _dotted(node.func) in {"print", "builtins.print"}:
            yield f"{source.path}:{node.lineno}: print(); use minitron.log or a console's print"


def ascii_only(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.isascii():
            found = sorted({character for character in line if not character.isascii()})
            yield f"{source.path}:{number}: not ASCII: {found!a}"


def todo_has_issue(source: Source) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type != tokenize.COMMENT:
            continue
        for mark in re.findall(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))", token.string):
            yield f"{source.path}:{token.start[0]}: {mark} without its issue: write {mark}(#12)"


def _only_in(name: str, *homes: str) -> Rule:
    """A rule: `name` (or what is below it) is used in files under `homes` only."""

    def rule(source: Source) -> Iterator[str]:
        if not source.in_package or source.path.startswith(homes):
            return
        for line, used in _used_names(source):
            if f"{used}.".startswith(f"{name}."):
                allowed = " or ".join(homes) or "no file"
                yield f"{source.path}:{line}: {used}; {name} belongs in {allowed}"

    return rule


RULES: dict[str, Rule] = {
    "file_size": file_size,
    "function_size": function_size,
    "no_print": no_print,
    "ascii_only": ascii_only,
    "todo_has_issue": todo_has_issue,
    "parallel_state": _only_in("megatron.core.parallel_state", "minitron/parallel/groups.py"),
    "environ": _only_in("os.environ", "minitron/runtime/env.py"),
    "getenv": _only_in("os.getenv", "minitron/runtime/env.py"),
    "putenv": _only_in("os.putenv", "minitron/runtime/env.py"),
    "transformer_engine": _only_in("transformer_engine", "minitron/compat/te.py"),
    "hydra": _only_in("hydra", "minitron/cli/", "minitron/config/"),
    "megatron_training": _only_in("megatron.training"),
}

# rule, path, text: each must be found.
OFFENDERS = [
    ("file_size", "minitron/a.py", "x = 1\n" * 401),
    ("file_size", LOOP, "x = 1\n" * 151),
    ("function_size", "minitron/a.py", "def f():\n" + "    x = 1\n" * 60),
    ("function_size", "tests/a.py", "class C:\n  async def f(self):\n" + "    x = 1\n" * 60),
    ("no_print", "minitron/a.py", "def f():\n    print('x')\n"),
    ("ascii_only", "minitron/a.py", "x = 1  # caf\u00e9\n"),
    ("todo_has_issue", "minitron/a.py", "x = 1  # TODO: later\n"),
    ("parallel_state", "minitron/a.py", "from megatron.core import parallel_state as mpu\n"),
    ("parallel_state", "minitron/a.py", "import megatron.core.parallel_state\n"),
    ("parallel_state", "minitron/a.py", "from megatron import core\ncore.parallel_state.f()\n"),
    ("parallel_state", "minitron/a.py", "from megatron.core.parallel_state import f\n"),
    ("environ", "minitron/a.py", "import os\nx = os.environ['X']\n"),
    ("environ", "minitron/a.py", "import os as o\nx = o.environ.get('X')\n"),
    ("environ", "minitron/a.py", "from os import environ\n"),
    ("getenv", "minitron/a.py", "import os\nx = os.getenv('X')\n"),
    ("putenv", "minitron/a.py", "import os\nos.putenv('X', '1')\n"),
    ("transformer_engine", "minitron/a.py", "import transformer_engine.pytorch as te\n"),
    ("hydra", "minitron/train/a.py", "def f():\n    from hydra import compose\n"),
    ("megatron_training", "minitron/a.py", "from megatron.training import get_args\n"),
]

# rule, path, text: each must pass.
LAWFUL = [
    ("file_size", "minitron/a.py", "x = 1\n" * 400),
    ("function_size", "minitron/a.py", "def f():\n" + "    x = 1\n" * 59),
    (
        "function_size",
        "minitron/a.py",
        'def f():\n    """A.\n\n    B.\n    """\n' + "    x = 1\n" * 59,
    ),
    ("todo_has_issue", "minitron/a.py", "x = '# TODO'\n"),
    ("no_print", "minitron/report/a.py", "console.print('x')\n"),
    ("no_print", "tests/a.py", "print('x')\n"),
    ("todo_has_issue", "minitron/a.py", "x = 1  # TODO(#12): later\n"),
    ("parallel_state", "minitron/parallel/groups.py", "from megatron.core import parallel_state\n"),
    ("environ", "minitron/runtime/env.py", "import os\nx = os.environ\n"),
    ("hydra", "minitron/cli/main.py", "import hydra\n"),
    ("hydra", "minitron/a.py", "import hydrate\nfrom minitron.hydra import x\n"),
]


def _sources() -> list[Source]:
    paths = sorted(p for top in ("minitron", "tests") for p in (ROOT / top).rglob("*.py"))
    return [Source(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in paths]


@pytest.mark.parametrize(("rule", "path", "text"), OFFENDERS)
def test_rule_finds_an_offender(rule: str, path: str, text: str) -> None:
    assert list(RULES[rule](Source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), LAWFUL)
def test_rule_lets_lawful_code_pass(rule: str, path: str, text: str) -> None:
    assert list(RULES[rule](Source(path, text))) == []


def test_every_rule_is_tried() -> None:
    assert {rule for rule, _, _ in OFFENDERS} == set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_sources_keep(rule: str) -> None:
    sources = _sources()
    assert any(source.path == "minitron/__init__.py" for source in sources)
    findings = [finding for source in sources for finding in RULES[rule](source)]
    assert not findings, "\n" + "\n".join(findings)


def test_no_folder_of_tests_has_a_name_that_pytest_passes_over(pytestconfig: pytest.Config) -> None:
    """Such as `dist`: its tests would not run, and nothing would say so."""
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    passed_over = {
        name for name in folders for pattern in pytestconfig.getini("norecursedirs") if fnmatch(name, pattern)
    }
    assert not passed_over
