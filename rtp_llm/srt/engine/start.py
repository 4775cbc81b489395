"""Starting the core's process. Imports next to nothing, so that it can be the first thing that a command does."""

from rtp_llm.srt.utils.process import StartedPython, start_python


def start_core_process() -> StartedPython:
    """A core that imports what it needs, then waits for its orders; it ends when its pipe closes."""
    return start_python("rtp_llm.srt.engine.process")
