"""``rtp-llm port``: reads a file, writes its port, prints the report."""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from rtp_llm.port.porter import Ported, port
from rtp_llm.port.report import Remark
from rtp_llm.port.source import PortError

EXIT_COMPLETE = 0
EXIT_LEFT = 1
STDOUT = "-"


def run_port(args: argparse.Namespace) -> int:
    """Return the exit status: 0 nothing is left, 1 something is, or --check finds a difference. PortError: nothing is
    written."""
    source = Path(args.file)
    output = None if args.output == STDOUT else Path(args.output or source.name)
    if output is None and args.check:
        raise PortError("--check needs a file to compare: name one with -o")
    if output is not None:
        _check_output(output, source, args.force)
    ported = port(source, args.arch, args.engine)
    if output is None:
        sys.stdout.write(ported.text)
        _print_report(ported, source, "stdout", sys.stderr)
    else:
        _write(output, ported.text)
        _print_report(ported, source, str(output), sys.stdout)
    agrees = _check(ported, output, args) if output is not None and args.check else True
    return EXIT_COMPLETE if ported.report.is_complete and agrees else EXIT_LEFT


def _check(ported: Ported, output: Path, args: argparse.Namespace) -> bool:
    """Compare the written file with transformers, print how that went, and return whether it agrees."""
    from rtp_llm.port.check import check_port  # the engine: porting by itself needs none of it

    found = check_port(output, Path(args.check), ported.report.architectures, args.check_two_ranks)
    print("\n".join(["", "compared with transformers, in float32, on a tiny checkpoint", *found.lines()]))
    return found.agrees


def _check_output(output: Path, source: Path, force: bool) -> None:
    if output.exists() and source.exists() and output.samefile(source):
        raise PortError(f"the output would overwrite {source} itself: name another with -o")
    if output.is_dir():
        raise PortError(f"{output} is a folder: name a file in it, such as -o {output / source.name}")
    if output.exists() and not force:
        raise PortError(f"{output} exists already: name another with -o, or overwrite it with --force")
    if not output.parent.is_dir():
        raise PortError(f"there is no folder {output.parent} for the output: make it first")


def _write(output: Path, text: str) -> None:
    """Write the file whole, or not at all."""
    handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, output)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _print_report(ported: Ported, source: Path, output: str, stream: TextIO) -> None:
    report = ported.report
    lines = [f"{source} -> {output}: {', '.join(report.architectures)}, {len(ported.text.splitlines())} lines"]
    lines += ["", "done"]
    width = max((len(str(count)) for count in report.done.values()), default=1)
    lines += [f"  {count:>{width}}  {what}" for what, count in sorted(report.done.items()) if count]
    lines += _section("to review", report.review, output)
    lines += _section("not portable", report.not_portable, output)
    if report.left_out:
        lines += ["", "left out, as none of these architectures uses them", f"  {', '.join(report.left_out)}"]
    lines += ["", _conclusion(ported, output)]
    print("\n".join(lines), file=stream)


def _section(title: str, remarks: tuple[Remark, ...], output: str) -> list[str]:
    if not remarks:
        return []
    return ["", f"{title}: {len(remarks)}", *(f"  {output}:{remark.line}: {remark.text}" for remark in remarks)]


def _conclusion(ported: Ported, output: str) -> str:
    report = ported.report
    command = f"rtp-llm verify CHECKPOINT --model-class {output}:{report.architectures[0]}"
    if report.is_complete:
        return f"Nothing is left. Compare it with transformers: {command}"
    count = len(report.review) + len(report.not_portable)
    places = "1 place is" if count == 1 else f"{count} places are"
    return f'{places} left: search the file for "# PORT:". Then compare it with transformers: {command}'
