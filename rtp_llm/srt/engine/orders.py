"""What the supervisor tells a core process to be."""

from dataclasses import dataclass

from rtp_llm.srt.configs.server_args import ServerArgs


@dataclass(frozen=True, slots=True)
class Orders:
    """Sent once, by value, over the pipe that the process inherits."""

    server_args: ServerArgs  # whose model_path is the checkpoint's local directory
    registrations: bytes  # see models/registrations.py
    socket_dir: str  # private to this process and its parent
