"""Reading a model file of another engine, and the siblings that it imports from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import libcst as cst

from rtp_llm.port.visiting import Visitor

Statement = cst.BaseStatement | cst.SimpleStatementLine


class PortError(ValueError):
    """The file cannot be ported or read; the message says why and what to do."""


@dataclass(frozen=True)
class Convention:
    """Where an engine keeps its models, and what of their siblings belongs to the engine itself.

    Attributes:
        models: packages of models; files that stand alone count as the first's.
        configs: packages of configuration classes.
        config_table: the module that says which of them are known by a model type.
        engine_modules: files beside the models whose names the vocabulary knows.
    """

    name: str
    package: str
    models: tuple[str, ...]
    configs: tuple[str, ...]
    config_table: str
    engine_modules: frozenset[str]


VLLM = Convention(
    "vllm",
    "vllm",
    ("vllm.model_executor.models", "vllm.models"),
    ("vllm.transformers_utils.configs",),
    "vllm.transformers_utils.config",
    frozenset({"utils", "interfaces", "interfaces_base", "adapters", "vision", "registry", "module_mapping"}),
)
SGLANG = Convention(
    "sglang", "sglang", ("sglang.srt.models",), ("sglang.srt.configs",), "", frozenset({"registry", "utils"})
)
CONVENTIONS = {convention.name: convention for convention in (VLLM, SGLANG)}


@dataclass(frozen=True)
class Origin:
    """Where an imported name comes from: ``from module import name``, or ``import module`` if ``name`` is None.

    ``is_optional``: it is imported where something else is not there, so it may be missing.
    """

    module: str
    name: str | None = None
    is_optional: bool = False

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass
class SourceFile:
    """A parsed file.

    Attributes:
        module: its dotted name in its engine's package.
        imports: local names -> where they come from; inside functions and under ``TYPE_CHECKING`` too.
        definitions: names bound at the top level -> positions in ``tree.body`` of the statements that bind them.
    """

    path: Path
    module: str
    tree: cst.Module
    imports: dict[str, Origin] = field(default_factory=dict)
    definitions: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shadowed = self._name_shadowed_bases()
        for position, statement in enumerate(self.tree.body):
            for name in bound_names(statement):
                self.definitions.setdefault(name, []).append(position)
        collector = _Imports(self.package)
        self.tree.visit(collector)
        found = {name: origin for name, origin in collector.found.items() if name not in self.definitions}
        self.imports = found | shadowed

    def _name_shadowed_bases(self) -> dict[str, Origin]:
        """``class X(X)``, of an imported X, becomes ``class X(ImportedX)``: return those names, and where they come
        from."""
        collector = _Imports(self.package)
        self.tree.visit(collector)
        found: dict[str, Origin] = {}
        body: list[Statement] = []
        for statement in self.tree.body:
            own = statement.name.value if isinstance(statement, cst.ClassDef) else ""
            if isinstance(statement, cst.ClassDef) and own in collector.found:
                alias = f"Imported{own}"
                bases = [_renamed(arg, own, alias) for arg in statement.bases]
                if any(new is not old for new, old in zip(bases, statement.bases, strict=True)):
                    found[alias] = collector.found[own]
                    statement = statement.with_changes(bases=bases)
            body.append(statement)
        if found:
            self.tree = self.tree.with_changes(body=body)
        return found

    @property
    def package(self) -> str:
        return self.module if self.path.name == "__init__.py" else self.module.rpartition(".")[0]


class SourceTree:
    """The folder of model files that the given one stands in; parses each file once."""

    def __init__(self, path: Path, engine: str | None = None) -> None:
        """``engine``: "vllm" or "sglang"; None: found by the file's imports."""
        text = _read(path)
        self.convention = CONVENTIONS[engine] if engine else _detect(path, text)
        self.root_folder, module = self._place(path)
        self._files: dict[str, SourceFile] = {}
        self.root = self._files[module] = _parse(path, module, text)

    def _place(self, path: Path) -> tuple[Path, str]:
        """Return the folder that dotted names begin in, and the file's own name.

        A file elsewhere counts as one of the folder of models, whatever that is called.
        """
        parts = path.resolve().parts
        for package in self.convention.models:
            wanted = tuple(package.split("."))
            for start in range(len(parts) - len(wanted) - 1, -1, -1):
                if parts[start : start + len(wanted)] == wanted:
                    root = Path(*parts[:start])
                    inner = ".".join(path.resolve().relative_to(root).with_suffix("").parts)
                    return root, inner.removesuffix(".__init__")
        return path.resolve().parent, f"{self.convention.models[0]}.{path.stem}"

    def is_sibling(self, module: str) -> bool:
        """Whether a dotted module is a model file, and not one of the engine's own helpers beside them."""
        return any(
            module.startswith(package + ".")
            and module.removeprefix(package + ".").partition(".")[0] not in self.convention.engine_modules
            for package in self.convention.models
        )

    def is_beside_models(self, module: str) -> bool:
        return module.startswith(tuple(package + "." for package in self.convention.models))

    def path_of(self, module: str) -> Path | None:
        """Return the file of a dotted module, None if it is not there."""
        first = self.convention.models[0] + "."
        names = [module.replace(".", "/")]
        if module.startswith(first):
            names.append(module.removeprefix(first).replace(".", "/"))  # a folder of models by itself
        candidates = [self.root_folder / f"{name}{end}" for name in names for end in (".py", "/__init__.py")]
        return next((path for path in candidates if path.is_file()), None)

    def file(self, module: str, importer: SourceFile) -> SourceFile:
        """Return the parsed sibling; raise PortError if it is missing."""
        if module not in self._files:
            path = self.path_of(module)
            if path is None:
                raise PortError(
                    f"{importer.path} imports from {module}, which is not there: {module.rpartition('.')[2]}.py. "
                    f"Put it beside, or name the file within the unpacked source of {self.convention.name}"
                )
            self._files[module] = _parse(path, module, _read(path))
        return self._files[module]

    @cached_property
    def registry(self) -> SourceFile | None:
        """The engine's table of architectures, if it stands beside the file."""
        module = f"{self.convention.models[0]}.registry"
        path = self.path_of(module)
        return None if path is None else _parse(path, module, _read(path))

    @cached_property
    def known_configs(self) -> frozenset[str]:
        """Names of the engine's own configuration classes that it finds by a model type."""
        path = self.path_of(self.convention.config_table) if self.convention.config_table else None
        return frozenset() if path is None else frozenset(_CONFIG_ENTRY.findall(_read(path)))


