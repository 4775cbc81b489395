"""The page of published models: prose that people write, and a table of each section that the command replaces."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from benchmark.peers.peers import REPOSITORY
from benchmark.published.results import Record

PAGE = REPOSITORY / "docs" / "published_models.md"
LINE_LEN = 120


class PageError(Exception):
    """The page has no place for a section's table."""


def replace_section(page: Path, section: str, table: str, records: Mapping[str, Record]) -> None:
    """Write a section's table, with when and where it was measured, between the section's marks.

    Raises:
        PageError: the page has no such marks.
    """
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    text = page.read_text(encoding="utf-8")
    parts = re.split(f"({re.escape(begin)}|{re.escape(end)})", text)
    if [parts[1:2], parts[3:4]] != [[begin], [end]] or len(parts) != 5:
        raise PageError(f"{page} must have the line {begin} once, and {end} after it")
    parts[2] = f"\n{measured(section, records)}\n\n{table}\n"
    page.write_text("".join(parts), encoding="utf-8")


def measured(section: str, records: Mapping[str, Record]) -> str:
    """Return a line of when, where and of which commits all parts of a section were measured."""
    parts = [part for record in records.values() for part in record.get("parts", [record])]
    dates = sorted(part["date"] for part in parts)
    when = dates[0] if len(set(dates)) == 1 else f"{dates[0]} to {dates[-1]}"
    cpus, commits = ({part[name] for part in parts} for name in ("cpu", "commit"))
    line = (
        f"`python -m benchmark.published {section}`, {when}, {', '.join(sorted(cpus))}, "
        f"commit {', '.join(sorted(commits))}:"
    )
    return textwrap.fill(line, LINE_LEN, break_long_words=False, break_on_hyphens=False)
