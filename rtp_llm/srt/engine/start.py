"""Start the core's process. Imports next to nothing, so that a command can do this first."""

from rtp_llm.srt.utils.process import StartedPython, start_python


def start_core_process() -> StartedPython:
    """Start a core process. It imports its modules, waits for its orders, and ends when its pipe closes."""
    return start_python("rtp_llm.srt.engine.process")
