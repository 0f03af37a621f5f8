import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from limbeck.data import tables
from limbeck.errors import UserError


def write(path, lines) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def small(path, rows: int = 20) -> str:
    lines = ["height,colour,kind"]
    lines += [f"{n},{('red', 'blue')[n % 3 == 0]},{('good', 'bad')[n % 2]}" for n in range(rows)]
    return write(path, lines)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "classes"),
    [
        ("iris", 150, 4, ("setosa", "versicolor", "virginica")),
        ("wine", 178, 13, ("class_0", "class_1", "class_2")),
        ("breast-cancer", 569, 30, ("malignant", "benign")),
        ("digits", 1797, 64, tuple("0123456789")),
    ],
)
def test_the_embedded_tables_are_whole(name, rows, columns, classes):
    data = tables.load(name)
    assert sum(map(len, (data.train, data.validation, data.test))) == rows
    assert data.train.cells.shape == (rows, columns)
    assert data.classes == classes
    assert tables.kind_of(name) == name


def test_splits_are_the_same_every_time_and_share_no_row(tmp_path):
    path = small(tmp_path / "t.csv", 100)
    one, other = tables.load(path), tables.load(f"csv:{path}")
    assert one.fingerprint() == other.fingerprint()
    rows = torch.cat([s.rows for s in (one.train, one.validation, one.test)])
    assert sorted(rows.tolist()) == list(range(100))
    assert (len(one.test), len(one.validation)) == (20, 8)


def test_statistics_and_categories_are_those_of_the_training_rows_alone(tmp_path):
    write(tmp_path / "train.csv", ["x,c,y", "1,a,u", "3,b,v", "1,a,u", "3,a,v"])
    write(tmp_path / "test.csv", ["x,c,y", "1000,z,u", "-7,a,v"])
    data = tables.load(str(tmp_path), validation=0)
    number, category = data.input.columns
    assert (number.mean, number.std) == (2.0, 1.0)
    assert category.categories == ("a", "b")
    fed = data.input(data.test.cells[data.test.rows])
    assert fed.tolist() == [[998.0, 0.0, 0.0], [-9.0, 1.0, 0.0]]


def test_the_class_is_the_last_column_or_the_one_that_is_named(tmp_path):
    path = small(tmp_path / "t.csv")
    assert tables.load(path).classes == ("bad", "good")
    named = tables.load(path, label="colour")
    assert named.classes == ("blue", "red")
    assert [c.name for c in named.input.columns] == ["height", "kind"]
    assert [c.name for c in tables.load(path, drop=["colour"]).input.columns] == ["height"]


def test_numbers_may_stand_for_categories_and_for_classes(tmp_path):
    lines = ["code,y"] + [f"{n % 3},{10 * (n % 2)}" for n in range(40)]
    path = write(tmp_path / "t.csv", lines)
    assert tables.load(path).input.columns[0].categories == ()
    assert tables.load(path, categorical=["code"]).input.columns[0].categories == ("0", "1", "2")
    assert tables.load(path).classes == ("0", "10")


def test_missing_numbers_are_fed_as_the_mean_and_a_constant_column_as_zero(tmp_path):
    lines = ["a,b,y"] + [f"{'?' if n % 4 == 0 else n},5,{n % 2}" for n in range(40)]
    data = tables.load(write(tmp_path / "t.csv", lines))
    fed = data.input(data.train.cells[data.train.rows])
    assert fed.isfinite().all()
    assert (fed[data.train.rows % 4 == 0, 0] == 0).all()
    assert (fed[:, 1] == 0).all()


