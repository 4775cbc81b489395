"""Imports run one way: the table "Who may import whom" of docs/architecture.md, read from the code."""

import ast
import re
import subprocess
import sys
from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path

import pytest

from tiny_models import tiny_model
from tiny_server import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rtp_llm"


def rows_of_the_table() -> list[tuple[str, ...]]:
    """The rooms of each line of the table, lowest first: names in backquotes, paths below ``rtp_llm/``.

    A room may import only from lines above its own; rooms on one line do not see each other.
    """
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## Who may import whom", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if re.match(r"\| \d", line)]
    rows = [tuple(f"rtp_llm.{name.replace('/', '.')}" for name in re.findall(r"`([\w/]+)`", line)) for line in lines]
    assert len(rows) > 10, "docs/architecture.md: the table under 'Who may import whom' is gone"
    return [rows[0], ("rtp_llm",), *rows[1:]]  # the package's own __init__ sees the version alone


ROWS = rows_of_the_table()
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
# Rooms that stand side by side although one is on a later line.
STRANGERS = {("rtp_llm.srt.layers", "rtp_llm.srt.scheduler"), ("rtp_llm.srt.layers", "rtp_llm.srt.managers")}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """The room of ROWS that a module lies in. A package without a room of its own is an empty corridor."""
    if module == "rtp_llm":
        return module
    candidates = [room for room in ROW_OF if room != "rtp_llm" and (module == room or module.startswith(room + "."))]
    return max(candidates, key=len, default="")


class ImportReader(ast.NodeVisitor):
    """Collects (line, module) of every import of this package in a file, those inside functions and for types too.

    What lazily imports says in ``_HOMES`` where names live, and repeats it for type checkers: that is no import.
    ``rtp_llm.Engine`` after ``import rtp_llm`` counts as an import of the module that Engine lives in.
    """

    def __init__(self, module: str, is_package: bool) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.is_lazy = bool(lazy_homes(module))
        self.found: list[tuple[int, str]] = []
        self.module_of: dict[str, str] = {}  # name in this file -> the module it is bound to

    def visit_If(self, node: ast.If) -> None:
        if self.is_lazy and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(node.lineno, alias.name)
            name = alias.asname or alias.name.partition(".")[0]
            self.module_of[name] = alias.name if alias.asname else name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
        for alias in node.names:
            self.add(node.lineno, home_of(base, alias.name))
            self.module_of[alias.asname or alias.name] = f"{base}.{alias.name}"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in lazy_names():
            first, _, rest = ast.unparse(node.value).partition(".")
            package = ".".join(filter(None, (self.module_of.get(first, ""), rest)))
            if node.attr in lazy_homes(package):
                self.add(node.lineno, lazy_homes(package)[node.attr])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """``import_module("rtp_llm.x")`` and ``__import__("rtp_llm.x")`` are imports as well."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self.add(node.lineno, str(node.args[0].value))
        self.generic_visit(node)

    def add(self, line: int, module: str) -> None:
        if module == "rtp_llm" or module.startswith("rtp_llm."):
            self.found.append((line, module))


def home_of(base: str, name: str) -> str:
    """Where ``from base import name`` comes from: a module, a lazy name of a package's ``_HOMES``, or base itself."""
    if f"{base}.{name}" in MODULES:
        return f"{base}.{name}"
    return lazy_homes(base).get(name, base)


