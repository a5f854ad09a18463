import json
import sys

import pytest
from PIL import Image

from vertebra.data import read
from vertebra.data.tables import load_table
from vertebra.errors import DataError, UsageError


@pytest.fixture
def root(tmp_path):
    for shade, name in enumerate(("a.png", "b.png", "sub/c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (12, 8), shade).save(tmp_path / name)
    return tmp_path


def write(file, *lines, encoding="utf-8"):
    file.write_text("\n".join(lines) + "\n", encoding=encoding)
    return file


def test_a_csv_with_labels_and_splits(root):
    write(
        root / "metadata.csv", "file_name,label,Split", "b.png,dog,train", "a.png,cat,training", "sub/c.png,dog,VALID"
    )
    dataset = read(root)
    assert (dataset.layout, dataset.label, dataset.classes) == ("table", "single", ("cat", "dog"))
    assert dataset.splits["train"].names.tolist() == ["b.png", "a.png"]
    assert dataset.splits["train"].targets.tolist() == [1, 0]
    assert dataset.splits["val"].image(0).getpixel((0, 0)) == 2


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_quotes_and_byte_order_marks(root, delimiter):
    lines = [f"Image{delimiter}Class", f'"a.png"{delimiter}"tench, a fish"', f"b.png{delimiter}eel", ""]
    dataset = read(write(root / "any.csv", *lines, encoding="utf-8-sig"))
    assert dataset.classes == ("eel", "tench, a fish")


def test_json_lines(root):
    records = [{"file_name": "a.png", "label": 10}, {"file_name": "b.png", "label": 9}]
    write(root / "metadata.jsonl", *map(json.dumps, records))
    dataset = read(root)
    assert dataset.classes == ("9", "10")
    assert dataset.splits["all"].targets.tolist() == [1, 0]


def test_parquet(root):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"path": ["a.png", "b.png", "sub/c.png"], "tags": [["x"], [], ["x", "y"]]}
    parquet.write_table(pyarrow.table(columns), root / "labels.parquet")
    dataset = read(root)
    assert (dataset.label, dataset.classes) == ("multi", ("x", "y"))
    assert dataset.splits["all"].targets.tolist() == [[1, 0], [0, 0], [1, 1]]


def test_parquet_without_pyarrow_says_what_to_install(root, monkeypatch):
    (root / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"pip install 'vertebra\[tables\]'"):
        read(root / "t.parquet")


@pytest.mark.parametrize(
    ("column", "cells", "targets"),
    [
        ("label", ["x|y", "y", ""], [[1, 1], [0, 1], [0, 0]]),
        ("label", ["x; y", "y", "x"], [[1, 1], [0, 1], [1, 0]]),
        ("labels", ['"x,y"', "y", "x"], [[1, 1], [0, 1], [1, 0]]),
    ],
)
def test_many_labels_in_a_cell(root, column, cells, targets):
    files = ("a.png", "b.png", "sub/c.png")
    lines = [f"{file},{cell}" for file, cell in zip(files, cells, strict=True)]
    dataset = read(write(root / "t.csv", f"file,{column}", *lines))
    assert (dataset.label, dataset.classes) == ("multi", ("x", "y"))
    assert dataset.splits["all"].targets.tolist() == targets


def test_a_comma_in_a_class_name_is_no_separator(root):
    dataset = read(write(root / "t.csv", "file,label", 'a.png,"tench, Tinca tinca"', "b.png,eel"))
    assert (dataset.label, dataset.classes) == ("single", ("eel", "tench, Tinca tinca"))


def test_faulty_rows_are_named_by_their_lines_or_left_out(root):
    table = write(root / "t.csv", "file,label", "a.png,cat", "gone.png,cat", "a.png,cat", "", "b.png,", "sub/c.png,dog")
    with pytest.raises(DataError) as error:
        read(table)
    message = str(error.value)
    assert (
        "t.csv: line 3: no such file: gone.png; line 4: a.png is listed again (line 2); line 6: b.png has no label"
        in message
    )
    assert "on_error='skip'" in message
    dataset = read(table, on_error="skip")
    assert dataset.splits["all"].names.tolist() == ["a.png", "sub/c.png"]
    assert "3 left out: line 3: no such file: gone.png" in dataset.notes[0]


def test_an_unknown_split_is_named(root):
    with pytest.raises(DataError, match=r"line 2: 'fold1' is no split; splits are train, val and test"):
        read(write(root / "t.csv", "file,label,split", "a.png,cat,fold1"))


@pytest.mark.parametrize("cell", ["../a.png", "/etc/passwd", "sub/../../a.png", "..\\a.png"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_paths_cannot_leave_the_root(root, cell, on_error):
    table = write(root / "t.csv", "file,label", "a.png,cat", f"{cell},dog")
    with pytest.raises(DataError, match=r"t\.csv, line 3: .* lies outside"):
        read(table, on_error=on_error)


def test_absolute_paths_and_backslashes_inside_the_root(root):
    table = write(root / "t.csv", "file,label", f"{root / 'a.png'},cat", "sub\\c.png,dog")
    assert read(table).splits["all"].names.tolist() == ["a.png", "sub/c.png"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "a.png"], r"line 2: 1 cells where the header has 2"),
        (["file,label,label", "a.png,b,c"], "line 1: more than one column is called 'label'"),
        (["file,label", '"a.png'], "line 2: unexpected end of data"),
        (["file,label"], "has no rows"),
        (["x,y", "a.png,cat"], "no column surely names the files: none of x, y does"),
        (["file,image,label", "gone.png,none.png,cat"], "which of file, image names the files"),
        (["file,species", "a.png,cat"], "no column is called label; say labels='COLUMN', one of species"),
        (["file,label,category", "a.png,x,1", "b.png,x,2"], "which of label, category is the label"),
    ],
)
def test_broken_or_unclear_tables(root, lines, message):
    with pytest.raises(DataError, match=message):
        read(write(root / "t.csv", *lines))


