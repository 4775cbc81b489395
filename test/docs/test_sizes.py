"""What is long is listed, in Python and C++, with the reason that stands beside it."""

from pathlib import Path

import pytest
import sizes

BODY = "    x = 1\n"


def test_modules(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text('"""Much."""\n' + "x = 1\n" * 450)
    (tmp_path / "excused.py").write_text('"""Much."""\n\n# long: a table\n' + "x = 1\n" * 450)
    (tmp_path / "late.py").write_text("x = 1\n" * 450 + "# long: a table\n")
    (tmp_path / "fits.py").write_text("x = 1\n" * 450)
    (tmp_path / "excused.h").write_text("// Numbers.\n// long: a table\n#pragma once\n" + "int x;\n" * 450)
    found = {path.name: list(sizes.long_parts(path)) for path in tmp_path.iterdir()}
    assert {name: [(part.num_lines, part.reason) for part in parts] for name, parts in found.items()} == {
        "long.py": [(451, None)],
        "excused.py": [(453, "a table")],
        "late.py": [(451, None)],
        "fits.py": [],
        "excused.h": [(453, "a table")],
    }


def test_functions(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        f"def fits():\n{BODY * 59}\n\n# Cuts.\n# long: one formula\n@cache\ndef excused():\n{BODY * 59}\n"
        f"class A:\n    async def method(self):\n{f'    {BODY}' * 60}"
    )
    assert [(part.name, part.line, part.num_lines, part.reason) for part in sizes.long_parts(path)] == [
        ("excused", 65, 61, "one formula"),
        ("method", 128, 61, None),
    ]


KERNEL_FILE = """#define KERNEL __attribute__((noinline))

namespace {

struct S {
    int x;
};

int one() { return 1; }

// Adds.
// long: one pass
template <class T>
void excused(
    T x
) {
SHORT
#if A
    x = 2;
#endif
}

}  // namespace

KERNEL int fits(int x) {
SHORT
    x = 2;
}

KERNEL int other() {
SHORT
    x = 2;

    x = 3;
}
"""


def test_functions_of_cpp(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cpp"
    path.write_text(KERNEL_FILE.replace("SHORT\n", "    x = 1;\n" * 57))
    assert [(part.name, part.num_lines, part.reason) for part in sizes.long_parts(path)] == [
        ("excused", 65, "one pass"),
        ("other", 62, None),
    ]


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * 451)
    (tmp_path / "b.py").write_text("# long: a table\n" + "x = 1\n" * 450)
    sizes.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("a.py: NO REASON") and lines[1].endswith("b.py: a table")
    assert lines[2] == "2 files; 2 modules or functions are long, 1 of them without a reason"
    sizes.main([])
    assert " files; " in capsys.readouterr().out
