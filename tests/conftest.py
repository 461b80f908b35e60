"""What all tests share: a clean environment, a small real model, and no silent skip in CI."""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

IN_CI = bool(os.environ.get("CI"))


hypothesis.settings.register_profile("untimed", deadline=None)  # machines are shared
hypothesis.settings.load_profile("untimed")


def pytest_configure() -> None:
    """Whoever starts the tests in the background has Ctrl-C ignored, here and in what we start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make parity` must be able to fail: this spoils our side of the comparison on purpose."""
    parser.addoption("--move-a-weight", type=float, default=0.0, metavar="BY")
    parser.addoption("--times", type=int, default=1, help="how often each fault is done")
    parser.addoption("--write-table", choices=["anew", "rows"], help="in docs/reliability.md")
    parser.addoption("--minutes", type=float, default=0.5, help="of tests/soak")
    parser.addoption("--fuzz-requests", type=int, default=250, help="for each method")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings and no proxies of whoever runs the tests reach them."""
    for name in list(os.environ):
        if name.startswith("ZIMAGE_") or name.endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of the demo model with seeded random weights, a Turbo, in diffusers layout."""
    from demo_model.random_model import build

    folder = tmp_path_factory.mktemp("models") / "turbo"
    build(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Base: another shift, hence other defaults."""
    from demo_model.random_model import Shape, build

    folder = tmp_path_factory.mktemp("models") / "base"
    build(folder, Shape(shift=6.0), seed=1)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI everything can run: a skip there is a hole."""
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report
