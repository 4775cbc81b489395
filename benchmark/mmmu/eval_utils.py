"""Reading an answer to a question of MMMU or MMMU-Pro, and judging it.

The rules are those of the data sets' authors (Yue et al. 2023, "MMMU", and 2024, "MMMU-Pro"), so that figures can be
compared with published ones.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

PUNCTUATION = ",.!?;:'"
MIN_WORDS_OF_A_SENTENCE = 6  # only so long a text is searched for an option's text
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b", re.ASCII),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", re.ASCII),  # 1.5e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", re.ASCII),
)
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)

Finder = Callable[[str, str, str], int]  # (text, letter, option) -> where it last occurs, -1 if nowhere


# Multiple choice


def read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a text gives, as MMMU reads it; None if it gives none.

    ``(B)`` counts, else a ``B`` between blanks, else, in more than five words, the text of an option. Where several are
    found, the last one counts. Punctuation at the ends of the text is no part of it.
    """
    return _chosen(_trimmed(text), options, [_in_brackets, _between_blanks])


def read_choice_pro(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a text gives, as MMMU-Pro reads it: first, the only one after the last ``Answer:``.

    Then as ``read_choice``, where a ``B.`` counts as well. A letter is one by itself: that in "DNA" is none.
    """
    _, answer, rest = text.rpartition("Answer:")
    letters = [letter for letter in options if re.search(rf"(?<!\w){letter}(?!\w)", rest)] if answer else []
    if len(letters) == 1:
        return letters[0]
    return _chosen(_trimmed(text), options, [_in_brackets, _before_a_blank, _before_a_full_stop])


def _trimmed(text: str) -> str:
    """Each mark is taken off by itself, in this order, as the authors do."""
    for mark in PUNCTUATION:
        text = text.strip(mark)
    return f" {text} "


def _chosen(text: str, options: Mapping[str, str], finders: Sequence[Finder]) -> str | None:
    """The option of the first finder that finds any; of several, the one that comes last in the text."""
    if len(text.split()) >= MIN_WORDS_OF_A_SENTENCE:
        finders = [*finders, _by_its_text]
    for find in finders:
        places = {letter: find(text, letter, option) for letter, option in options.items()}
        found = {letter: place for letter, place in places.items() if place >= 0}
        if found:
            return max(found, key=lambda letter: found[letter])
    return None


def _in_brackets(text: str, letter: str, option: str) -> int:
    return text.rfind(f"({letter})")


def _between_blanks(text: str, letter: str, option: str) -> int:
    return text.rfind(f" {letter} ")


def _before_a_blank(text: str, letter: str, option: str) -> int:
    return _last_match(rf"(?<!\w){letter}(?=\s)", text)


def _before_a_full_stop(text: str, letter: str, option: str) -> int:
    return _last_match(rf"(?<!\w){letter}(?=\.)", text)


def _by_its_text(text: str, letter: str, option: str) -> int:
    return text.lower().rfind(option.lower()) if option else -1


def _last_match(pattern: str, text: str) -> int:
    return max((match.start() for match in re.finditer(pattern, text)), default=-1)


# Open questions


def read_open(text: str) -> list[str | float]:
    """Everything in a text that may be the answer to an open question: pieces in lower case, and numbers.

    A piece is what follows the last of the words that announce an answer (KEYS; in the last line also ``=``) in a line,
    the shortest such end; where no line has one, the whole text. The numbers are those in the pieces.
    """
    text = text.strip().strip(".").lower()
    pieces = _pieces(text)
    found = pieces + [number for piece in pieces for pattern in NUMBERS for number in pattern.findall(piece)]
    return list(dict.fromkeys(form for one in found for form in normal_forms(one)))


def is_right(found: Sequence[str | float], answers: Sequence[str]) -> bool:
    """Whether any of the pieces contains one of the answers, or any of the numbers equals one."""
    forms = [form for answer in answers for form in normal_forms(answer)]
    words = [form for form in forms if isinstance(form, str)]
    return any(any(word in one for word in words) if isinstance(one, str) else one in forms for one in found)


def normal_forms(text: str) -> list[str | float]:
    """What is compared: a number to two decimals, else the text in lower case; a single character beside a blank."""
    text = text.strip()
    number = text.replace(",", "").strip()
    if NUMBER.fullmatch(number) and math.isfinite(float(number)):
        return [round(float(number), 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _pieces(text: str) -> list[str]:
    lines = text.split("\n")
    pieces = []
    for number, line in enumerate(lines, start=1):
        keys = (*KEYS, "=") if number == len(lines) else KEYS
        shortest = ""
        for end in (line.rpartition(key)[2].strip() for key in keys if key in line):
            if not shortest or len(end) < len(shortest):  # an empty end gives way to the next
                shortest = end
        if shortest and shortest not in set(PUNCTUATION):
            pieces.append(shortest)
    return pieces or [text]
