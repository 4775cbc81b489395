"""From a file and its siblings to one module: the definitions that the models need, transitively, each once."""

from typing import cast

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.names import eager_names_in, names_in
from rtp_llm.port.program import Program, base_names, top_level
from rtp_llm.port.source import (
    Origin,
    PortError,
    SourceFile,
    SourceTree,
    Statement,
    absolute_module,
    bound_names,
)
from rtp_llm.port.visiting import Transformer
from rtp_llm.port.vocabulary import is_known

GENERATION_TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
_OF_MEDIA = frozenset({"MULTIMODAL_REGISTRY", "SupportsMultiModal"})
HEADS = ("compute_logits", "sample")  # methods of a class that generates text
Key = tuple[str, str]  # module, name
CONFIG: Key = ("transformers", "PretrainedConfig")


def gather(tree: SourceTree, architecture: str | None = None) -> Program:
    """Merge what the models of ``tree.root`` need into one module.

    Args:
        architecture: the one to port; None: all that the engine's registry finds in the file, or without a registry
            every class that computes logits.

    Raises:
        PortError: no model class, an unknown architecture, or a sibling that is missing.
    """
    entries = _entries(tree, architecture)
    gatherer = _Gatherer(tree)
    for _, name in entries:
        gatherer.need(tree.root, name)
    return gatherer.program(entries)


def _entries(tree: SourceTree, architecture: str | None) -> list[tuple[str, str]]:
    known = registered(tree) or _declared(tree.root)
    if architecture is None:
        entries = [pair for pair in known if pair[1] in {**tree.root.definitions, **tree.root.imports}] or [
            (name, name) for name in _generating(tree.root)
        ]
        if not entries:
            raise PortError(
                f"{tree.root.path} has no model class: none that {tree.convention.name}'s registry names, and none "
                "with compute_logits. Name the class with --arch"
            )
        return entries
    entries = [pair for pair in known if pair[0] == architecture]
    if not entries and architecture in tree.root.definitions:
        entries = [(architecture, architecture)]
    if not entries:
        have = sorted({pair[0] for pair in known} | {name for name in _generating(tree.root)})
        raise PortError(f"{tree.root.path} has no architecture {architecture}; have {have}")
    return entries


def _declared(file: SourceFile) -> list[tuple[str, str]]:
    """SGLang's ``EntryClass``: one class, or a list of them; each is its architecture."""
    positions = file.definitions.get("EntryClass", [])
    names = {name for position in positions for name in names_in(file.tree.body[position])} - {"EntryClass"}
    return [(name, name) for name in [*file.definitions, *file.imports] if name in names]


def registered(tree: SourceTree) -> list[tuple[str, str]]:
    """(architecture, class) pairs of the registry's tables of models that generate and stand in this file."""
    if tree.registry is None:
        return []
    names = (tree.root.module, tree.root.module.removeprefix(tree.convention.models[0] + "."))
    pairs = []
    for statement in tree.registry.tree.body:
        if not set(bound_names(statement)) & set(GENERATION_TABLES):
            continue
        for element in m.findall(statement, m.DictElement(key=m.SimpleString(), value=m.Tuple())):
            assert isinstance(element, cst.DictElement) and isinstance(element.value, cst.Tuple)
            texts = [
                part.value.evaluated_value
                for part in element.value.elements
                if isinstance(part.value, cst.SimpleString)
            ]
            if isinstance(element.key, cst.SimpleString) and len(texts) == 2 and texts[0] in names:
                pairs.append((str(element.key.evaluated_value), str(texts[1])))
    return pairs


def _generating(file: SourceFile) -> list[str]:
    """Classes that compute logits by a method of their own, or by a base in the file; bases of others excluded."""
    classes = {node.name.value: node for node in top_level(file.tree, cst.ClassDef)}

    def computes(name: str) -> bool:
        node = classes.get(name)
        if node is None:
            return name.endswith("ForCausalLM")
        own = m.findall(node, m.FunctionDef(name=m.OneOf(*map(m.Name, HEADS))))
        return bool(own) or any(computes(base) for base in base_names(node))

    return [name for name in classes if computes(name) and not name.startswith("_")]


