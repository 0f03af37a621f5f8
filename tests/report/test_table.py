"""The table of results."""

from io import StringIO

from rich.console import Console

from limbeck.report.table import as_markdown, as_rich, rows

RESULT = {
    "metric": {"name": "accuracy", "higher_is_better": True},
    "teacher": 0.98,
    "baseline": 0.93,
    "student": 0.95,
    "agreement": {"baseline": 0.9, "student": 0.951},
    "parameters": {"teacher": 1_250_000, "baseline": 20_410, "student": 950},
    "bytes": {"teacher": 5_000_000, "baseline": 81_640, "student": 81_640},
    "latency_ms": {"teacher": {"p50": 4.214}, "student": {"p50": 1.1}},
}


def test_each_network_has_a_row_and_each_known_fact_a_column():
    headings, lines = rows(RESULT)
    assert headings == ["", "accuracy", "agreement", "parameters", "size", "latency"]
    assert lines == [
        ["teacher", "98.00 %", "", "1.25 M", "5.00 MB", "4.21 ms"],
        ["plain student", "93.00 %", "90.00 %", "20.41 k", "0.082 MB", ""],
        ["distilled student", "95.00 %", "95.10 %", "950", "0.082 MB", "1.10 ms"],
    ]


def test_several_seeds_show_their_mean_and_interval():
    # 0.90 and 0.92: mean 0.91, standard error 0.01, and t with one degree of freedom is 12.706.
    seeds = [{"seed": 0, "student": 0.90}, {"seed": 1, "student": 0.92}]
    _, lines = rows({**RESULT, "seeds": seeds})
    assert lines[2][1] == "91.00 % ± 12.71 %"


def test_a_fact_that_is_null_leaves_its_cell_empty():
    facts = {"latency_ms": {"teacher": None, "student": {}}, "parameters": {"student": None}}
    seeds = [{"seed": 0, "baseline": None, "student": 0.95}]
    headings, lines = rows({**RESULT, **facts, "agreement": {"baseline": None}, "seeds": seeds})
    assert headings == ["", "accuracy", "size"]
    assert [line[1] for line in lines] == ["98.00 %", "93.00 %", "95.00 %"]


def test_a_terminal_gets_the_same_cells():
    console = Console(width=120, record=True, file=StringIO())
    console.print(as_rich(RESULT))
    text = console.export_text()
    assert all(cell in text for line in rows(RESULT)[1] for cell in line)


def test_a_model_trained_alone_is_a_model():
    alone = {"metric": {"name": "accuracy"}, "teacher": None, "student": 0.5, "agreement": None}
    assert rows(alone) == (["", "accuracy"], [["model", "50.00 %"]])


def test_further_networks_have_rows_of_their_own_behind_the_usual_ones():
    further = {
        "further": {"fused": 0.97, "late": 0.5},
        "names": {"fused": "fused classifier"},
        "seeds": [{"seed": 0, "student": 0.95, "fused": 0.96}, {"seed": 1, "fused": 0.98}],
        "parameters": {"student": 950, "fused": 2_000},
    }
    _, lines = rows({**RESULT, **further})
    assert [line[0] for line in lines[3:]] == ["fused classifier", "late"]
    assert lines[3][1] == "97.00 % ± 12.71 %"
    assert lines[4][1] == "50.00 %"
    assert (lines[3][3], lines[4][3]) == ("2.00 k", "")


def test_other_metrics_than_accuracy_are_plain_numbers():
    _, lines = rows({"metric": {"name": "loss"}, "student": 1.23456})
    assert lines == [["model", "1.2346"]]


def test_markdown_has_a_ruler_under_the_headings():
    text = as_markdown({"metric": {"name": "accuracy"}, "student": 0.5})
    assert text.splitlines() == ["|  | accuracy |", "| --- | ---: |", "| model | 50.00 % |"]
