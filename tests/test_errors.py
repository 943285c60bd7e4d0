"""The error table of the wire contract, and messages that fit into a status."""

from __future__ import annotations

import pytest

from rtp_mm.errors import (
    MAX_DETAILS_BYTES,
    BadItemsError,
    DeadlineError,
    DownloadFailedError,
    DownloadRefusedError,
    DrainingError,
    ItemFailure,
    LoadingError,
    MMError,
    NotSupportedError,
    ProcessError,
    QueueFullError,
    ReplyTooLargeError,
    UnauthenticatedError,
    WrongFormatError,
)

TABLE = [
    (WrongFormatError(""), "MM_WRONG_FORMAT_ERROR", "INVALID_ARGUMENT"),
    (NotSupportedError(""), "MM_NOT_SUPPORTED_ERROR", "INVALID_ARGUMENT"),
    (DownloadRefusedError(""), "MM_DOWNLOAD_FAILED", "INVALID_ARGUMENT"),
    (DownloadFailedError(""), "MM_DOWNLOAD_FAILED", "UNAVAILABLE"),
    (DeadlineError(""), "MM_PROCESS_ERROR", "DEADLINE_EXCEEDED"),
    (QueueFullError("", 1), "MM_PROCESS_ERROR", "RESOURCE_EXHAUSTED"),
    (DrainingError(""), "MM_REMOTE_RPC_FAILED", "UNAVAILABLE"),
    (LoadingError(""), "MM_EMPTY_ENGINE_ERROR", "UNAVAILABLE"),
    (ReplyTooLargeError(""), "MM_LONG_PROMPT_ERROR", "INVALID_ARGUMENT"),
    (ProcessError(""), "MM_PROCESS_ERROR", "INTERNAL"),
    (UnauthenticatedError(""), "MM_NOT_SUPPORTED_ERROR", "UNAUTHENTICATED"),
]


@pytest.mark.parametrize(("error", "name", "status"), TABLE, ids=lambda value: type(value).__name__)
def test_every_cause_has_its_name_and_status(error: MMError, name: str, status: str) -> None:
    assert (error.name, error.status) == (name, status)


@pytest.mark.parametrize("text", ["x" * 5000, "\u00e4" * 5000, "\U0001f600" * 5000])
def test_a_long_message_is_cut_on_a_character(text: str) -> None:
    message = ProcessError(text).wire_message
    assert MAX_DETAILS_BYTES - 6 < len(message.encode()) <= MAX_DETAILS_BYTES
    assert message.startswith("[MM_PROCESS_ERROR] ")
    assert message.endswith("...")
    assert "\ufffd" not in message


def test_a_short_message_is_left_alone() -> None:
    assert DeadlineError("no answer").wire_message == "[MM_PROCESS_ERROR] no answer"


def test_bad_items_are_all_named_and_what_cannot_be_mended_decides() -> None:
    error = BadItemsError(
        [
            ItemFailure(0, "http://a/x", DownloadFailedError("answered 503")),
            ItemFailure(3, "b.png", WrongFormatError("truncated")),
        ]
    )
    assert str(error) == "item 3 (b.png): truncated; item 0 (http://a/x): answered 503"
    assert [failure.index for failure in error.failures] == [3, 0]
    assert (error.name, error.status) == ("MM_WRONG_FORMAT_ERROR", "INVALID_ARGUMENT")
    assert error.wire_message.startswith("[MM_WRONG_FORMAT_ERROR] item 3")


def test_bad_items_that_may_be_mended_may_be_retried() -> None:
    error = BadItemsError([ItemFailure(0, "a", DownloadFailedError("")), ItemFailure(1, "b", DeadlineError(""))])
    assert error.status == "UNAVAILABLE"