class _Gatherer:
    """Follows names from definition to definition, through the files."""

    def __init__(self, tree: SourceTree) -> None:
        self.tree = tree
        self.files: list[SourceFile] = []  # those that definitions were taken from, dependencies first
        self.taken: dict[Key, SourceFile] = {}
        self.engine: dict[Key, Origin] = {}
        self.external: dict[Key, Origin] = {}
        self.resolved: dict[Key, Key] = {}  # a file's own name -> what it stands for
        self._open: list[SourceFile] = []
        self.own_configs: list[Key] = []

    def need(self, file: SourceFile, name: str) -> Key | None:
        """Take a name's definition, and all that it needs; return what the name stands for, None if nothing known."""
        key = (file.module, name)
        if key in self.resolved:
            return self.resolved[key]
        if name in file.definitions:
            self.resolved[key] = key
            self.taken[key] = file
            self._enter(file)
            for position in file.definitions[name]:
                self._need_names(file, file.tree.body[position])
            return key
        if name not in file.imports:
            return None
        target = self._imported(file.imports[name], file)
        if target is not None:
            self.resolved[key] = target
        return target

    def _imported(self, origin: Origin, importer: SourceFile) -> Key | None:
        if origin.name is not None and (self._is_ported(origin) or self._is_function_of_configs(origin)):
            return self.need(self.tree.file(origin.module, importer), origin.name)
        if origin.name is not None and importer is self.tree.root and self._is_own_config(origin):
            key = self.need(self.tree.file(origin.module, importer), origin.name)
            self.own_configs += [] if key is None or key in self.own_configs else [key]
            return key
        if origin.module.startswith(self.tree.convention.configs):  # known by what they hold, not by their class
            origin = Origin(*CONFIG)
        key = (origin.module, origin.name or "")
        of_engine = origin.module.split(".")[0] == self.tree.convention.package
        (self.engine if of_engine else self.external)[key] = origin
        return key

    def _is_ported(self, origin: Origin) -> bool:
        """Whether a name's definition is taken along: one of a model file, or a helper beside the models without an
        equivalent here."""
        assert origin.name is not None
        if self.tree.is_sibling(origin.module):
            return True
        if not self.tree.is_beside_models(origin.module) or is_known(origin.name):
            return False
        return origin.name in self.tree.file(origin.module, self.tree.root).definitions

    def _is_function_of_configs(self, origin: Origin) -> bool:
        """Whether a name is a function beside the other engine's configuration classes."""
        name, path = origin.name, self.tree.path_of(origin.module)
        if name is None or path is None or not origin.module.startswith(self.tree.convention.configs):
            return False
        file = self.tree.file(origin.module, self.tree.root)
        return name in file.definitions and isinstance(_definition(file, name), cst.FunctionDef)

    def _is_own_config(self, origin: Origin) -> bool:
        """Whether a name is the configuration of the file's text model: a class of the other engine's that it finds by
        a model type, and that the file's parameters are annotated with."""
        root, path = self.tree.root, self.tree.path_of(origin.module)
        is_known = origin.module.startswith(self.tree.convention.configs) and origin.name in self.tree.known_configs
        if not is_known or path is None or not _OF_MEDIA.isdisjoint(root.imports):
            return False
        local = {name for name, other in root.imports.items() if other == origin}
        annotations = m.OneOf(*(m.Annotation(m.Name(name)) for name in local))
        return bool(m.findall(root.tree, m.Param(annotation=annotations)))

    def _enter(self, file: SourceFile) -> None:
        if file not in self.files:
            self.files.append(file)

    def _need_names(self, file: SourceFile, statement: cst.CSTNode) -> None:
        names = names_in(statement)
        for name in names:
            if name in file.definitions or name in file.imports:
                self.need(file, name)

    def program(self, entries: list[tuple[str, str]]) -> Program:
        merged = self._merged_names(_other_names(entries))
        body: list[Statement] = []
        for file in self._ordered_files():
            body += self._statements(file, merged)
        root = self.tree.root
        header = [line for line in root.tree.header if line.comment]
        docstring = root.tree.body[0] if root.tree.get_docstring() and root.tree.body else None
        module = root.tree.with_changes(header=header, body=[*([docstring] if docstring else []), *body], footer=[])
        wanted = [(arch, merged[self.resolved[root.module, name]]) for arch, name in entries]
        return Program(
            module=module,
            engine_names={merged[key]: origin for key, origin in self.engine.items()},
            imports={merged[key]: origin for key, origin in self.external.items()},
            entries=wanted,
            engine=self.tree.convention.name,
            config_class=merged[self.own_configs[0]] if len(self.own_configs) == 1 else "",
            left_out=[
                name
                for name in root.definitions
                if (root.module, name) not in self.taken and isinstance(_definition(root, name), cst.ClassDef)
            ],
        )

    def _merged_names(self, reserved: frozenset[str]) -> dict[Key, str]:
        """Give each thing a name of its own, none of the reserved ones: the root's keep theirs, a later one of the same
        name gets a suffix."""
        root = self.tree.root.module
        keys = sorted([*self.taken, *self.engine, *self.external], key=lambda key: key[0] != root)
        names: dict[Key, str] = {}
        used: dict[str, Key] = {}
        for key in keys:
            wanted = self._wanted_name(key)
            name, number = wanted, 1
            while name in used or name in reserved:
                stem = key[0].rpartition(".")[2]
                name = f"{wanted}_{stem}" if number == 1 else f"{wanted}_{stem}{number}"
                number += 1
            names[key] = name
            used[name] = key
        return names

    def _wanted_name(self, key: Key) -> str:
        if key in self.taken or key == CONFIG:
            return key[1]
        locals_of = [name for (_, name), target in self.resolved.items() if target == key]
        return key[1] if key[1] in locals_of or not locals_of else locals_of[0]

    def _ordered_files(self) -> list[SourceFile]:
        """Files whose definitions others use first; a file's own order of definitions stays. Where files use one
        another, those come first whose definitions are needed to make others."""
        depends: dict[str, set[str]] = {file.module: set() for file in self.files}
        for (module, _), target in self.resolved.items():
            if target in self.taken and target[0] != module and module in depends:
                depends[module].add(target[0])
        root = [file for file in self.files if file is self.tree.root]
        ordered = _in_order(_in_order([*root, *self.files], depends), self._eager_needs())
        return [file for file in ordered if file is not self.tree.root] + [
            file for file in ordered if file is self.tree.root
        ]

    def _eager_needs(self) -> dict[str, set[str]]:
        """Files -> those that must stand before them."""
        needs: dict[str, set[str]] = {file.module: set() for file in self.files}
        for (module, name), file in self.taken.items():
            for position in file.definitions[name]:
                for other in eager_names_in(file.tree.body[position]):
                    target = self.resolved.get((module, other))
                    if target in self.taken and target is not None and target[0] != module:
                        needs[module].add(target[0])
        return needs

    def _statements(self, file: SourceFile, merged: dict[Key, str]) -> list[Statement]:
        positions = sorted(
            {position for key in self.taken if key[0] == file.module for position in file.definitions[key[1]]}
        )
        own = {name: merged[target] for (module, name), target in self.resolved.items() if module == file.module}
        renames = {name: new for name, new in own.items() if name != new}
        result: list[Statement] = []
        for position in positions:
            statement = _without_imports(file.tree.body[position], file, self.tree)
            if renames:
                statement = cast(Statement, statement.visit(Renamer(renames)))
            result.append(statement)
        if result and file is not self.tree.root:
            result[0] = _headed(result[0], f"# From {self.tree.convention.name}'s {file.path.name}:")
        elif result and len(self.files) > 1:
            result[0] = _headed(result[0], f"# {file.path.name} itself:")
        return result