@cache
def lazy_homes(package: str) -> dict[str, str]:
    text = MODULES[package].read_text() if package in MODULES else ""
    if "_HOMES" not in text:
        return {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_HOMES":
            return ast.literal_eval(statement.value)
    return {}


@cache
def lazy_names() -> set[str]:
    """What any package imports lazily."""
    return {name for module, file in MODULES.items() if file.name == "__init__.py" for name in lazy_homes(module)}


@cache
def imports_of(module: str) -> list[tuple[int, str]]:
    file = MODULES[module]
    reader = ImportReader(module, file.name == "__init__.py")
    reader.visit(ast.parse(file.read_text(), str(file)))
    return reader.found


def is_allowed(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    return ROW_OF[imported] < ROW_OF[importer] and (importer, imported) not in STRANGERS


def test_every_module_has_a_room() -> None:
    homeless = [
        module for module, file in MODULES.items() if not room_of(module) and file.read_text().strip()
    ]  # empty __init__.py files need none
    assert not homeless, f"no row of the import table in docs/architecture.md holds {homeless}"


def test_imports_run_one_way() -> None:
    wrong = []
    for module in MODULES:
        for line, imported in imports_of(module):
            importer_room, imported_room = room_of(module), room_of(imported)
            assert imported in MODULES, f"{MODULES[module]}:{line} imports {imported}, which is no file of the package"
            assert imported_room, f"{MODULES[module]}:{line} imports {imported}, which no row of the table holds"
            if not is_allowed(importer_room, imported_room):
                wrong.append(
                    f"{MODULES[module].relative_to(ROOT)}:{line}: {importer_room} (row {ROW_OF[importer_room]}) "
                    f"must not import {imported} (row {ROW_OF[imported_room]})"
                )
    assert not wrong, "\n".join(wrong)


def import_cycles(imports: Mapping[str, Set[str]]) -> list[list[str]]:
    """The sets of modules in which each reaches each other, by Tarjan's algorithm (1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_modules: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        open_modules.append(module)
        for imported in sorted(imports.get(module, ())):
            if imported not in number:
                visit(imported)
            if imported in open_modules:
                lowest[module] = min(lowest[module], lowest[imported])
        if lowest[module] == number[module]:
            place = open_modules.index(module)
            members = open_modules[place:]
            del open_modules[place:]
            if len(members) > 1 or module in imports.get(module, ()):
                found.append(sorted(members))

    for module in imports:
        if module not in number:
            visit(module)
    return found


def test_no_files_import_each_other() -> None:
    circles = import_cycles({module: {imported for _, imported in imports_of(module)} for module in MODULES})
    assert not circles, "files that import each other, for types or else: " + "; ".join(map(", ".join, circles))


def test_cycles_are_found() -> None:
    imports = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"e", "torch"}, "f": {"a", "d"}}
    assert sorted(import_cycles(imports)) == [["a", "b", "c"], ["e"]]


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
from typing import TYPE_CHECKING
import rtp_llm.srt.plan
from rtp_llm import Engine
from rtp_llm.srt import messages
from ..cache.spec import CacheSpec
if TYPE_CHECKING:
    from rtp_llm.srt.layers.linear import LinearBase
def later():
    from rtp_llm.srt.utils import add_prefix
    import_module("rtp_llm.srt.engine.core")
    return rtp_llm.ModelRegistry
import rtp_llm.srt.utils as helpers
helpers.make_layers
"""
    reader = ImportReader("rtp_llm.srt.scheduler.scheduler", is_package=False)
    reader.visit(ast.parse(source))
    assert [module for _, module in reader.found] == [
        "rtp_llm.srt.plan",
        "rtp_llm.srt.entrypoints.engine",
        "rtp_llm.srt.messages",
        "rtp_llm.srt.cache.spec",
        "rtp_llm.srt.layers.linear",
        "rtp_llm.srt.utils.modules",
        "rtp_llm.srt.engine.core",
        "rtp_llm.srt.models.registry",
        "rtp_llm.srt.utils",
        "rtp_llm.srt.utils.modules",
    ]


def test_init_files_are_empty_but_for_the_lazy_ones() -> None:
    full = {module for module, file in MODULES.items() if file.name == "__init__.py" and file.read_text().strip()}
    assert full <= {"rtp_llm", "rtp_llm.srt.utils"}


def loaded_after(statement: str, suspects: tuple[str, ...]) -> list[str]:
    """Which of ``suspects`` a fresh process has loaded after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {suspects!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{statement} fails in a fresh process:\n{done.stderr}"
    return done.stdout.split()


@pytest.mark.parametrize(
    "module",
    [
        "rtp_llm.srt.scheduler.scheduler",
        "rtp_llm.srt.cache.radix_cache",
        "rtp_llm.srt.messages",
        "rtp_llm.srt.plan",
        "rtp_llm.srt.sampling_params",
    ],
)
def test_host_side_needs_no_torch(module: str) -> None:
    assert loaded_after(f"import {module}", ("torch", "transformers", "numpy")) == []


def test_a_configuration_is_read_without_the_code_of_transformers_models() -> None:
    read = "from rtp_llm.srt.configs.model_config import ModelConfig as C"
    suspects = ("torch._dynamo", "torch.distributed.tensor", "sympy", "triton", "transformers.modeling_utils")
    assert loaded_after(f"{read}\nC.from_pretrained({tiny_model('llama-default')!r})", suspects) == []


def test_blocks_of_weights_need_no_distributed_tensors() -> None:
    use = """
import torch
from rtp_llm.srt.kernels.block_tensor import BlockTensor, leave_out_distributed_tensors
leave_out_distributed_tensors()
weight = BlockTensor(torch.zeros(4, 34, dtype=torch.uint8), "Q8_0", torch.bfloat16)
assert torch.equal(torch.nn.Parameter(weight, requires_grad=False)[1:].data.values(), torch.zeros(3, 32).bfloat16())
"""
    assert loaded_after(use, ("torch.distributed.tensor", "sympy")) == []
    assert loaded_after(f"{use}from torch.distributed.tensor import DTensor, Replicate", ("sympy",)) == ["sympy"]


def test_the_server_of_a_text_model_needs_no_torch(tmp_path: Path) -> None:
    build = f"""
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.configs.text_only import takes_text_only
from rtp_llm.srt.utils.transformers_imports import hide_torch
args = ServerArgs(model_path={make_checkpoint(tmp_path)!r})
assert takes_text_only(args)
hide_torch()
from rtp_llm.srt.entrypoints.http_server import read_chat_template, read_end_tokens, read_model_config, read_tokenizer
config = read_model_config(args)
tokenizer = read_tokenizer(args, config)
read_chat_template(args, config, tokenizer), read_end_tokens(args, config, tokenizer)
assert tokenizer.decode(tokenizer("a text")["input_ids"]) == "a text"
"""
    assert loaded_after(build, ("torch", "transformers.modeling_utils")) == []


def test_the_offline_engine_of_text_needs_no_web_framework_no_sockets_and_no_compiler() -> None:
    generate = (
        f"from rtp_llm import Engine\n"
        f"with Engine(model_path={tiny_model('llama-default')!r}, skip_tokenizer_init=True) as engine:\n"
        f"    engine.generate(input_ids=[1, 2], sampling_params={{'max_new_tokens': 2}})"
    )
    suspects = ("fastapi", "starlette", "uvicorn", "zmq", "msgspec", "cloudpickle", "rich")
    compilers = ("torch._dynamo", "triton", "transformers.modeling_utils")
    assert loaded_after(generate, suspects + compilers) == []


def test_importing_the_package_costs_nothing() -> None:
    assert loaded_after("import rtp_llm", ("torch", "transformers", "numpy", "rich")) == []
