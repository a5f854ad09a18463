import io
import json
import pickle

import pytest
from PIL import Image

from vertebra.data import read
from vertebra.errors import DataError, UsageError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["dog", "cat", "eel"], "_type": "ClassLabel"}}


def png(shade, size=(12, 8)):
    buffer = io.BytesIO()
    Image.new("L", size, shade).save(buffer, "PNG")
    return buffer.getvalue()


def table(labels, features=FEATURES, first=0, name="label"):
    images = [{"bytes": png(first + shade), "path": None} for shade in range(len(labels))]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    return pyarrow.table({"image": pyarrow.array(images, kind), name: labels}).replace_schema_metadata(metadata)


def save_to_disk(folder, *shards, **state):
    folder.mkdir(parents=True)
    files = []
    for number, shard in enumerate(shards):
        files.append({"filename": f"data-{number:05d}-of-{len(shards):05d}.arrow"})
        with (
            pyarrow.OSFile(str(folder / files[-1]["filename"]), "wb") as sink,
            pyarrow.ipc.new_stream(sink, shard.schema) as writer,
        ):
            writer.write_table(shard, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": folder.name, **state}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))


def shades(split):
    return [split.image(index).getpixel((0, 0)) for index in range(len(split))]


def test_a_saved_dataset_with_splits(tmp_path):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    save_to_disk(tmp_path / "train", table([0, 1, 1]), table([0, 0], first=3))
    save_to_disk(tmp_path / "validation", table([1]))
    (tmp_path / "train/cache-1234.arrow").write_bytes(b"a stale cache")
    dataset = read(tmp_path)
    assert (dataset.layout, dataset.label, dataset.classes) == ("huggingface", "single", ("dog", "cat", "eel"))
    train = dataset.splits["train"]
    assert train.targets.tolist() == [0, 1, 1, 0, 0]
    assert shades(train) == [0, 1, 2, 3, 4]
    assert train.store.size_bytes(4) == len(png(4))
    assert train.names.tolist()[:2] == ["train/000000", "train/000001"]
    assert len(dataset.splits["val"]) == 1
    assert shades(pickle.loads(pickle.dumps(train)).select([3, 0])) == [3, 0]
    assert dataset.fingerprint == read(tmp_path).fingerprint


def test_a_single_saved_split_takes_names_from_beside_the_shards(tmp_path):
    save_to_disk(tmp_path / "test", table([2, 0], features=None))
    dataset = read(tmp_path / "test")
    assert dataset.classes == ("dog", "cat", "eel")
    assert dataset.splits["test"].targets.tolist() == [2, 0]


def test_what_is_missing_from_a_saved_dataset_is_named(tmp_path):
    save_to_disk(tmp_path / "train", table([0, 1]))
    (tmp_path / "train/data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001.arrow is missing, though .*state.json lists it"):
        read(tmp_path / "train")
    save_to_disk(tmp_path / "test", table([0, 1]), _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match=r"call flatten_indices\(\)"):
        read(tmp_path / "test")
    (tmp_path / "test/state.json").write_text("{")
    with pytest.raises(DataError, match=r"state.json is no JSON"):
        read(tmp_path / "test")


def test_truncated_shards_are_named(tmp_path):
    save_to_disk(tmp_path / "train", table([0, 1, 0, 1, 0]))
    shard = tmp_path / "train/data-00000-of-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(DataError, match=r"data-00000-of-00001.arrow is no Arrow file that can be read"):
        read(tmp_path / "train")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"t.parquet is no Parquet file that can be read"):
        read(tmp_path / "t.parquet")


def test_parquet_shards_of_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(2):
        shard = table([0, 1, 2], first=3 * number)
        parquet.write_table(shard, tmp_path / f"data/train-{number:05d}-of-00002.parquet", row_group_size=2)
    parquet.write_table(table([2]), tmp_path / "data/test-00000-of-00001.parquet")
    dataset = read(tmp_path)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 6, "test": 1}
    assert shades(dataset.splits["train"]) == [0, 1, 2, 3, 4, 5]
    assert dataset.splits["train"].store.size_bytes(0) > 0
    assert shades(read(tmp_path / "data/test-00000-of-00001.parquet").splits["all"]) == [0]


def test_many_labels(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"feature": FEATURES["label"], "_type": "List"}}
    parquet.write_table(table([[0, 2], [], [1]], features), tmp_path / "train.parquet")
    dataset = read(tmp_path)
    assert dataset.label == "multi"
    assert dataset.splits["train"].targets.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_labels_that_are_missing(tmp_path):
    parquet.write_table(table([0, 1]), tmp_path / "train.parquet")
    parquet.write_table(table([-1, -1]), tmp_path / "test.parquet")
    dataset = read(tmp_path)
    assert list(dataset.splits) == ["train"]
    assert dataset.notes == ("test has no labels and is left out (images: 2)",)
    parquet.write_table(table([0, None, 1]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train: row 1 has no label"):
        read(tmp_path)
    kept = read(tmp_path, on_error="skip").splits["train"]
    assert kept.names.tolist() == ["train/000000", "train/000002"]
    assert shades(kept) == [0, 2]
    parquet.write_table(table([0, 7]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"the column label holds 7, and the dataset names 3 classes"):
        read(tmp_path)


def test_columns_that_cannot_be_told(tmp_path):
    features = {"image": {"_type": "Image"}, "fine": FEATURES["label"], "coarse": FEATURES["label"]}
    columns = table([0, 1], features, name="fine")
    parquet.write_table(columns.append_column("coarse", [[2, 2]]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"fine, coarse could be the labels; say labels='COLUMN'"):
        read(tmp_path)
    assert read(tmp_path, labels="coarse").splits["train"].targets.tolist() == [2, 2]
    with pytest.raises(UsageError, match=r"no column 'corse'; did you mean coarse"):
        read(tmp_path, labels="corse")


def test_plain_columns_without_features(tmp_path):
    parquet.write_table(pyarrow.table({"img": [png(3), png(4)], "class": ["b", "a"]}), tmp_path / "x.parquet")
    dataset = read(tmp_path / "x.parquet")
    assert (dataset.classes, dataset.splits["all"].targets.tolist()) == (("a", "b"), [1, 0])
    assert shades(dataset.splits["all"]) == [3, 4]


def test_images_given_by_path_cannot_leave_the_root(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(9))
    (tmp_path / "out.png").write_bytes(png(9))
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    images = [{"bytes": None, "path": path} for path in ("a.png", "../out.png", None)]
    columns = {"image": pyarrow.array(images, kind), "label": ["x", "y", "y"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "in/t.parquet")
    split = read(tmp_path / "in/t.parquet").splits["all"]
    assert split.image(0).getpixel((0, 0)) == 9
    with pytest.raises(DataError, match=r"t\.parquet, row 1: \.\./out\.png lies outside"):
        split.image(1)
    with pytest.raises(DataError, match=r"row 2: no image; the row has neither bytes nor a path"):
        split.image(2)


def test_a_broken_image_is_named_by_shard_and_row(tmp_path):
    broken = pyarrow.table({"image": [png(1), b"\xff\xd8\xff\xe0"], "label": ["a", "b"]})
    parquet.write_table(broken, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet, row 1: .*damaged"):
        read(tmp_path / "t.parquet").splits["all"].image(1)


def test_configurations_side_by_side_are_a_question(tmp_path):
    for name in ("big", "small"):
        (tmp_path / name).mkdir()
        parquet.write_table(table([0, 1]), tmp_path / name / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"shards in 2 folders; give one, as .*big"):
        read(tmp_path)
    assert len(read(tmp_path / "small").splits["train"]) == 2