def _other_names(entries: list[tuple[str, str]]) -> frozenset[str]:
    """Return the architectures whose class has another name, so that a class of theirs is still to be written."""
    return frozenset(arch for arch, name in entries if arch != name) - {name for _, name in entries}


def _in_order(files: list[SourceFile], depends: dict[str, set[str]]) -> list[SourceFile]:
    """Return the files, each once, in their order, but after those that it depends on; a circle stays as it is."""
    by_module = {file.module: file for file in files}
    ordered: list[SourceFile] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path or by_module[module] in ordered:
            return
        for other in sorted(depends[module]):
            visit(other, (*path, module))
        if by_module[module] not in ordered:
            ordered.append(by_module[module])

    for file in files:
        visit(file.module, ())
    return ordered


def _definition(file: SourceFile, name: str) -> Statement:
    return file.tree.body[file.definitions[name][0]]


def _headed(statement: Statement, comment: str) -> Statement:
    lines = [
        cst.EmptyLine(indent=False),
        cst.EmptyLine(indent=False),
        cst.EmptyLine(indent=False, comment=cst.Comment(comment)),
    ]
    rest = list(statement.leading_lines)  # type: ignore[union-attr]
    while rest and rest[0].comment is None:
        rest.pop(0)
    return statement.with_changes(
        leading_lines=[*lines, cst.EmptyLine(indent=False), cst.EmptyLine(indent=False), *rest]
    )


class Renamer(Transformer):
    """Renames names, but neither attributes nor keywords of calls."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
        return updated_node.with_changes(value=self.names.get(updated_node.value, updated_node.value))

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.Attribute:
        return updated_node.with_changes(attr=original_node.attr)

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        return updated_node.with_changes(keyword=original_node.keyword)


def _without_imports(statement: Statement, file: SourceFile, tree: SourceTree) -> Statement:
    """Remove imports from the other engine inside functions: the output has its imports at the top."""
    remover = _ImportRemover(file, tree)
    return cast(Statement, statement.visit(remover))


class _ImportRemover(Transformer):
    def __init__(self, file: SourceFile, tree: SourceTree) -> None:
        self.file, self.tree = file, tree

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom | cst.RemovalSentinel:
        module = absolute_module(original_node, self.file.package)
        if module.split(".")[0] == self.tree.convention.package:
            return cst.RemoveFromParent()
        return updated_node

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        if updated_node.body:
            return updated_node
        return updated_node.with_changes(body=[cst.parse_statement("pass")])
