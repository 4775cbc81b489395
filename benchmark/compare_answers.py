"""Compares two runs of an evaluation, question by question: python benchmark/compare_answers.py OURS.jsonl HF.jsonl

Both files come from --answers. The exit status is 0 if everything is equal, 1 if anything differs, 2 if they cannot be
compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEYS = ("status", "prompt_sha256", "text", "answer")
SHOWN = 5

Answers = dict[str, dict[str, Any]]


def read_answers(path: Path) -> Answers:
    """Lines of an answers file by the names of their questions. Raises OSError, or ValueError for another file."""
    answers: Answers = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if not isinstance(row, dict) or not {"name", *KEYS} <= row.keys():
            raise ValueError(f"{path}, line {number}: not a line that --answers writes")
        answers[row["name"]] = row
    if not answers:
        raise ValueError(f"{path} is empty")
    return answers


def differing(ours: Answers, theirs: Answers) -> dict[str, list[str]]:
    """For each of KEYS, the questions of both in which it differs."""
    common = [name for name in ours if name in theirs]
    return {key: [name for name in common if ours[name][key] != theirs[name][key]] for key in KEYS}


def compare(first: Path, second: Path) -> int:
    ours, theirs = read_answers(first), read_answers(second)
    alone = sorted(ours.keys() ^ theirs.keys())
    found = differing(ours, theirs)
    different = {name for names in found.values() for name in names}
    num_common = len(ours.keys() & theirs.keys())
    num_answered = sum(row["status"] == "answered" for row in ours.values())
    print(f"{num_common} questions in both ({num_answered} answered in the first): {num_common - len(different)} equal")
    for key, names in found.items():
        if names:
            print(f"{key} differs in {len(names)}: {', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}")
    for name in found["text"][:SHOWN]:
        print(f"{name}: {ours[name]['text']!r} and {theirs[name]['text']!r}")
    if alone:
        print(f"{len(alone)} questions in one only: {', '.join(alone[:SHOWN])}{' ...' if len(alone) > SHOWN else ''}")
    return 1 if different or alone else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare two runs of an evaluation, question by question.")
    parser.add_argument("first", type=Path, help="a file that --answers wrote")
    parser.add_argument("second", type=Path, help="another one")
    args = parser.parse_args(argv)
    try:
        return compare(args.first, args.second)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