def test_parquet_is_read_as_csv_is(tmp_path):
    path = small(tmp_path / "t.csv", 30)
    table = pa.table(
        {
            "height": list(range(30)),
            "colour": [("red", "blue")[n % 3 == 0] for n in range(30)],
            "kind": [("good", "bad")[n % 2] for n in range(30)],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    one, other = tables.load(path), tables.load(f"parquet:{tmp_path / 't.parquet'}")
    assert one.input == other.input
    assert one.fingerprint() == other.fingerprint()


def plenty(line: str, header: str = "x,y") -> list[str]:
    return [header, *(f"{n},{n % 2}" for n in range(10)), line]


@pytest.mark.parametrize(
    ("lines", "given", "sentence"),
    [
        (plenty("1,1"), {"label": "z"}, "has no column 'z'"),
        (plenty("1,1"), {"drop": ["q"]}, "has no column 'q'"),
        (plenty("1,1"), {"drop": ["y"]}, "'y' is the column of classes and no input"),
        (plenty("1,1"), {"drop": ["x"]}, "no column beside the classes"),
        (plenty("1"), {}, "cannot be read as a table: .*Expected 2 columns, got 1"),
        (plenty("1,"), {}, "row 11 has no class in the column 'y'"),
        (plenty("1,0.5"), {}, "the column 'y' holds fractions"),
        (plenty("inf,1"), {}, "row 11 of the column 'x' is infinite"),
        (plenty("1,1", "3,4"), {}, "has no line of column names"),
        (plenty("1,1", "x,x"), {}, "has two columns named 'x'"),
        (["x,y", "1,1", "2,1", "3,1"], {}, "rows of one class only"),
        (["x,y", *(f",{n % 2}" for n in range(9))], {}, "the column 'x' holds nothing in training"),
        (["x,y", "1,2"], {}, "holds 1 rows"),
        (["x", "1", "2"], {}, "1 columns"),
        ([], {}, "cannot be read as a table: .*mpty"),
        (
            ["x,y", *(f"k{n},{n % 2}" for n in range(3000))],
            {},
            "the column 'x' holds 2,160 different values in training",
        ),
        (["x,y", *(f"{n % 2},k{n}" for n in range(3000))], {}, "3,000 different values, too many"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_sentence(tmp_path, lines, given, sentence):
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=sentence) as caught:
        tables.load(str(path), **given)
    assert "\n" not in str(caught.value)


def test_sources_that_are_no_tables_are_one_sentence(tmp_path):
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    two = tmp_path / "two"
    two.mkdir()
    small(two / "a.csv")
    small(two / "b.csv")
    for source, sentence in (
        ("irsi", "there is no table 'irsi'; did you mean iris"),
        ("csv:nowhere.csv", "the table 'nowhere.csv' does not exist"),
        (str(tmp_path / "no"), "does not exist"),
        (str(tmp_path / "t.txt"), "is no table: a name that ends in .csv or .parquet"),
        (str(tmp_path / "empty"), "has no train.csv or train.parquet; of tables it holds none"),
        (str(two), "it holds a.csv, b.csv: name one file"),
        (str(tmp_path / "bad.parquet"), "cannot be read as a table"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            tables.load(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="iris has columns of its own"):
        tables.load("iris", label="class")


def test_files_of_a_folder_must_have_the_same_columns_and_all_classes(tmp_path):
    write(tmp_path / "train.csv", ["x,y", "1,a", "2,b"])
    write(tmp_path / "test.csv", ["z,y", "1,a", "2,b"])
    with pytest.raises(UserError, match="the columns of test and train differ; 'x' is in one"):
        tables.load(str(tmp_path))
    write(tmp_path / "test.csv", ["x,y", "1,a", "2,c"])
    with pytest.raises(UserError, match="the class 'c' does not occur in training"):
        tables.load(str(tmp_path), validation=0)


def test_the_real_tables_are_read(real_data):
    folder = real_data("tabular")
    magic = tables.load(str(folder / "magic04.csv"))
    assert magic.classes == ("g", "h")
    assert len(magic.input.columns) == 10
    every = [s.labels for s in (magic.train, magic.validation, magic.test)]
    assert torch.bincount(torch.cat(every)).tolist() == [12_332, 6_688]
    letter = tables.load(str(folder / "letter.csv"), label="lettr")
    assert len(letter.classes) == 26
    assert len(letter.input.columns) == 16
    assert tables.kind_of(f"csv:{folder / 'magic04.csv'}") == "magic04"
