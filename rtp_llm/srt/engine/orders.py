"""The message with which the supervisor configures a core process."""

from dataclasses import dataclass

from rtp_llm.srt.configs.server_args import ServerArgs


@dataclass(frozen=True, slots=True)
class Orders:
    """The configuration of a core process, sent once over the pipe that it inherits."""

    server_args: ServerArgs  # its model_path is the checkpoint's local directory
    registrations: bytes  # see models/registrations.py
    socket_dir: str  # private to this process and its parent
    replica: int = 0  # its place among the cores of a server
    free_bytes: int | None = None  # memory to plan with, as before a restart; None: what there is
