"""Every system runs end to end on the embedded data, from the command line."""

from __future__ import annotations

import json

import pytest

from limbeck.catalogue import systems


@pytest.mark.parametrize("slug", list(systems()))
def test_a_system_runs_on_the_embedded_data(slug, tmp_path, command):
    run = tmp_path / "run"
    status, said, wrong = command("run", slug, "--preset", "smoke", "--out", run)
    assert (status, wrong) == (0, "")
    assert "report.html" in said
    result = json.loads((run / "result.json").read_text())
    # Better than a guess among ten classes or two, where the task measures a share.
    # Two hundred steps of Pendulum cost between nothing and pi^2 + 0.1 8^2 + 0.001 2^2 each.
    low, high = {"BLEU": (0.5, 100), "return": (-3255, 0)}.get(result["metric"]["name"], (0.15, 1))
    assert low < result["student"] <= high
    assert result["baseline"] is not None
    assert (run / "student.safetensors").is_file()
    assert (run / "report.html").stat().st_size > 20_000
