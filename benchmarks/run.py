"""Measures what Limbeck promises about speed, as ratios of things that run in turn.

See README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import Options, machine
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
MODULES = {
    "step": {1, 2},
    "epoch": {3},
    "growth": {4},
    "vocabulary": {5},
    "start": {6},
    "lean": {7},
}
QUICK = {1, 2, 3, 6}
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def main() -> None:
    """Measure, print a table and write the results."""
    arguments = _arguments()
    every = set().union(*MODULES.values())
    wanted = frozenset(arguments.only or (QUICK if arguments.quick else every))
    options = Options(
        wanted, arguments.quick, arguments.data, arguments.repdistiller, arguments.images
    )
    here, results = machine(), []
    for name, groups in MODULES.items():
        if groups & wanted:
            print(f"{name}", file=sys.stderr)
            for figure in importlib.import_module(name).measure(options):
                results.append(figure.as_json(options.command(figure.group), here))
    Console(width=None if sys.stdout.isatty() else 160).print(_table(results))
    out = arguments.out or (None if arguments.quick else HERE / "results.json")
    if out is not None:
        before = json.loads(out.read_text()) if out.exists() else []
        results += [result for result in before if result["group"] not in wanted]
        results.sort(key=lambda result: result["group"])
        out.write_text(json.dumps(results, indent=2) + "\n")
        if out == HERE / "results.json":
            _into_readme(results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="figures 1, 2, 3 and 6, fewer rounds")
    parser.add_argument("--only", nargs="+", type=int, choices=range(1, 8), help="these figures")
    parser.add_argument("--data", metavar="cifar100:PATH", help="the images of figure 3")
    parser.add_argument("--images", type=int, help="how many of them")
    parser.add_argument("--repdistiller", type=Path, metavar="PATH", help="a checkout of it")
    parser.add_argument("--out", type=Path, help="results.json beside this file, if not --quick")
    return parser.parse_args()


def _rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Group, name, figure, spread, target, met, what else there is to say."""
    rows = []
    for result in results:
        ratio, spread, unit = result["ratio"], result["spread"], result["unit"]
        seconds = ", ".join(f"{name} {value:.4g} s" for name, value in result["seconds"].items())
        rows.append(
            (
                str(result["group"]),
                result["name"],
                "" if ratio is None else f"{ratio:.3f} {unit}".strip(),
                f"{spread[0]:.3f} to {spread[1]:.3f}" if spread else "",
                result["target"],
                {True: "yes", False: "no", None: ""}[result["met"]],
                "; ".join(text for text in (seconds, result["note"]) if text),
            )
        )
    return rows


HEADER = ("", "figure", "ratio", "lowest to highest round", "target", "met", "")


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(*HEADER)
    for row in _rows(results):
        table.add_row(*row)
    return table


def _into_readme(results: Sequence[dict[str, Any]]) -> None:
    """Write the figures as a table between two marks, each machine before its figures."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines: list[str] = []
    machines: list[dict[str, Any]] = []
    for result in results:
        if result["machine"] not in machines:
            machines.append(result["machine"])
    for place in machines:
        facts = ", ".join(f"{key} {value}" for key, value in place.items() if value is not None)
        lines += ["", facts, "", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
        own = [result for result in results if result["machine"] == place]
        lines += [f"| {' | '.join(row)} |" for row in _rows(own)]
    table = "\n".join([BEGIN, *lines, "", END])
    (HERE / "README.md").write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
