"""Calls as argument name -> value, whether they were written by position or by name."""

from dataclasses import dataclass

import libcst as cst

from rtp_llm.port.rules.base import keyword, with_args
from rtp_llm.port.signatures import POSITIONAL, SIGNATURES


@dataclass
class NamedCall:
    """A call with its arguments named.

    Attributes:
        values: names -> arguments, in the order of the call.
        stars: ``*`` and ``**`` arguments, which have no names.
    """

    call: cst.Call
    values: dict[str, cst.Arg]
    stars: list[cst.Arg]

    @classmethod
    def of(cls, call: cst.Call, layer: str) -> "NamedCall | None":
        """Return None where a positional argument has no place in the layer's signature."""
        signature = SIGNATURES.get(layer, ())
        values: dict[str, cst.Arg] = {}
        stars = []
        for position, arg in enumerate(call.args):
            if arg.star:
                stars.append(arg)
            elif arg.keyword is not None:
                values[arg.keyword.value] = arg
            elif position < len(signature):
                values[signature[position]] = arg
            else:
                return None
        return cls(call, values, stars)

    def value(self, name: str) -> cst.BaseExpression | None:
        return self.values[name].value if name in self.values else None

    def set(self, name: str, value: cst.BaseExpression | str) -> None:
        self.values[name] = keyword(name, value)

    def drop(self, *names: str) -> list[str]:
        """Remove arguments; return those that were there."""
        return [name for name in names if self.values.pop(name, None) is not None]

    def rename(self, old: str, new: str) -> None:
        """Give an argument another name, in its place."""
        self.values = {
            (new if name == old else name): (keyword(new, arg.value) if name == old and arg.keyword else arg)
            for name, arg in self.values.items()
        }

    def written(self, positional: int = POSITIONAL, func: cst.BaseExpression | None = None) -> cst.Call:
        """Return the call; the first ``positional`` arguments stay positional, the others get their names."""
        args: list[cst.Arg] = []
        for position, (name, arg) in enumerate(self.values.items()):
            if arg.keyword is None and position >= positional:
                arg = keyword(name, arg.value).with_changes(comma=arg.comma)
            args.append(arg)
        call = with_args(self.call, args + self.stars)
        return call if func is None else call.with_changes(func=func)
