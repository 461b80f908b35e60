"""Fair timings on a shared machine: what is compared runs in turn, ratios are taken per round."""

import json
import platform
import statistics
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

_SETTLING_SECONDS = 0.05


@dataclass(frozen=True)
class Timings:
    """The seconds of every run, by name and round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """The typical seconds of one run."""
        return statistics.median(self.seconds[name])

    def ratio(self, numerator: str, denominator: str) -> float:
        """The typical quotient of two runs of the same round."""
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return statistics.median(above / below for above, below in pairs)


def compare(rounds: int = 7, **runs: Callable[[], object]) -> Timings:
    """Times all runs in turn; the order turns around every round, after one round to warm up.
    Between two runs the threads of the one before get time to fall asleep."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for index in range(rounds):
        for name, run in list(runs.items())[:: 1 if index % 2 == 0 else -1]:
            time.sleep(_SETTLING_SECONDS)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return Timings(seconds)


def machine(*packages: str) -> dict[str, Any]:
    """What a figure holds for: the processor and the versions of what ran."""
    return {
        "processor": _processor(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def flags(description: str | None) -> ArgumentParser:
    """Those of every benchmark of a forward."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Keeps the figures of one benchmark beside the others."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
