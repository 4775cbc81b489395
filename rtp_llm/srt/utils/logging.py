"""One log format for all processes."""

import logging
import time

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOG_FORMAT = "[%(asctime)s %(levelname)s %(processName)s %(name)s] %(message)s"


def configure_logging(level: str) -> None:
    """Set the level of the package's loggers, and send them to stderr unless the application set up logging itself.

    Raises:
        ValueError: ``level`` is none of LOG_LEVELS.
    """
    if level.lower() not in LOG_LEVELS:
        raise ValueError(f"unknown log level {level!r}; have {', '.join(LOG_LEVELS)}")
    logger = logging.getLogger("rtp_llm")
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logger.addHandler(handler)


class RateLimit(logging.Filter):
    """Lets a warning through once in ``every_s`` seconds, with the number of its repetitions: warnings that clients can
    cause must not fill the disk."""

    def __init__(self, every_s: float = 10.0) -> None:
        super().__init__()
        self._every_s = every_s
        self._last: dict[str, tuple[float, int]] = {}  # message -> time of the last one shown, and how many since

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING or record.exc_info:
            return True
        message = record.msg
        now_s = time.monotonic()
        last_s, count = self._last.get(message, (-self._every_s, 0))
        if now_s - last_s < self._every_s:
            self._last[message] = (last_s, count + 1)
            return False
        self._last[message] = (now_s, 0)
        if count:
            record.msg = f"{message} (and {count} times in the last {now_s - last_s:.0f} s)"
        return True
