"""Which code of the GPU's paths changed since its figures were last taken: `make gpu-status`.

python -m bench.gpu_status
"""

import json
import subprocess
import sys

from bench.timing import RESULTS

_PATHS = ("dit_service/engine", "dit_service/model", "dit_service/sampling", "bench/gpu.py")


def main() -> int:
    records = sorted((RESULTS / "gpu").glob("*.json"))
    if not records:
        print("no figures of a GPU were taken yet: `make bench-gpu` takes them")
    for record in records:
        found = json.loads(record.read_text())
        changed = subprocess.run(
            ["git", "diff", "--name-only", found["commit"], "HEAD", "--", *_PATHS],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        print(f"{record.stem}: {found['device']}, {found['commit'][:12]}, {len(changed)} changed")
        for path in changed:
            print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
