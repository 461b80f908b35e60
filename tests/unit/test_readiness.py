from zimage_core.serving.readiness import Readiness


async def test_a_service_that_drains_does_not_become_ready_again() -> None:
    readiness = Readiness("some.Service")
    readiness.set(True)
    assert readiness.is_ready
    await readiness.drain()
    readiness.set(True)
    assert not readiness.is_ready
