"""One log format for all processes."""

import logging

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOG_FORMAT = "[%(asctime)s %(levelname)s %(processName)s %(name)s] %(message)s"


def configure_logging(level: str) -> None:
    """Sets the level of the package's loggers, and sends them to stderr unless the application set up logging itself.

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
