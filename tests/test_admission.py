"""What the server takes on: the sums come out even, and the oldest request always goes on."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from rtp_mm.engine.admission import Admission, Cost, Visit
from rtp_mm.errors import QueueFullError, ReplyTooLargeError, WrongFormatError


def new_admission() -> Admission:
    return Admission(max_requests=3, max_patches=100, max_bytes=1000, seconds_for=lambda patches: patches / 50)


def test_the_oldest_request_is_never_refused_and_the_next_becomes_it() -> None:
    admission = new_admission()
    with (
        admission.visiting(5000, 0) as first,
        admission.holding(first, Cost(500, 5000)),
        pytest.raises(QueueFullError, match="MM_MAX_BYTES_IN_FLIGHT_MB"),
        admission.visiting(1, 0),
    ):
        pass
    with admission.visiting(0, 0) as first, admission.visiting(0, 0) as second:
        with admission.holding(first, Cost(100, 0)):
            with pytest.raises(QueueFullError) as caught, admission.holding(second, Cost(1, 0)):
                pass
            assert caught.value.retry_after_ms == 2000
        with admission.holding(second, Cost(100, 1000)):
            pass
    with admission.visiting(0, 0) as second, admission.holding(second, Cost(101, 1001)):
        assert (admission.patches, admission.nbytes) == (101, 1001)
    assert (admission.requests, admission.patches, admission.nbytes) == (0, 0, 0)
    assert admission.rejections == {"bytes": 1, "patches": 1}


def test_answers_that_are_gone_count_no_more() -> None:
    """And leave nothing behind, whether or not anybody asks for the sum."""

    class Reply:
        pass

    admission = new_admission()
    for _ in range(100):
        admission.follow(Reply(), 10)
    assert len(admission._returned) <= 1
    assert admission.nbytes == 0


@pytest.mark.parametrize("way", ["message", "item", "download", "kept"])
@pytest.mark.parametrize("nbytes", [599, 600, 601])
def test_bytes_just_below_at_and_above_the_limit(way: str, nbytes: int) -> None:
    """1000 in all, of which another request holds 400."""
    admission = new_admission()
    with ExitStack() as held:
        held.enter_context(admission.visiting(400, 0))
        if nbytes > 600 and way != "kept":
            held.enter_context(pytest.raises(QueueFullError, match="MM_MAX_BYTES_IN_FLIGHT_MB"))
        visit = held.enter_context(admission.visiting(nbytes if way == "message" else 0, 0))
        match way:
            case "item":
                held.enter_context(admission.holding(visit, Cost(0, nbytes)))
            case "download":
                grow = held.enter_context(admission.metering([visit]))
                grow(500)
                grow(nbytes)
            case "kept":  # what is there already is counted, not refused
                admission.keep(visit, nbytes)
        assert admission.nbytes == 400 + nbytes
    assert admission.nbytes == 0


@pytest.mark.parametrize("nbytes", [499, 500, 501])
def test_the_oldest_requests_files_are_no_more_than_all_may_be(nbytes: int) -> None:
    """1000; another request holds 900 of its own, which is no matter, and one file of the oldest has 500."""
    admission = new_admission()
    with ExitStack() as held:
        oldest = held.enter_context(admission.visiting(0, 0))
        held.enter_context(admission.visiting(900, 0))
        held.enter_context(admission.holding(oldest, Cost(0, 10_500, 500)))
        if nbytes > 500:
            held.enter_context(pytest.raises(WrongFormatError, match="the request's files take more than 0 MiB"))
        held.enter_context(admission.metering([oldest]))(nbytes)
        assert admission.nbytes == 900 + 10_500 + nbytes
    assert (admission.nbytes, oldest.file_bytes, oldest.items) == (0, 0, 0)


def test_the_oldest_requests_only_file_may_be_of_any_size() -> None:
    admission = new_admission()
    with admission.visiting(0, 0) as oldest, admission.visiting(900, 0):
        with admission.metering([oldest]) as grow:
            grow(5000)
        with admission.holding(oldest, Cost(10, 6000, 5000)):
            assert admission.nbytes == 6900


@pytest.mark.parametrize("nbytes", [599, 600, 601])
def test_a_requests_answers_take_the_limit_together(nbytes: int) -> None:
    admission = new_admission()
    with admission.visiting(0, 0) as visit, ExitStack() as outcome:
        admission.keep_answer(visit, 400)
        if nbytes > 600:
            outcome.enter_context(pytest.raises(ReplyTooLargeError, match="the answers take more than 0 MiB"))
        admission.keep_answer(visit, nbytes)
    with admission.visiting(0, 0) as visit:
        admission.keep_answer(visit, 10**6)  # one is welcome
    assert admission.nbytes == 0


def test_a_download_begins_only_where_its_patches_will_probably_fit() -> None:
    """Before anything is known an item counts as a thirty-second of the queue; then as items have been of late."""
    admission = new_admission()
    with admission.visiting(0, 0) as first:
        admission.patches = 96
        admission.check_room(Visit(0, 0), downloads=0)
        with pytest.raises(QueueFullError, match="downloads under way: 1"):
            admission.check_room(Visit(0, 0), downloads=1)
        admission.check_room(first, downloads=1)
        admission.patches = 0
        for _ in range(100):
            with admission.holding(first, Cost(10, 0)):
                pass
        admission.patches = 71
        admission.check_room(Visit(0, 0), downloads=1)
        with pytest.raises(QueueFullError):
            admission.check_room(Visit(0, 0), downloads=2)


def test_downloads_that_never_end_leave_half_of_the_queue_to_others() -> None:
    admission = new_admission()
    with admission.visiting(0, 0) as first:
        with admission.holding(first, Cost(50, 0)):
            admission.check_room(Visit(0, 0), downloads=1000)
        with admission.holding(first, Cost(51, 0)), pytest.raises(QueueFullError):
            admission.check_room(Visit(0, 0), downloads=1000)


def test_downloads_of_one_request_count_for_each_other_before_any_has_begun() -> None:
    admission = new_admission()
    with admission.visiting(0, 0), admission.visiting(0, 0) as second:
        admission.patches = 96
        admission.check_room(second, downloads=0)
        with pytest.raises(QueueFullError, match="downloads under way: 1"):
            admission.check_room(second, downloads=0)


def test_what_was_not_predicted_counts_once_it_is_known() -> None:
    """And teaches what downloads come to; until then it is not taken for nothing."""
    admission = new_admission()
    with admission.visiting(0, 0) as first:
        guessed = admission._usual_patches
        with admission.holding(first, Cost(0, 10)) as held:
            assert (admission.patches, admission.nbytes) == (0, 10)
            assert admission._usual_patches == guessed
            held.settle(Cost(150, 2000))
            assert (admission.patches, admission.nbytes) == (150, 2000)
            assert admission._usual_patches > guessed
            with pytest.raises(QueueFullError, match="150 patches"), admission.holding(Visit(0, 0), Cost(1, 0)):
                pass
        assert (admission.patches, admission.nbytes) == (0, 0)


def test_what_comes_to_light_before_it_is_spent_may_be_refused() -> None:
    admission = new_admission()
    visit = Visit(0, 0)
    with admission.visiting(0, 0) as oldest, admission.holding(visit, Cost(0, 10)) as held:
        admission.patches = 60
        with pytest.raises(QueueFullError, match="60 patches"):
            held.expect(Cost(41, 1000), visit)
        with pytest.raises(QueueFullError, match="in flight"):
            held.expect(Cost(40, 1 << 40), visit)
        assert (admission.patches, admission.nbytes) == (60, 10)
        held.expect(Cost(40, 1000), visit)
        assert (admission.patches, admission.nbytes) == (100, 1000)
        held.expect(Cost(41, 1000), oldest)
        assert (admission.patches, admission.nbytes) == (101, 1000)
    assert (admission.patches, admission.nbytes) == (60, 0)
    held.expect(Cost(40, 1000), visit)  # too late to count
    assert (admission.patches, admission.nbytes) == (60, 0)


def test_of_several_who_wait_the_one_that_is_refused_last_speaks() -> None:
    admission = new_admission()
    with admission.visiting(0, 3) as oldest, admission.visiting(0, 1) as hasty, admission.visiting(0, 5) as patient:
        assert admission.foremost([hasty, patient]) is patient
        assert admission.foremost([patient, hasty, oldest]) is oldest


def test_what_is_refused_tells_what_downloads_come_to() -> None:
    admission = new_admission()
    with admission.visiting(0, 0):
        admission.patches = 60
        admission.check_room(Visit(0, 0), downloads=0)
        for _ in range(50):
            with pytest.raises(QueueFullError), admission.holding(Visit(0, 0), Cost(50, 0)):
                pass
        with pytest.raises(QueueFullError):
            admission.check_room(Visit(0, 0), downloads=0)


def test_requests_are_counted_below_at_and_above_the_limit() -> None:
    admission = new_admission()
    with admission.visiting(0, 0), admission.visiting(0, 0), admission.visiting(0, 0):
        with pytest.raises(QueueFullError, match="MM_MAX_QUEUE_SIZE"), admission.visiting(0, 0):
            pass
        assert admission.requests == 3


def test_what_grows_is_counted_from_any_thread_and_given_back_once() -> None:
    """Two threads tell sizes in any order, one of them after its download was given up."""
    admission = new_admission()
    with admission.visiting(0, 0) as first:
        with admission.metering([first]) as grow:
            threads = [threading.Thread(target=lambda: [grow(n) for n in range(500)]) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert admission.nbytes == 499
        grow(900)
        assert admission.nbytes == 0
        with admission.visiting(0, 0) as second, admission.metering([second]) as grow:
            grow(1000)
            with pytest.raises(QueueFullError):
                grow(1001)
            assert admission.nbytes == 1000
    assert admission.nbytes == 0
