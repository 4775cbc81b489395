"""A configuration class that came along with the models makes their configuration: ``config_class = …``."""

import libcst as cst

from rtp_llm.port.program import Program
from rtp_llm.port.source import Statement


def declare_config(program: Program) -> None:
    """Write ``config_class`` into the classes that the output registers, if they have a configuration of their own."""
    if not program.config_class:
        return
    names = {name for _, name in program.entries}
    line = cst.parse_statement(f"config_class = {program.config_class}")
    body = [
        _with_first(statement, line)
        if isinstance(statement, cst.ClassDef) and statement.name.value in names
        else statement
        for statement in program.module.body
    ]
    program.module = program.module.with_changes(body=body)
    program.done["configuration classes declared"] += 1


def _is_class(statement: Statement, names: set[str]) -> bool:
    return isinstance(statement, cst.ClassDef) and statement.name.value in names


def _with_first(statement: Statement, line: Statement) -> cst.ClassDef:
    """Put a statement first in a class, after its docstring."""
    node = cst.ensure_type(statement, cst.ClassDef)
    if not isinstance(node.body, cst.IndentedBlock):
        return node.with_changes(body=cst.IndentedBlock([line]))
    place = 1 if node.get_docstring() is not None else 0
    statements = [*node.body.body[:place], line, *node.body.body[place:]]
    return node.with_changes(body=node.body.with_changes(body=statements))
