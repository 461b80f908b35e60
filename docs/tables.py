"""Writes the tables of the documents from the code, or proves them fresh.

python docs/tables.py            rewrites what stands between the markers
python docs/tables.py --check    changes nothing; exits 1 and names what is stale
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from demo_model import evaluation
from zimage_core import errors, settings
from zimage_core.serving import metrics
from zimage_core.wire import limits, status

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "ARCHITECTURE.md", ROOT / "README.md"]
ROOMS = (
    "protos/zimage_rpc",
    "zimage_core",
    "encoder_service",
    "dit_service",
    "trainer_service",
    "client",
    "demo_model",
    "bench",
)
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def error_rows() -> Iterator[tuple[str, ...]]:
    """One row for each class that a caller can meet."""
    yield "class", "gRPC status", "usual reason", "meaning"
    for cls in vars(errors).values():
        is_error = isinstance(cls, type) and issubclass(cls, errors.ZImageError)
        if is_error and cls is not errors.ZImageError:
            code = status.code_of(cls("")).name
            meaning = " ".join((cls.__doc__ or "").split())
            yield f"`{cls.__name__}`", code, f"`{cls.default_reason}`", meaning


def limit_rows() -> Iterator[tuple[str, ...]]:
    """The limits that no setting moves."""
    yield "limit", "value"
    yield "largest message", f"{limits.MESSAGE_BYTES >> 20} MiB"
    yield "largest piece of a picture", f"{limits.CHUNK_BYTES >> 20} MiB"
    yield "adapters of one picture", str(limits.ADAPTERS_PER_REQUEST)
    yield "prompts in one Encode", str(limits.PROMPTS_PER_ENCODE)
    yield "text of one prompt, all parts together", f"{limits.PROMPT_BYTES >> 20} MiB"
    yield "attempts of a unary call", str(limits.UNARY_ATTEMPTS)
    yield "keepalive ping after silence of", f"{limits.KEEPALIVE_SECONDS} s"
    yield "answer to a ping within", f"{limits.KEEPALIVE_TIMEOUT_SECONDS} s"


def settings_rows(program: str) -> Callable[[], Iterator[tuple[str, ...]]]:
    """The settings of one program."""

    def rows() -> Iterator[tuple[str, ...]]:
        yield "setting", "default", "meaning"
        for name, field in settings.PROGRAMS[program].model_fields.items():
            default = "required" if field.is_required() else f"`{field.default}`"
            shown = "unset" if field.default in (None, "") else default
            yield f"`{name}`", shown, field.description or ""

    return rows


def metric_rows() -> Iterator[tuple[str, ...]]:
    """What a service shows at /metrics."""
    yield "metric", "labels", "meaning"
    for metric in metrics.ALL:
        [family] = metric.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        yield f"`{name}`", labels, family.documentation


def evaluation_rows(
    rows: Callable[[dict[str, Any]], Iterator[tuple[str, ...]]],
) -> Callable[[], Iterator[tuple[str, ...]]]:
    """What the last `make demo-eval` measured."""
    return lambda: rows(json.loads((ROOT / "docs/demo-model/evaluation.json").read_text()))


def file_rows() -> Iterator[tuple[str, ...]]:
    """Every source file, with the first sentence of what it says of itself."""
    yield "file", "purpose"
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")) + sorted((ROOT / room).rglob("*.proto")):
            if path.name != "__init__.py" or path.stat().st_size:
                yield f"`{path.relative_to(ROOT)}`", _purpose(path)


def _purpose(path: Path) -> str:
    if path.suffix == ".proto":
        said = path.read_text().splitlines()[0].removeprefix("//")
    else:
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0].rstrip(".:")


TABLES: dict[str, Callable[[], Iterator[tuple[str, ...]]]] = {
    "files": file_rows,
    "errors": error_rows,
    "limits": limit_rows,
    "metrics": metric_rows,
    "demo_accuracy": evaluation_rows(evaluation.accuracy_rows),
    "demo_steps": evaluation_rows(evaluation.steps_rows),
    "demo_others": evaluation_rows(evaluation.other_rows),
    **{f"settings_{program}": settings_rows(program) for program in settings.PROGRAMS},
}


def main() -> int:
    """Runs the command line."""
    check = sys.argv[1:] == ["--check"]
    stale = []
    for page in PAGES:
        text = page.read_text()
        fresh = _MARKED.sub(lambda found: found[1] + _table(TABLES[found[2]]()) + found[3], text)
        if fresh != text:
            stale.append(page.name)
            if not check:
                page.write_text(fresh)
    if check and stale:
        sys.stderr.write(f"stale tables in {', '.join(stale)}; run `make docs`\n")
        return 1
    return 0


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    head, *body = (f"| {' | '.join(row)} |\n" for row in rows)
    return head + "|" + " --- |" * (head.count("|") - 1) + "\n" + "".join(body)


if __name__ == "__main__":
    sys.exit(main())
