"""`flatquant demo` on this machine's CPU: its table and its time.

    python -m benchmarks.demo_cpu --output FOLDER

With `FLATQUANT_DATA` set, perplexity on WikiText-2 is in it too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import RESULTS, write_result
from flatquant import demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--out", default=str(RESULTS))
    args = parser.parse_args()
    result = demo.run(Path(args.output), overwrite=True)
    metrics = {key: result[key] for key in ("model", "scheme", "rows", "prompt", "text", "seconds")}
    write_result(Path(args.out) / "demo-cpu.json", "demo-cpu", seeds=[0], metrics=metrics, samples=[metrics])
    print(metrics)


if __name__ == "__main__":
    main()
