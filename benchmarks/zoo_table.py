"""The command of a zoo: each model in a process of its own, and a table of the results."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

COLUMNS = (
    "model",
    "stage",
    "int8",
    "planned calls",
    "calls",
    "float calls",
    "to_q_db",
    "to_pte_db",
    "stock_db",
    "pte/float",
    "bytes/parameter",
    "ms",
    "float_ms",
    "outside",
)


def parse_arguments(description: str | None, output: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="only these models")
    parser.add_argument("--all", action="store_true", help="every model, or one of every family")
    parser.add_argument("--modes", nargs="+", default=["float", "ptq", "qat"], choices=["float", "ptq", "qat"])
    parser.add_argument("--stock", action="store_true", help="also the stock quantizer and observers, simulated")
    parser.add_argument(
        "--recover", action="store_true", help="recover accuracy after calibration, as qf.quantize does"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of models at a time")
    parser.add_argument("--fresh", action="store_true", help="ignore existing results")
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def report(results: list[dict[str, Any]], output: Path) -> None:
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for result in results:
        modes = result.get("modes", {})
        base = modes.get("float", {})
        for mode, row in modes.items():
            if mode == "float" and "error" not in row:
                continue
            outside = {**row.get("outside", {}), **{f"{k} (float)": v for k, v in row.get("floating", {}).items()}}
            worst = sorted(outside, key=outside.__getitem__, reverse=True)[:4]
            cells = {
                "model": f"{result['model']} {mode}",
                "stage": row["stage"] if "error" not in row else f"{row['stage']}: {row['error'][:80]}",
                "stock_db": result.get("stock_db") if mode == "ptq" else None,
                "pte/float": round(row["bytes"] / base["bytes"], 3) if "bytes" in row and "bytes" in base else None,
                "float_ms": base.get("ms"),
                "float calls": base.get("calls"),
                "bytes/parameter": round(row["bytes"] / result["parameters"], 2) if "bytes" in row else None,
                "outside": ", ".join(f"{outside[w]} {w.removeprefix('aten::')}" for w in worst),
            }
            values = {**{c: row.get(c) for c in COLUMNS}, **cells}
            lines.append("| " + " | ".join("" if values[c] is None else str(values[c]) for c in COLUMNS) + " |")
        if "error" in result:
            lines.append(f"| {result['model']} | {result['error']} |" + " |" * (len(COLUMNS) - 2))
    text = "\n".join(lines) + "\n"
    print(text)
    output.with_suffix(".md").write_text(text)
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


def main(
    script: str,
    description: str | None,
    families: Sequence[str],
    every: Callable[[], Sequence[str]],
    run: Callable[[str, list[str], bool, bool], dict[str, Any]],
    output: Path,
) -> None:
    """Measure the models that the command line asks for, each in a process of ``script``, and print a table.

    Args:
        script: The path of the benchmark.
        description: Its documentation.
        families: The models without options.
        every: The models of ``--all``.
        run: Measures one model: its name, the modes, whether with stock and whether with recovery.
        output: The folder of results.
    """
    options = parse_arguments(description, output)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.one:
        result = run(options.one, options.modes, options.stock, options.recover)
        (options.output / f"{options.one}.json").write_text(json.dumps(result))
        return
    names = options.models or list(every() if options.all else families)
    switches = [f"--{name}" for name in ("stock", "recover") if getattr(options, name)]
    flags = ["--modes", *options.modes, "--output", str(options.output), *switches]

    def one(name: str) -> None:
        path = options.output / f"{name}.json"
        if path.exists() and not options.fresh:
            return
        done = subprocess.run([sys.executable, script, "--one", name, *flags], capture_output=True, text=True)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or ["?"])[-1]
            path.write_text(json.dumps({"model": name, "modes": {}, "error": f"exit {done.returncode}: {error[:200]}"}))

    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in tqdm(as_completed([pool.submit(one, name) for name in names]), total=len(names), desc="models"):
            pass
    report([json.loads((options.output / f"{name}.json").read_text()) for name in names], options.output)