_CONFIG_ENTRY = re.compile(r"""[\w"\-]+\s*[=:]\s*"(\w+Config)",""")


def _read(path: Path) -> str:
    if path.is_dir():
        raise PortError(f"{path} is a folder: name one model file in it")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PortError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise PortError(f"{path} is not a text file in UTF-8 ({error})") from None


def _parse(path: Path, module: str, text: str) -> SourceFile:
    try:
        return SourceFile(path, module, cst.parse_module(text))
    except cst.ParserSyntaxError as error:
        raise PortError(f"{path}, line {error.raw_line}: not Python that can be read: {error.message}") from None


def _detect(path: Path, text: str) -> Convention:
    """Return the engine whose package the file imports."""
    for convention in CONVENTIONS.values():
        if re.search(rf"^\s*(from|import) {convention.package}[.\s]", text, re.MULTILINE):
            return convention
    raise PortError(
        f"{path} imports neither vllm nor sglang, so it is not a model file of theirs; if it is one that imports only "
        "from its siblings, say --from vllm or --from sglang"
    )


def _renamed(arg: cst.Arg, old: str, new: str) -> cst.Arg:
    is_old = isinstance(arg.value, cst.Name) and arg.value.value == old
    return arg.with_changes(value=cst.Name(new)) if is_old else arg


def bound_names(statement: Statement) -> list[str]:
    """Names that a top-level statement defines: classes, functions and assignments, also below ``if`` and ``try``."""
    if isinstance(statement, cst.ClassDef | cst.FunctionDef):
        return [statement.name.value]
    if isinstance(statement, cst.SimpleStatementLine):
        return [name for small in statement.body for name in _assigned(small)]
    if isinstance(statement, cst.If | cst.Try):
        return [name for inner in _inner_statements(statement) for name in bound_names(inner)]
    return []


def _assigned(small: cst.BaseSmallStatement) -> Iterator[str]:
    if isinstance(small, cst.Assign):
        targets = [target.target for target in small.targets]
    elif isinstance(small, cst.AnnAssign) and small.value is not None:
        targets = [small.target]
    else:
        return
    for target in targets:
        elements = [element.value for element in target.elements] if isinstance(target, cst.Tuple) else [target]
        yield from (element.value for element in elements if isinstance(element, cst.Name))


def _inner_statements(statement: cst.If | cst.Try) -> Iterator[Statement]:
    blocks = [statement.body]
    branch = statement.orelse
    while isinstance(branch, cst.If):
        blocks.append(branch.body)
        branch = branch.orelse
    if branch is not None:
        blocks.append(branch.body)
    if isinstance(statement, cst.Try):
        blocks += [handler.body for handler in statement.handlers]
    for block in blocks:
        if isinstance(block, cst.IndentedBlock):
            yield from block.body


class _Imports(Visitor):
    """Collects imported names and where they come from."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.found: dict[str, Origin] = {}
        self._num_branches = 0  # of ``else`` around

    def visit_Else(self, node: cst.Else) -> None:
        self._num_branches += 1

    def leave_Else(self, original_node: cst.Else) -> None:
        self._num_branches -= 1

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        if isinstance(node.names, cst.ImportStar):
            return
        module = absolute_module(node, self.package)
        for alias in node.names:
            name = alias.evaluated_name
            self.found.setdefault(alias.evaluated_alias or name, Origin(module, name, self._num_branches > 0))

    def visit_Import(self, node: cst.Import) -> None:
        for alias in node.names:
            name, local = alias.evaluated_name, alias.evaluated_alias
            if local:
                self.found.setdefault(local, Origin(name))
            else:
                top = name.partition(".")[0]
                self.found.setdefault(top, Origin(name if name == top else top))


def absolute_module(node: cst.ImportFrom, package: str) -> str:
    """Return the dotted module of a ``from`` import, relative ones resolved in ``package``."""
    name = dotted_name(node.module) if node.module else ""
    if not node.relative:
        return name
    parts = package.split(".")
    base = parts[: len(parts) - (len(node.relative) - 1)]
    return ".".join([*base, name] if name else base)


def dotted_name(node: cst.BaseExpression) -> str:
    """Return ``a.b.c`` for names and attributes of names; "" for anything else."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        base = dotted_name(node.value)
        return f"{base}.{node.attr.value}" if base else ""
    return ""
