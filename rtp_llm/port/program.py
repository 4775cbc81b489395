"""What is being ported: one module of merged definitions, and what its names stand for."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import libcst as cst

from rtp_llm.port.source import Origin, Statement

COMPUTE = "compute_logits"
T = TypeVar("T", bound=Statement)


@dataclass
class Program:
    """The merged module, which the rules rewrite one after the other.

    Attributes:
        module: the definitions, siblings' first; without imports.
        engine_names: names in ``module`` that came from the other engine -> where from.
        imports: other imported names -> where from.
        entries: (architecture, class) pairs that the output registers.
        done: what the rules did -> how often.
        left_out: definitions of the file that were not taken over, with the reason.
        placeholders: texts that stand for media in prompts.
        config_class: the class among the definitions that makes the models' configuration; "" if there is none.
        has_mrope: whether a model computes positions of three axes.
    """

    module: cst.Module
    engine_names: dict[str, Origin]
    imports: dict[str, Origin]
    entries: list[tuple[str, str]]
    engine: str = "vllm"
    done: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    placeholders: list[str] = field(default_factory=list)
    has_mrope: bool = False
    config_class: str = ""

    def is_engine(self, node: cst.BaseExpression, *names: str) -> bool:
        """Whether an expression is a name imported from the other engine, there called by one of ``names``."""
        if not isinstance(node, cst.Name):
            return False
        origin = self.engine_names.get(node.value)
        return origin is not None and origin.name in names

    def engine_name(self, node: cst.BaseExpression) -> str:
        """Return what an imported name is called in the other engine; "" if it is not from there."""
        origin = self.engine_names.get(node.value) if isinstance(node, cst.Name) else None
        return (origin.name or origin.module) if origin else ""

    def classes(self) -> dict[str, cst.ClassDef]:
        return {node.name.value: node for node in top_level(self.module, cst.ClassDef)}

    def functions(self) -> dict[str, cst.FunctionDef]:
        return {node.name.value: node for node in top_level(self.module, cst.FunctionDef)}


def top_level(module: cst.Module, kind: type[T]) -> Iterator[T]:
    """Definitions of a kind at the top level, those below ``if`` included."""
    for statement in module.body:
        if isinstance(statement, kind):
            yield statement
        elif isinstance(statement, cst.If) and isinstance(statement.body, cst.IndentedBlock):
            yield from (inner for inner in statement.body.body if isinstance(inner, kind))


def methods(node: cst.ClassDef) -> dict[str, cst.FunctionDef]:
    if not isinstance(node.body, cst.IndentedBlock):
        return {}
    return {inner.name.value: inner for inner in node.body.body if isinstance(inner, cst.FunctionDef)}


def base_names(node: cst.ClassDef) -> list[str]:
    return [arg.value.value for arg in node.bases if isinstance(arg.value, cst.Name)]


def lineage(name: str, classes: dict[str, cst.ClassDef]) -> list[cst.ClassDef]:
    """Return a class of the module and its bases in it, nearest first (a linear approximation of Python's order)."""
    if name not in classes:
        return []
    result = [classes[name]]
    for base in base_names(classes[name]):
        result += [node for node in lineage(base, classes) if node not in result]
    return result


def family(name: str, classes: dict[str, cst.ClassDef]) -> set[str]:
    """Names of all classes that share an ancestor or descendant with a class: its instances may hold their state."""
    roots = [node.name.value for node in lineage(name, classes)]
    return {other for other in classes if any(node.name.value in roots for node in lineage(other, classes))}


def computes_logits(name: str, classes: dict[str, cst.ClassDef]) -> bool:
    """Whether a class, or one that shares its methods, gives logits: then the engine calls its ``forward``."""
    return any(COMPUTE in methods(classes[other]) for other in family(name, classes))


def parameters(function: cst.FunctionDef) -> list[cst.Param]:
    """Parameters that can be given by position or by name, ``self`` included."""
    params = function.params
    return [*params.posonly_params, *params.params, *params.kwonly_params]


def code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node).strip()


def self_attribute(node: cst.BaseExpression) -> str:
    """Return the name in ``self.name``; "" for anything else."""
    if isinstance(node, cst.Attribute) and isinstance(node.value, cst.Name) and node.value.value == "self":
        return node.attr.value
    return ""
