"""Writes what the documentation says of the systems from the systems themselves."""

from __future__ import annotations

from pathlib import Path

from limbeck.catalogue import System, systems

ROOT = Path(__file__).parent.parent
HEAD = """# What was measured

Each figure with the command that gave it. Test accuracy, mean and 95 % interval over the seeds; the
verdict is a paired t test over them.
"""
START, END = "<!-- catalogue -->\n", "<!-- end of catalogue -->"


def catalogue() -> str:
    """The table of the README."""
    lines = ["| no. | system | paper | knowledge | scheme | task |", "|---|---|---|---|---|---|"]
    for found in systems().values():
        paper = found.paper
        tags = (", ".join(t) for t in (paper.knowledge, paper.scheme, paper.task))
        title = f"[{paper.title}]({paper.link}), {paper.year}"
        lines.append(
            f"| {paper.number:02d} | `{found.slug}` | {title} | " + " | ".join(tags) + " |"
        )
    return "\n".join(lines) + "\n"


def readme() -> str:
    """The README with its table brought up to date."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(START)
    return before + START + catalogue() + END + rest.split(END)[1]


def results() -> str:
    """The page of measured results."""
    return HEAD + "".join(_measured(found) for found in systems().values() if found.results)


def _measured(found: System) -> str:
    lines = [f"\n## {found.paper.number:02d} {found.slug}\n"]
    for result in found.results:
        effect = result["effect"]
        lines.append(f"### {result['data']}\n")
        lines.append(f"**{effect[:1].upper()}{effect[1:]}.** {result['figures'].strip()}\n")
        lines.append(f"```sh\n{result['command'].strip()}\n```\n")
        lines.append(f"{result['machine']}, {result['date']}.\n")
    if found.notes:
        lines.append(found.notes.strip() + "\n")
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(results(), encoding="utf-8")
