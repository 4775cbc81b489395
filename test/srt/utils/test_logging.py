"""The package's log level and handlers, and that tests do not inherit them from each other."""

import logging

import pytest

from rtp_llm.srt.utils.logging import RateLimit, configure_logging


@pytest.fixture(scope="module", autouse=True)
def configured_before_any_test() -> None:
    """As an Engine of module scope does."""
    configure_logging("error")


@pytest.mark.parametrize("turn", [1, 2])
def test_a_level_set_outside_a_test_is_not_inherited(turn: int) -> None:
    logger = logging.getLogger("rtp_llm")
    assert (logger.level, logger.handlers) == (logging.NOTSET, [])


def test_the_application_s_own_handlers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("rtp_llm")
    configure_logging("info")
    assert logger.level == logging.INFO
    assert not logger.handlers  # the root has some: pytest's
    monkeypatch.setattr(logger, "propagate", False)
    configure_logging("debug")
    configure_logging("debug")
    assert len(logger.handlers) == 1


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown log level 'loud'; have debug, info"):
        configure_logging("loud")


def test_what_clients_make_a_server_say_is_said_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("rtp_llm.srt.utils.logging.time.monotonic", lambda: now_s)
    seldom, said = RateLimit(every_s=10), []
    for message, level, later_s in [
        ("bad", logging.WARNING, 0),
        ("bad", logging.WARNING, 1),
        ("bad", logging.WARNING, 1),
        ("other", logging.WARNING, 0),
        ("info", logging.INFO, 0),
        ("info", logging.INFO, 0),
        ("bad", logging.WARNING, 9),
        ("bad", logging.ERROR, 0),
    ]:
        now_s += later_s
        record = logging.LogRecord("name", level, "path", 1, message, None, None)
        if seldom.filter(record):
            said.append(record.getMessage())
    assert said == ["bad", "other", "info", "info", "bad (and 2 times in the last 11 s)", "bad"]
