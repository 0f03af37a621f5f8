"""The parts of the report that only control has: an episode of each policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from limbeck.errors import UserError
from limbeck.report.figures import (
    COLOURS,
    OTHER,
    Figure,
    Gallery,
    Panel,
    Picture,
    Section,
    embedded,
    grid,
    panel,
    plain,
)
from limbeck.report.table import names, roles
from limbeck.training.checkpoint import read_state
from limbeck.training.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPISODES = "episode.state"
"""The file of a run folder that holds an episode of each network."""

_MOST_PANELS = 8
_DASHES = ("-", "--", ":", "-.")


def sections(run: Run) -> list[Section]:
    """What the policies do from the same start: what is seen, done and earned, and frames."""
    path, result = run.path / EPISODES, run.result()
    if not path.exists():
        return []
    try:
        lived = read_state(path)
    except UserError:
        return []
    called = names(result)
    there = [role for role in roles(result) if role in lived]
    if not there:
        return []
    earned = {role: lived[role]["earned"].cumsum(0).tolist() for role in there}
    courses = {"return so far": earned}
    for kind, title in (("done", "action"), ("seen", "observation")):
        number = lived[there[0]][kind].shape[1]
        for i in range(number):
            courses[title if number == 1 else f"{title} {i + 1}"] = {
                role: lived[role][kind][:, i].tolist() for role in there
            }
    panels = [
        _course(f"episode{number}", title, lines, called)
        for number, (title, lines) in enumerate(list(courses.items())[:_MOST_PANELS])
    ]
    caption = (
        "The first test episode as each network lives it: the same start, then what each does of "
        "its own."
    )
    if len(courses) > _MOST_PANELS:
        caption += f" The first {_MOST_PANELS} of {len(courses)} courses."
    role = "student" if "student" in there else there[0]
    frames = lived[role]["frames"]
    pictures = [
        Picture(
            embedded(frame.numpy()),
            f"frame {i + 1} of {called[role]}",
            [("", f"{i + 1}")],
            small=False,
        )
        for i, frame in enumerate(frames)
    ]
    films = [Gallery("", pictures, f"{called[role]}, from the first step to the last.", large=True)]
    return [
        Section("episode", "An episode", [Figure(panels, caption)], films if pictures else []),
    ]


def _course(
    anchor: str, title: str, lines: Mapping[str, Sequence[float]], called: Mapping[str, str]
) -> Panel:
    def draw(axes: Axes) -> None:
        drawn: dict[str, int] = {}
        for role, values in lines.items():
            colour = COLOURS.get(role, OTHER)
            dashes = _DASHES[drawn.get(colour, 0) % len(_DASHES)]
            drawn[colour] = drawn.get(colour, 0) + 1
            axes.plot(values, color=colour, linestyle=dashes, label=plain(called[role], 40))
        axes.set_title(plain(title, 40))
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        grid(axes)
        if title == "return so far" and len(lines) > 1:
            axes.legend()

    ends = ", ".join(f"{called[role]} ends at {values[-1]:.4g}" for role, values in lines.items())
    return panel(anchor, f"{title} over the steps of an episode: {ends}", draw)
