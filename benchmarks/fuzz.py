"""Differential fuzzing of quantflow with random networks on four paths, each case in a separate process.

    python benchmarks/fuzz.py --seeds 0:1000                 # all paths; about 3 s per case
    python benchmarks/fuzz.py --seeds 123:124 --paths qat --show   # print the network of a seed
    python benchmarks/fuzz.py --seeds 0:200 --minimise       # reduce each failing network
    python benchmarks/fuzz.py --rerun fuzz.json              # only the failed cases of an earlier run

float: export, core ATen, XNNPACK, the runtime, compared with the eager model. ptq: prepare, calibrate, convert, lower. qat: two
training steps without rounding, compared with the eager model; a few with rounding, convert, lower. quantize: ``qf.quantize``.
A case passes if its outputs are right, if rounding errors alone (measured) have the same effect, or if an error names the node
at fault. The seed determines network, weights and inputs. Writes JSON: counts, every case, and failed cases as scripts.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import executorch.kernels.quantized  # noqa: F401  loaded once, before processes fork
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing.generate import generate
from fuzzing.isolate import isolated
from fuzzing.minimise import minimised
from fuzzing.network import PRELUDE, Network
from fuzzing.paths import PATHS
from fuzzing.verdict import VERDICTS, Verdict, answer, judge
from fuzzing.warm_up import warm_up

from quantflow.text_table import aligned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:100", help="A:B, or one seed")
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of a case")
    parser.add_argument("--minimise", action="store_true", help="reduce failing networks")
    parser.add_argument("--show", action="store_true", help="only print the networks of these seeds")
    parser.add_argument("--rerun", type=Path, help="the failed cases of this result file")
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz.json"))
    options = parser.parse_args()
    first, _, last = options.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    if options.show:
        for seed in seeds:
            print(generate(seed).source())
        return
    warnings.simplefilter("ignore")
    warm_up()
    cases = _failed(options.rerun) if options.rerun else [(seed, path) for seed in seeds for path in options.paths]
    run = _Run(options.output, options.seconds)
    tasks = ((_network(seed), path) for seed, path in cases)
    bar = tqdm(
        isolated(answer, tasks, jobs=options.jobs, seconds=options.seconds), total=len(cases), desc="fuzz", unit="case"
    )
    for ended in bar:
        run.add(ended.task, judge(ended))
        bar.set_postfix(failed=len(run.failures))
    run.write()
    if options.minimise:
        run.minimise()
    print(run.table())


@functools.lru_cache(1)
def _network(seed: int) -> Network:
    """The network of ``seed``, generated in another process: it trains a step, and a fork loses autograd's threads."""
    (made,) = isolated(generate, [seed])
    if made.kind != "returned":
        raise RuntimeError(f"seed {seed}: {made.text}")
    return made.value


class _Run:
    """The outcomes so far, written to disk after each case."""

    def __init__(self, output: Path, seconds: float) -> None:
        self.output, self.seconds = output, seconds
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.cases: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.failed: list[tuple[Network, str, Verdict]] = []

    def add(self, case: tuple[Network, str], verdict: Verdict) -> None:
        network, path = case
        self.counts[path][verdict.ending] += 1
        told = ("ending", "reason", "db", "seconds")
        self.cases.append({"seed": network.seed, "path": path, **{name: getattr(verdict, name) for name in told}})
        if not verdict.good:
            self.failed.append((network, path, verdict))
            self.failures.append(_described(network, path, verdict))
        if not verdict.good or len(self.cases) % 20 == 0:
            self.write()

    def write(self) -> None:
        record = {"counts": self.counts, "prelude": PRELUDE, "failures": self.failures, "cases": self.cases}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(record, indent=1) + "\n")

    def minimise(self) -> None:
        """Replace failing networks by the smallest found with the same failure; only the first three of each kind."""
        seen: collections.Counter[str] = collections.Counter()
        for index, (network, path, verdict) in enumerate(tqdm(self.failed, desc="minimise", unit="case")):
            seen[verdict.kind] += 1
            if seen[verdict.kind] > 3:
                continue

            def alike(smaller: Network, path: str = path, verdict: Verdict = verdict) -> bool:
                (ended,) = isolated(answer, [(smaller, path)], seconds=self.seconds)
                return judge(ended).kind == verdict.kind

            self.failures[index]["minimised"] = _script(minimised(network, alike))
            self.write()

    def table(self) -> str:
        """The counts of cases by ending and path, as a table."""
        paths = list(self.counts)
        rows = [["", *paths]]
        for ending in VERDICTS:
            if any(self.counts[path][ending] for path in paths):
                rows.append([ending, *(str(self.counts[path][ending]) for path in paths)])
        return "\n".join(aligned(rows, figures=True))


def _described(network: Network, path: str, verdict: Verdict) -> dict[str, Any]:
    told = {k: v for k, v in vars(verdict).items() if v}
    return {"seed": network.seed, "path": path, **told, "network": _script(network)}


def _script(network: Network) -> str:
    """The source without the common prelude, which the results contain once."""
    return network.source().removeprefix(PRELUDE).strip()


def _failed(results: Path) -> list[tuple[int, str]]:
    return [(row["seed"], row["path"]) for row in json.loads(results.read_text())["failures"]]


if __name__ == "__main__":
    main()
