import pytest

from zimage_core.errors import Overloaded
from zimage_core.serving.admission import Admission


def test_one_runs_some_wait_more_are_turned_away() -> None:
    admission = Admission(max_waiting=1)
    with admission.place() as first, admission.place() as second:
        assert (first, second) == (0, 1)
        with pytest.raises(Overloaded) as refusal, admission.place():
            pass
        assert refusal.value.retry_after
    with admission.place() as again:
        assert again == 0


def test_a_place_is_given_back_when_its_call_fails() -> None:
    admission = Admission(max_waiting=0)
    with pytest.raises(RuntimeError), admission.place():
        raise RuntimeError
    with admission.place() as free:
        assert free == 0
