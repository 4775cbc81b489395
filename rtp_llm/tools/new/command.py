"""``rtp-llm new``: write a new architecture's model file, its reference, a maker of a tiny checkpoint, and a test."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import rtp_llm
from rtp_llm.tools.new.names import Name, NewModelError
from rtp_llm.tools.new.sources import MODEL_FILE, REFERENCE, TEMPLATES, TEST, sources

WHY_TRUST = (
    "verify needs --trust-remote-code: the reference is Python code, and runs from its copy in the checkpoint. Serving "
    "runs the model file alone."
)
SERVE_AND_ASK = (
    "rtp-llm serve --model-path tiny",
    """curl http://127.0.0.1:30000/v1/completions --json '{"model": "tiny", "prompt": "Once upon a time"}'""",
)
GUIDE = "docs/supported_models/support_new_models.md"


def run_new(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    name = Name.of(args.name)
    texts = sources(args.like, args.sees)
    if args.inside:
        root = _checkout()
        files, commands = _inside(texts, args.sees), _commands_inside(name, args.sees)
    else:
        name.check_importable()
        root = Path(args.directory or name.module)
        files, commands = _outside(texts), _commands_outside(name, root)
    written = write(name, files, root)
    for path in written:
        print(f"wrote {path}")
    print("\nNext:")
    for command in commands:
        print(f"    {command}")
    print(f"\n{WHY_TRUST}\nThen change the reference and the model file alike. What each part must do: {GUIDE}")
    return 0


def write(name: Name, files: Mapping[str, str], root: Path) -> list[Path]:
    """Write files of a new architecture below ``root``, with its name in them; return their paths.

    Args:
        files: path below ``root``, with zeta in it, to text.

    Raises:
        NewModelError: one of the files exists.
    """
    texts = {root / name.fill(path): name.fill(text) for path, text in files.items()}
    if there := [path for path in texts if path.exists()]:
        raise NewModelError(f"{', '.join(map(str, there))} exists already, and nothing is overwritten")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    _format([path for path in texts if path.suffix == ".py"])
    return list(texts)


def _format(paths: list[Path]) -> None:
    """Sort imports and break lines, where ruff is installed: names that are longer or shorter than Zeta need it."""
    ruff = _ruff()
    if ruff is None:
        return
    style = ["--isolated", "--no-cache", "--quiet", "--line-length", "120"]
    first_party = 'lint.isort.known-first-party = ["rtp_llm"]'
    files = [str(path) for path in paths]
    subprocess.run([*ruff, "check", "--select", "I", "--fix", *style, "--config", first_party, *files], check=True)
    subprocess.run([*ruff, "format", *style, *files], check=True)


def _outside(texts: Mapping[str, str]) -> dict[str, str]:
    """Return the files of a package."""
    shared = {path.name: path.read_text(encoding="utf-8") for path in sorted((TEMPLATES / "outside").iterdir())}
    return {
        **{f"zeta/reference/{file}": texts[file] for file in REFERENCE},
        "zeta/reference/__init__.py": "",
        "zeta/__init__.py": "",
        "zeta/zeta.py": texts[MODEL_FILE],
        TEST: texts[TEST],
        **shared,
    }


def _inside(texts: Mapping[str, str], sees: bool) -> dict[str, str]:
    """Return the files of a model in a checkout of the project."""
    return {
        "rtp_llm/models_py/zeta.py": texts[MODEL_FILE],
        **{f"test/helpers/zeta_reference/{file}": texts[file] for file in REFERENCE},
        "test/helpers/zeta_reference/__init__.py": "",
        f"test/srt/models/test_{'mm' if sees else 'parity'}_zeta.py": _test_inside(texts[TEST], sees),
    }


def _test_inside(test: str, sees: bool) -> str:
    """Return the test of a package as one of the checkout, which finds the model and lists its cases."""
    lines = (TEMPLATES / "inside" / "cases.py").read_text(encoding="utf-8").split("\n\n\n", 1)[1]
    cases = lines.replace("ZetaForCausalLM", "ZetaForConditionalGeneration") if sees else lines
    for there, here in (
        ("import pytest\n", "from dataclasses import dataclass\n\nimport pytest\n"),
        ("from zeta.reference.make_tiny", "from zeta_reference.make_tiny"),
        ("from zeta.zeta import EntryClass\n", ""),
        ("from rtp_llm import ModelRegistry\n", ""),
        ("ModelRegistry.models[EntryClass.__name__] = EntryClass\n", f"\n{cases}"),
    ):
        if there not in test:
            raise AssertionError(f"the template of tests has no {there!r}")
        test = test.replace(there, here)
    return test


def _checkout() -> Path:
    root = Path(rtp_llm.__file__).parents[1]
    if not (root / "test" / "helpers").is_dir():
        raise NewModelError(
            f"--inside writes into a checkout of RTP-LLM, but {root} is none: leave it out, for a package of your own"
        )
    return root


def _commands_outside(name: Name, root: Path) -> list[str]:
    module = name.module
    path = "PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}"
    return [
        f"cd {root} && export {path} RTP_LLM_EXTERNAL_MODEL_PACKAGE={module}  # or: pip install -e {root}",
        "python -m pytest",
        f"python -m {module}.reference.make_tiny tiny && rtp-llm verify tiny --trust-remote-code",
        *SERVE_AND_ASK,
    ]


def _commands_inside(name: Name, sees: bool) -> list[str]:
    module, test = name.module, f"test_{'mm' if sees else 'parity'}_{name.module}.py"
    return [
        f"python -m pytest test/srt/models/{test} && python scripts/supported_models.py",
        f"PYTHONPATH=test/helpers python -m {module}_reference.make_tiny tiny && "
        "rtp-llm verify tiny --trust-remote-code",
        *SERVE_AND_ASK,
    ]


def _ruff() -> list[str] | None:
    """Return the command that runs ruff: this Python's own, else the one on the path; None if there is none."""
    if find_spec("ruff") is not None:
        return [sys.executable, "-m", "ruff"]
    found = shutil.which("ruff")
    return [found] if found else None
