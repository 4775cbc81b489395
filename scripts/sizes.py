"""List what is long: modules of more than 450 lines, functions of more than 60, and the reason beside each.

    python scripts/sizes.py [FOLDER ...]

A reason is a comment ``long: why`` (``# long: …`` in Python, ``// long: …`` in C++): a module's among its first lines,
before any code but its docstring; a function's directly above it. It is a report, not a gate: the exit status is 0.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_MODULE = 450  # lines
MAX_FUNCTION = 60
SUFFIXES = (".py", ".cpp", ".h")

_REASON = re.compile(r"\s*(?:#|//) long: (\S.*)")
_COMMENT = re.compile(r"\s*(?:#|//)")


@dataclass(frozen=True, slots=True)
class Long:
    """A module, or a function of it, that is longer than the limit."""

    path: Path
    name: str  # of the function; empty: the module
    line: int
    num_lines: int
    reason: str | None

    def __str__(self) -> str:
        place = f"{self.path}:{self.line} {self.name}" if self.name else f"{self.path}"
        return f"{self.num_lines:5}  {place}: {self.reason or 'NO REASON'}"


def long_parts(path: Path) -> Iterator[Long]:
    """What is too long in a file: itself, then its functions."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    is_python = path.suffix == ".py"
    if len(lines) > MAX_MODULE:
        yield Long(path, "", 1, len(lines), _reason_in(_head(lines, is_python)))
    for name, first, last in functions_of_python(text) if is_python else functions_of_cpp(lines):
        if last - first + 1 > MAX_FUNCTION:
            yield Long(path, name, first, last - first + 1, _reason_in(_comment_above(lines, first)))


def functions_of_python(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line), from 1 on, decorators included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, first, node.end_lineno or first


def functions_of_cpp(lines: list[str]) -> Iterator[tuple[str, int, int]]:
    """As of Python. Functions outside of classes: each begins at a line's start, and ends in a brace at one."""
    first, head, is_open = 0, "", False
    for number, line in enumerate(lines, 1):
        code = line.partition("//")[0].rstrip()
        if is_open:
            if code == "}":
                yield _name_in(head), first, number
            if code.startswith("}"):
                first, head, is_open = 0, "", False
        elif first or (code and code[0] not in "#} " and not code.startswith("namespace")):
            first, head, is_open = first or number, f"{head} {code}", code.endswith("{")
            if code.endswith((";", "}")):  # it is no function, or one of a line
                first, head = 0, ""


def _name_in(head: str) -> str:
    """The word before a function's arguments."""
    plain = re.sub(r"template\s*<[^>]*>|__attribute__\s*\(\(.*?\)\)", "", head)
    words = re.findall(r"(\w+)\s*\(", plain)
    return words[0] if words else plain.strip()


def _head(lines: list[str], is_python: bool) -> list[str]:
    """The lines before the first code."""
    if not is_python:
        return lines[: next((i for i, line in enumerate(lines) if line and not line.startswith("//")), len(lines))]
    body = ast.parse("\n".join(lines)).body
    code = [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    return lines[: code[0].lineno - 1] if code else lines


def _comment_above(lines: list[str], first: int) -> list[str]:
    above = []
    for line in reversed(lines[: first - 1]):
        if not _COMMENT.match(line):
            break
        above.append(line)
    return above


def _reason_in(lines: list[str]) -> str | None:
    return next((match[1] for line in lines if (match := _REASON.fullmatch(line))), None)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "rtp_llm"], metavar="FOLDER")
    folders: list[Path] = parser.parse_args(argv).folders
    files = sorted(file for folder in folders for suffix in SUFFIXES for file in folder.rglob(f"*{suffix}"))
    found = [part for file in files for part in long_parts(file)]
    print(*found, sep="\n", end="\n" if found else "")
    without = sum(part.reason is None for part in found)
    print(f"{len(files)} files; {len(found)} modules or functions are long, {without} of them without a reason")


if __name__ == "__main__":
    main()
