"""What was done to a file, and what is left, read from the comments in the output."""

from dataclasses import dataclass

from rtp_llm.port.program import Program
from rtp_llm.port.rules.base import CONTINUED, MARK

NOT_PORTABLE = "not portable: "


@dataclass(frozen=True)
class Remark:
    """A ``# PORT:`` comment: its line in the output, counted from 1, and its text."""

    line: int
    text: str


@dataclass(frozen=True)
class Report:
    """Attributes:
    architectures: names that the output registers.
    done: what the rules did -> how often.
    review: places to look at, which may be right.
    not_portable: places that need what this engine does not have.
    left_out: classes of the file that no model of it uses.
    """

    architectures: tuple[str, ...]
    done: dict[str, int]
    review: tuple[Remark, ...]
    not_portable: tuple[Remark, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, program: Program, text: str) -> "Report":
        remarks = remarks_in(text)
        return cls(
            architectures=tuple(architecture for architecture, _ in program.entries),
            done=dict(program.done),
            review=tuple(remark for remark in remarks if not remark.text.startswith(NOT_PORTABLE)),
            not_portable=tuple(remark for remark in remarks if remark.text.startswith(NOT_PORTABLE)),
            left_out=tuple(program.left_out),
        )

    @property
    def is_complete(self) -> bool:
        return not self.review and not self.not_portable


def remarks_in(text: str) -> list[Remark]:
    """Return the ``# PORT:`` comments of a file."""
    remarks: list[Remark] = []
    open_line = 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith(MARK):
            remarks.append(Remark(number, stripped.removeprefix(MARK)))
            open_line = number
        elif stripped.startswith(CONTINUED) and open_line == number - 1 and remarks:
            last = remarks.pop()
            remarks.append(Remark(last.line, f"{last.text} {stripped.removeprefix(CONTINUED)}"))
            open_line = number
    return remarks
