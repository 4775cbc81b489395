"""What importing transformers brings along, kept to what is used.

Its modules ask at their import whether torch is installed, and import it and more if it is. Both functions here answer
"no": one for a single module, one for a whole process. A module that was imported before keeps what it has.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module

_CHECKS = "transformers.utils.type_validators"
_ASKED = ("transformers.utils.import_utils", "transformers.utils", "transformers")  # of is_torch_available
_USED_BY_CHECKS = ("transformers.tokenization_utils_base", "transformers.video_utils", "transformers.image_utils")


@cache
def leave_out_activations() -> None:
    """Keep transformers' configurations from importing the code of its models, before the first one is read.

    They check that ``hidden_act`` names one of transformers' own functions. For these names they import the functions,
    and so torch's compilers, Triton and sympy: 190 MB in each process, and two seconds. Without torch they leave the
    check out, so the module that makes it is imported as if torch were missing. A model class here refuses an
    activation that it does not know.
    """
    if _CHECKS in sys.modules:
        return
    for module in _USED_BY_CHECKS:  # these as usual: others use them too
        with suppress(ImportError):  # what they need may not be installed
            import_module(module)
    with _torch_hidden(), suppress(ImportError):  # another version may have no such module
        import_module(_CHECKS)


@contextmanager
def _torch_hidden() -> Iterator[None]:
    real = import_module(_ASKED[0]).is_torch_available
    _answer_with(_is_missing)
    try:
        yield
    finally:
        _answer_with(real)


def hide_torch() -> None:
    """Make transformers do without torch in this process, for good: its configurations, tokenizers and chat templates
    need none, its models and processors of media do. Do nothing if torch is imported already."""
    if "torch" not in sys.modules:
        _answer_with(_is_missing)


def _answer_with(answer: Callable[[], bool]) -> None:
    for home in _ASKED:
        vars(import_module(home))["is_torch_available"] = answer


def _is_missing() -> bool:
    return False
