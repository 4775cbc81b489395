"""From the rewritten module to the text of a model file: imports, definitions, ``EntryClass``."""

import sys
from collections import defaultdict
from collections.abc import Iterable

import libcst as cst

from rtp_llm.port.gather import Renamer
from rtp_llm.port.layout import LINE_LENGTH, laid_out, single_spaced
from rtp_llm.port.names import names_in
from rtp_llm.port.program import Program
from rtp_llm.port.source import Origin
from rtp_llm.port.vocabulary import target


def text_of(program: Program) -> str:
    """Return the whole file."""
    module, entry_lines = program.module, _entry_lines(program)
    module, ours = _our_imports(program, module)
    module = laid_out(module)
    used = names_in(module)
    external = {name: origin for name, origin in program.imports.items() if name in used}
    lines = _import_lines({**external, **ours})
    body = list(module.body)
    place = 1 if module.get_docstring() else 0
    head = module.with_changes(body=body[:place]).code.rstrip()
    rest = cst.Module(body[place:]).code.strip("\n")
    parts = [head, "\n".join(lines), "\n\n" + rest, "\n\n" + "\n".join(entry_lines)]
    return single_spaced("\n\n".join(part for part in parts if part.strip())).rstrip() + "\n"


def _our_imports(program: Program, module: cst.Module) -> tuple[cst.Module, dict[str, Origin]]:
    """Give the other engine's names ours; return the module, and where they are imported from."""
    used = names_in(module)
    taken = set(program.classes()) | set(program.functions()) | set(program.imports)
    renames: dict[str, str] = {}
    imports: dict[str, Origin] = {}
    for local in program.engine_names:
        found = target(program.engine_name(cst.Name(local)), program.engine) if local in used else None
        if found is None:
            continue
        home, name = found
        new = local if name in taken and name != local else name
        if new != local:
            renames[local] = new
        imports[new] = Origin(home, name)
    return (cst.ensure_type(module.visit(Renamer(renames)), cst.Module) if renames else module), imports


def _import_lines(imports: dict[str, Origin]) -> list[str]:
    """Sorted imports: the standard library's, others', ours."""
    groups: dict[int, list[str]] = defaultdict(list)
    by_module: dict[str, list[str]] = defaultdict(list)
    for local, origin in imports.items():
        if origin.is_optional:
            groups[_OPTIONAL].append(_optional_lines(local, origin))
        elif origin.name is None:
            line = f"import {origin.module}" if origin.module == local else f"import {origin.module} as {local}"
            groups[_group(origin.module)].append(line)
        else:
            by_module[origin.module].append(origin.name if origin.name == local else f"{origin.name} as {local}")
    for module, names in by_module.items():
        groups[_group(module)].append(_from_line(module, sorted(names)))
    lines: list[str] = []
    for group in sorted(groups):
        plain = sorted(line for line in groups[group] if line.startswith("import "))
        lines += [*([""] if lines else []), *plain, *sorted(line for line in groups[group] if line not in plain)]
    return lines


def _optional_lines(local: str, origin: Origin) -> str:
    name = origin.name if origin.name == local else f"{origin.name} as {local}"
    return f"try:\n    from {origin.module} import {name}\nexcept ImportError:  # of other versions\n    {local} = None"


_OPTIONAL = 3  # after the groups of ``_group``


def _from_line(module: str, names: Iterable[str]) -> str:
    names = list(names)
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE_LENGTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _group(module: str) -> int:
    top = module.split(".")[0]
    return 0 if top in sys.stdlib_module_names else 2 if top == "rtp_llm" else 1


def _entry_lines(program: Program) -> list[str]:
    """``EntryClass``; an architecture whose class has another name gets a class of its own name."""
    lines, names = [], []
    classes = program.classes()
    for architecture, name in program.entries:
        if architecture != name and architecture not in classes:
            lines += [f"class {architecture}({name}):", "    pass", "", ""]
            name = architecture
        names.append(name)
    names = list(dict.fromkeys(names))
    return [*lines, f"EntryClass = {names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}"]