def test_broken_json_lines(root):
    with pytest.raises(DataError, match=r"t.jsonl, line 2: no JSON"):
        read(write(root / "t.jsonl", '{"file": "a.png", "label": 1}', "{file"))
    with pytest.raises(DataError, match=r"line 1: list where an object"):
        read(write(root / "t.jsonl", "[1]"))


def test_a_table_that_is_not_utf8(root):
    with pytest.raises(DataError, match=r"is not UTF-8 \(byte \d+\)"):
        read(write(root / "t.csv", "file,label", "a.png,größe", encoding="latin-1"))


def test_columns_can_be_said(root):
    table = write(root / "t.csv", "where,species", "a.png,cat", "b.png,dog")
    assert read(table, images="where", labels="species").classes == ("cat", "dog")
    with pytest.raises(UsageError, match=r"has no column 'specie'; did you mean species"):
        read(table, images="where", labels="specie")


def test_of_a_number_and_a_name_that_agree_the_name_is_taken(root):
    table = write(root / "t.csv", "file,label,class_name", "a.png,0,dog", "b.png,1,cat", "sub/c.png,0,dog")
    assert read(table).classes == ("cat", "dog")


def test_the_column_whose_files_exist_is_taken(root):
    assert len(read(write(root / "t.csv", "image,path,label", "17,a.png,cat", "18,b.png,dog")).splits["all"]) == 2


def test_captions_are_no_labels(root):
    dataset = read(write(root / "t.csv", "file,caption", "a.png,a cat", "b.png,a dog"))
    assert (dataset.label, dataset.notes) == ("none", ("t.csv has no column with labels",))


def test_one_table_a_split(root):
    write(root / "train.csv", "file,label", "a.png,cat", "b.png,dog")
    write(root / "test.csv", "file,label", "sub/c.png,dog")
    assert {name: len(split) for name, split in read(root).splits.items()} == {"train": 2, "test": 1}


def test_a_split_may_have_one_label_each_and_another_many_or_none(root):
    write(root / "train.csv", "file,label", "a.png,cat|dog", "b.png,dog")
    write(root / "val.csv", "file,label", "sub/c.png,dog")
    write(root / "test.csv", "file,label", "sub/c.png,")
    dataset = read(root)
    assert (dataset.label, list(dataset.splits)) == ("multi", ["train", "val"])
    assert dataset.splits["val"].targets.tolist() == [[0, 1]]
    assert "test has no labels and is left out (images: 1)" in dataset.notes


def test_a_table_in_each_folder_of_a_split(tmp_path):
    for split, label in (("train", "cat"), ("test", "cat")):
        (tmp_path / split).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / split / "a.png")
        write(tmp_path / split / "metadata.csv", "file_name,label", f"a.png,{label}")
    dataset = read(tmp_path)
    assert dataset.layout == "table"
    assert dataset.splits["test"].names.tolist() == ["test/a.png"]


def test_two_tables_are_a_question_and_a_list_of_classes_is_none(root):
    write(root / "labels.csv", "number,word", "0,cat")
    write(root / "metadata.csv", "file,label", "a.png,cat")
    assert read(root).layout == "table"
    write(root / "annotations.csv", "file,label", "a.png,cat")
    with pytest.raises(DataError, match=r"both list images; give one of them by its path"):
        read(root)


def test_line_numbers_count_lines_inside_quotes(root):
    table = load_table(write(root / "t.csv", "file,label", '"a.png","two', 'lines"', "b.png,x"))
    assert list(table.lines) == [2, 4]
