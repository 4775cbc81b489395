"""Port every multimodal model file of vLLM, and count what is left to a person.

    python benchmark/porting/multimodal.py --vllm WHEEL_OR_DIRECTORY

A file that comes out is valid Python. Its marks, the ``# PORT:`` comments, are counted by kind: to review, and not
portable. Nothing is compared with transformers: such a file needs its processor finished first.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from rtp_llm.port.porter import port
from rtp_llm.port.source import PortError
from vllm_files import SourceError, multimodal_files, unpacked, version_of

EXIT_ERROR = 2
MOST_COMMON = 15


@dataclass(frozen=True)
class Row:
    """What became of a file. ``failure``: why there is no output; then there are no marks."""

    file: str
    review: list[str]
    not_portable: list[str]
    failure: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="a wheel of vLLM, or a folder with vllm/ in it")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="files to take, such as llava")
    parser.add_argument("--out", type=Path, help="keep the ported files in this folder")
    parser.add_argument("--json", type=Path, help="write the results there, as JSON")
    args = parser.parse_args(argv)
    try:
        with unpacked(args.vllm) as root:
            files = [path for path in multimodal_files(root) if not args.only or path.stem in args.only]
            rows = [examine(path, args.out) for path in files]
            version = version_of(root)
    except SourceError as error:
        print(error, file=sys.stderr)
        return EXIT_ERROR
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print("\n".join(["", *summary(version, rows)]))
    return 0


def examine(path: Path, out: Path | None) -> Row:
    """Port a file, print a line about it, and return what is left in it."""
    try:
        ported = port(path)
    except PortError as error:
        print(f"{path.stem:32} no output: {error}", flush=True)
        return Row(path.stem, [], [], str(error))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / path.name).write_text(ported.text, encoding="utf-8")
    report = ported.report
    print(f"{path.stem:32} {len(report.review):3} to review, {len(report.not_portable):3} not portable", flush=True)
    return Row(path.stem, [mark.text for mark in report.review], [mark.text for mark in report.not_portable])


def summary(version: str, rows: Sequence[Row]) -> list[str]:
    """Return lines on all files together, and the kinds of marks that are most common."""
    valid = [row for row in rows if not row.failure]
    counts = [len(row.review) + len(row.not_portable) for row in valid]
    kinds = Counter(kind_of(text) for row in valid for text in [*row.review, *row.not_portable])
    median = statistics.median(counts) if counts else 0
    return [
        f"vLLM {version}: {len(rows)} multimodal model files, {len(valid)} come out as valid Python, with "
        f"{sum(counts)} marks, {median:g} in the median file.",
        "",
        "| marks | what |",
        "|---|---|",
        *(f"| {count} | {kind} |" for kind, count in kinds.most_common(MOST_COMMON)),
    ]


def kind_of(text: str) -> str:
    """Return a mark's text without the name that it is about."""
    return re.sub(r"^(not portable: )?\S+ (of \S+ )?", r"\1… ", text)


if __name__ == "__main__":
    sys.exit(main())
