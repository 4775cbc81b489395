"""What a test file in the checkout has besides: the line of the list of supported models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A checkpoint of the list of supported models."""

    name: str
    architecture: str
    slow: bool = False
    video: str | None = None


CASES = (Case("zeta", "ZetaForCausalLM"),)
