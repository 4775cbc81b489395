"""RTP-LLM in Python: an inference engine in which supporting a new model is one file.

The names below are imported on first use, so that ``import rtp_llm`` costs nothing.
"""

import os
import sys


def _leave_out_working_directory() -> None:
    """Takes off ``sys.path`` what ``python -m rtp_llm...`` puts first: the working directory, which may be a
    checkpoint's, with files that are named like modules.

    It stays where this package itself lies in it (a source checkout). It goes behind everything else where a package
    lies in it that RTP_LLM_EXTERNAL_MODEL_PACKAGE names: whoever names that package trusts the directory.
    """
    named = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)] if sys.argv[:1] == ["-m"] else ""  # while it is imported
    if not named.removeprefix("-m").startswith("rtp_llm") or sys.flags.safe_path:
        return
    directory = sys.path[0]
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if directory != os.getcwd() or os.path.realpath(directory) == os.path.realpath(own):
        return
    del sys.path[0]
    packages = os.environ.get("RTP_LLM_EXTERNAL_MODEL_PACKAGE", "").split(",")
    places = [os.path.join(directory, name.strip().split(".")[0]) for name in packages if name.strip()]
    if any(os.path.isdir(place) or os.path.isfile(f"{place}.py") for place in places):
        sys.path.append(directory)


def _let_threads_sleep() -> None:
    """Makes OpenMP's threads that wait for each other sleep after some microseconds. They would go on for milliseconds,
    while another process computes on the processor of the one that all wait for (docs/cpu.md has figures).

    GNU's library reads this once, when it is loaded with torch. Whoever has set one of these variables decides.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


_leave_out_working_directory()
_let_threads_sleep()

from importlib import import_module  # noqa: E402 - nothing may be imported from the working directory
from typing import TYPE_CHECKING, Any  # noqa: E402

from rtp_llm.version import __version__ as __version__  # noqa: E402

if TYPE_CHECKING:
    from rtp_llm.srt.configs.server_args import ServerArgs as ServerArgs
    from rtp_llm.srt.entrypoints.engine import Engine as Engine
    from rtp_llm.srt.models.registry import ModelRegistry as ModelRegistry
    from rtp_llm.srt.sampling_params import SamplingParams as SamplingParams

_HOMES = {
    "Engine": "rtp_llm.srt.entrypoints.engine",
    "ModelRegistry": "rtp_llm.srt.models.registry",
    "SamplingParams": "rtp_llm.srt.sampling_params",
    "ServerArgs": "rtp_llm.srt.configs.server_args",
}

__all__ = ["Engine", "ModelRegistry", "SamplingParams", "ServerArgs"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rtp_llm' has no attribute {name!r}")
