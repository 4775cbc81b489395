"""How a new architecture is called: by its module, by its classes, and as a model type."""

import keyword
import re
from dataclasses import dataclass
from importlib.util import find_spec

from rtp_llm.srt.configs.own_config import is_known

_FORM = re.compile(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*")
_WORD = re.compile(r"[A-Z]+[0-9]*(?![a-z])|[A-Z]?[a-z][a-z0-9]*|[0-9]+")


class NewModelError(ValueError):
    """The files of a new model cannot be written."""


@dataclass(frozen=True)
class Name:
    """``module``: my_model, of files, the package and the model type; ``stem``: MyModel, which classes begin with."""

    module: str
    stem: str

    @classmethod
    def of(cls, text: str) -> "Name":
        """Read what a user calls an architecture.

        Raises:
            NewModelError: it is no name, or one that Python or transformers has already.
        """
        if not _FORM.fullmatch(text):
            raise NewModelError(
                f"{text!r} cannot be the name of an architecture: letters and digits, beginning with a letter, and - "
                "or _ between words, such as zeta, MyModel or my-model"
            )
        words = [word for part in re.split("[-_]", text) for word in _WORD.findall(part)]
        module = "_".join(word.lower() for word in words)
        stem = "".join(word[0].upper() + word[1:] for word in words)
        if keyword.iskeyword(module):
            raise NewModelError(f"{module} is a word of Python: choose another name")
        if is_known(module):
            raise NewModelError(
                f"transformers knows the model type {module!r}: choose another name, or see whether `rtp-llm generate` "
                "runs its checkpoints"
            )
        return cls(module, stem)

    def check_importable(self) -> None:
        """Raise NewModelError if a package of this name would hide another one."""
        if find_spec(self.module) is not None:
            raise NewModelError(f"Python finds a module {self.module} already: choose another name")

    def fill(self, template: str) -> str:
        """Return a template's text or path with this name in place of Zeta."""
        return template.replace("zeta", self.module).replace("Zeta", self.stem)
