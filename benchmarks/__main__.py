"""``make bench``: all rows into ``benchmarks/results.json``; ``ARGS="--quick NAME …"`` for a part."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

from pllm_helpers.runtime import prepare

from . import (
    generation,
    kill,
    kill_tuning,
    lomo,
    lora,
    memory,
    metrics_throughput,
    mezo,
    mezo_variants,
    policy_overhead,
)

MODULES = {
    "metrics_throughput": metrics_throughput,
    "generation": generation,
    "memory": memory,
    "policy_overhead": policy_overhead,
    "kill": kill,
    "kill_tuning": kill_tuning,
    "lora": lora,
    "mezo": mezo,
    "mezo_variants": mezo_variants,
    "lomo": lomo,
}
RESULTS = Path(__file__).with_name("results.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(MODULES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    unknown = set(options.names) - set(MODULES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected any of {', '.join(MODULES)}")
    runtime = prepare(0)
    kept = (
        [] if not options.names else json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    )
    for name in options.names or MODULES:
        start = time.perf_counter()
        print(f"{name} …", flush=True)
        rows = MODULES[name].run(quick=options.quick)
        new = {r["name"] for r in rows}
        kept = [r for r in kept if r["name"] not in new] + rows
        options.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        for r in rows:
            interval = f"[{r['ratio_low']}, {r['ratio_high']}]"
            print(
                f"  {r['name']}: {r['ours']} against {r['theirs']} {r['unit']}; ratio {r['ratio']} {interval}",
                flush=True,
            )
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{options.out.name} written; {runtime.threads} threads, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
