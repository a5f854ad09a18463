import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.data.annotations import IGNORE
from vertebra.data.folders import list_folder
from vertebra.data.masks import MaskFiles, faults, find_masks, read_masks, write_masks
from vertebra.errors import DataError, UsageError

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
VOID = IGNORE


def unpacked(name, folder, only=""):
    if not (archive := shared / name).exists():
        pytest.skip(f"{archive} is not here")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder, [member for member in packed.namelist() if only in member])
    return folder


def save(file, pixels, palette=None):
    """A file of these pixels: (H, W) grey, with a palette where given, uint16 as 16 bit, (H, W, 3) as RGB."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    if palette is not None:
        image.putpalette(palette + [0] * (768 - len(palette)))  # whole, or Pillow would save fewer bits
    image.save(file)


def grid(*rows, dtype=np.uint8):
    return np.array(rows, dtype=dtype)


def pair(root, name, mask, image="images/{}.jpg", place="masks/{}.png", **more):
    """An image of the mask's size and the mask."""
    height, width = mask.shape[:2]
    save(root / image.format(name), np.full((height, width, 3), 99, np.uint8))
    save(root / place.format(name), mask, **more)


def read(root, **options):
    top, notes = list_folder(root)
    plan = find_masks(root, top)
    assert plan is not None
    return read_masks(str(root), root, plan, notes=notes, **options)


def semantic(dataset, index=0, split="all"):
    return dataset.splits[split].target(index)["semantic"]


def test_values_are_classes_and_what_an_image_shows_are_its_labels(tmp_path):
    pair(tmp_path, "a", grid([0, 3], [3, 255]))
    pair(tmp_path, "b", grid([7, 7], [7, 7]))
    dataset = read(tmp_path)
    assert (dataset.layout, dataset.label, dataset.classes) == ("masks", "multi", ("0", "3", "7"))
    assert dataset.splits["all"].targets.tolist() == [[1, 1, 0], [0, 0, 1]]
    found = semantic(dataset)
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 1], [1, VOID]]
    assert semantic(dataset, 1).tolist() == [[2, 2], [2, 2]]
    assert any("called by their pixel values" in note for note in dataset.notes)


def test_a_list_of_names_counts_from_zero_or_from_one(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    pair(tmp_path, "a", grid([0, 1], [1, 255]))
    assert semantic(read(tmp_path)).tolist() == [[0, 1], [1, VOID]]
    pair(tmp_path, "b", grid([0, 2], [1, 255]))  # now 2 names stand for 1 and 2
    dataset = read(tmp_path)
    assert semantic(dataset).tolist() == [[VOID, 0], [0, VOID]]
    assert semantic(dataset, 1).tolist() == [[VOID, 1], [0, VOID]]
    assert "values go from 1 to 2: 1 is sky, and 0 is ignored" in dataset.notes


def test_a_value_beyond_the_list_is_named_with_its_file(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    pair(tmp_path, "a", grid([0, 1]))
    pair(tmp_path, "b", grid([0, 9]))
    with pytest.raises(DataError, match=r"masks/b\.png holds the value 9, and .*classes\.txt lists 2 classes"):
        read(tmp_path)


def test_names_that_mean_nothing_are_no_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nvoid (index 1: ignore)\nroad\n")
    pair(tmp_path, "a", grid([0, 1, 2]))
    dataset = read(tmp_path)
    assert dataset.classes == ("sky", "road")
    assert semantic(dataset).tolist() == [[0, VOID, 1]]


def test_labelme_begins_its_names_with_minus_one(tmp_path):
    (tmp_path / "class_names.txt").write_text("__ignore__\n_background_\ncar\n")
    pair(tmp_path, "a", grid([0, 1, 255]))
    dataset = read(tmp_path)
    assert dataset.classes == ("_background_", "car")
    assert semantic(dataset).tolist() == [[0, 1, VOID]]


def test_stated_values_need_no_look_at_the_masks(tmp_path, monkeypatch):
    (tmp_path / "classes.csv").write_text("value,name\n7,road\n3,sky\n")
    pair(tmp_path, "a", grid([3, 7, 255]))
    pair(tmp_path, "b", grid([7, 7, 7]))
    pair(tmp_path, "c", grid([4, 7, 7]))
    decoded = []
    monkeypatch.setattr("vertebra.data.masks.look", lambda file: decoded.append(file))
    dataset = read(tmp_path)
    assert not decoded
    assert (dataset.label, dataset.classes) == ("multi", ("road", "sky"))
    monkeypatch.undo()
    assert semantic(dataset).tolist() == [[1, 0, VOID]]
    with pytest.raises(DataError, match=r"c\.png holds the value 4, which is no class \(2 classes: 3, 7\)"):
        semantic(dataset, 2)
    with pytest.raises(DataError, match=r"c\.png holds the value 4"):
        _ = dataset.splits["all"].targets
    part = dataset.splits["all"].select([1, 0])
    assert part.targets is not None
    assert part.targets.tolist() == [[1, 0], [1, 1]]
    assert part.select([1]).targets.tolist() == [[1, 1]]
    copy = pickle.loads(pickle.dumps(dataset.splits["all"].select([0])))
    assert copy.targets.tolist() == [[1, 1]]


def test_palettes_are_read_by_number(tmp_path):
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0]
    pair(tmp_path, "a", grid([0, 2], [1, 255]), palette=palette)
    pair(tmp_path, "b", grid([0, 1]), palette=palette)
    dataset = read(tmp_path)
    assert dataset.classes == ("0", "1", "2")
    assert semantic(dataset).tolist() == [[0, 2], [1, VOID]]


def test_palettes_that_differ_are_read_by_colour(tmp_path):
    pair(tmp_path, "a", grid([0, 1]), palette=[255, 0, 0, 0, 0, 255])
    pair(tmp_path, "b", grid([0, 1]), palette=[0, 0, 255, 255, 0, 0])
    dataset = read(tmp_path)
    assert dataset.classes == ("#0000ff", "#ff0000")
    assert semantic(dataset).tolist() == [[1, 0]]
    assert semantic(dataset, 1).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("class_dict.csv", "name,r,g,b\nsky,1,2,3\nvoid,0,0,0\nroad,9,8,7\n"),
        ("label_colors.txt", "1 2 3\tsky\n0 0 0\tvoid\n9 8 7\troad\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nsky:1,2,3::\nvoid:0,0,0::\nroad:9,8,7::\n"),
    ],
)
def test_colour_maps_with_a_list(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    pair(tmp_path, "a", grid([[1, 2, 3], [9, 8, 7]], [[0, 0, 0], [1, 2, 3]]))
    pair(tmp_path, "b", grid([[1, 2, 3], [1, 2, 4]]))
    dataset = read(tmp_path)
    assert dataset.classes == ("sky", "road")
    assert semantic(dataset).tolist() == [[0, 1], [VOID, 0]]
    with pytest.raises(DataError, match=r"b\.png holds the value #010204, which is no class"):
        semantic(dataset, 1)


def test_colours_without_a_list_are_found_and_more_than_a_map_has_are_refused(tmp_path):
    pair(tmp_path, "a", grid([[0, 0, 0], [9, 8, 7]]))
    assert read(tmp_path).classes == ("#000000", "#090807")
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(
        DataError, match=r"masks hold colours \(#000000, #090807\) and .*classes\.txt does not say whose"
    ):
        read(tmp_path)
    (tmp_path / "classes.txt").unlink()
    pair(tmp_path, "b", np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"b\.png has more than 256 colours, so it is no colour map"):
        read(tmp_path)


def test_grey_as_rgb_is_grey(tmp_path):
    pair(tmp_path, "a", np.repeat(grid([0, 2])[..., None], 3, 2))
    dataset = read(tmp_path)
    assert dataset.classes == ("0", "2")
    assert semantic(dataset).tolist() == [[0, 1]]


def test_black_and_white_are_background_and_foreground(tmp_path):
    pair(tmp_path, "a", grid([0, 255]))
    pair(tmp_path, "b", np.array([[False, True]]))  # one bit a pixel
    dataset = read(tmp_path)
    assert dataset.classes == ("background", "foreground")
    assert semantic(dataset).tolist() == semantic(dataset, 1).tolist() == [[0, 1]]
    (tmp_path / "classes.txt").write_text("tumour\n")
    assert read(tmp_path).classes == ("background", "tumour")


def test_sixteen_bits_are_classes_where_a_list_says_so_and_objects_where_none_does(tmp_path):
    pair(tmp_path, "a", grid([0, 300, 300], [0, 7, 0], dtype=np.uint16))
    dataset = read(tmp_path)
    assert dataset.classes == ("object",)
    target = dataset.splits["all"].target(0)
    assert target["boxes"].tolist() == [[1, 1, 2, 2], [1, 0, 3, 1]]
    assert target["area"].tolist() == [1, 2]
    assert target["masks"].tolist() == [
        [[False, False, False], [False, True, False]],
        [[False, True, True], [False, False, False]],
    ]
    assert dataset.splits["all"].targets.tolist() == [[1]]
    (tmp_path / "classes.csv").write_text("id,name\n0,water\n7,forest\n300,town\n")
    assert semantic(read(tmp_path)).tolist() == [[0, 2, 2], [0, 1, 0]]


def test_voc_objects_are_of_the_class_that_most_of_their_pixels_have(tmp_path):
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0]
    (tmp_path / "class_names.txt").write_text("background\ncat\ndog\n")
    (lists := tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    for name in "ab":
        pair(tmp_path, name, grid([1, 1, 255, 2]), "JPEGImages/{}.jpg", "SegmentationClass/{}.png", palette=palette)
        save(tmp_path / f"SegmentationObject/{name}.png", grid([1, 1, 255, 2]), palette=palette)
    save(tmp_path / "JPEGImages/c.jpg", grid([0, 0]))  # VOC has images without masks, in no list
    dataset = read(tmp_path)
    assert {name: list(split.names) for name, split in dataset.splits.items()} == {
        "train": ["JPEGImages/a.jpg"],
        "val": ["JPEGImages/b.jpg"],
    }
    assert "left out, as no list names them: 1 images" in dataset.notes
    target = dataset.splits["val"].target(0)
    assert target["labels"].tolist() == [1, 2]
    assert target["boxes"].tolist() == [[0, 0, 2, 1], [3, 0, 4, 1]]
    assert target["semantic"].tolist() == [[1, 1, VOID, 2]]


def test_voc_itself_by_its_file_names(tmp_path):
    palette = [0, 0, 0, 128, 0, 0]
    pair(
        tmp_path, "2007_000032", grid([0, 1, 20, 255]), "JPEGImages/{}.jpg", "SegmentationClass/{}.png", palette=palette
    )
    dataset = read(tmp_path)
    assert (len(dataset.classes), dataset.classes[1], dataset.classes[20]) == (21, "aeroplane", "tvmonitor")
    assert semantic(dataset).tolist() == [[0, 1, 20, VOID]]


def test_cityscapes_by_its_file_names(tmp_path):
    for split, town in (("train", "ulm"), ("val", "bonn")):
        where = (f"leftImg8bit/{split}/{town}/{{}}_leftImg8bit.png", f"gtFine/{split}/{town}/{{}}_gtFine_labelIds.png")
        pair(tmp_path, f"{town}_0", grid([0, 7, 33], [3, 11, 8]), *where)
        save(tmp_path / f"gtFine/{split}/{town}/{town}_0_gtFine_color.png", np.zeros((2, 3, 3), np.uint8))
        save(tmp_path / f"gtFine/{split}/{town}/{town}_0_gtFine_instanceIds.png", grid([0, 7, 33], dtype=np.uint16))
    dataset = read(tmp_path)
    assert len(dataset.classes) == 19
    assert list(dataset.splits["val"].names) == ["leftImg8bit/val/bonn/bonn_0_leftImg8bit.png"]
    assert semantic(dataset, split="val").tolist() == [[VOID, 0, 18], [VOID, 2, 1]]


@pytest.mark.parametrize(
    ("image", "place"),
    [
        ("images/train/{}.jpg", "masks/train/{}.png"),
        ("train/images/{}.jpg", "train/masks/{}.png"),
        ("train/{}.jpg", "train/{}_mask.png"),
        ("train/{}.jpg", "train/{}.png"),
        ("train/{}_sat.jpg", "train/{}_mask.png"),
        ("Images/Training/{}.JPG", "Annotations/training/{}.png"),
        ("img/train/deep/{}.jpg", "gt/train/deep/{}_gt.png"),
    ],
)
def test_nestings_and_names(tmp_path, image, place):
    for name, value in (("x1", 0), ("x2", 1)):
        pair(tmp_path, name, grid([value, 1]), image, place)
        pair(tmp_path, name, grid([value, 1]), *(word.replace("rain", "est") for word in (image, place)))
    dataset = read(tmp_path)
    assert list(dataset.splits) == ["train", "test"]
    assert list(dataset.splits["train"].names) == [image.format("x1"), image.format("x2")]
    assert semantic(dataset, 1, "test").tolist() == [[1, 1]]


def test_class_folders_are_no_masks(tmp_path):
    for name in ("cat/1.jpg", "dog/1.jpg", "train/cat/2.jpg"):
        save(tmp_path / name, grid([0, 1]))
    assert find_masks(tmp_path, list_folder(tmp_path)[0]) is None


def test_partners_that_are_missing_are_raised_or_left_out(tmp_path):
    for name in "abc":
        pair(tmp_path, name, grid([0, 1]))
    (tmp_path / "masks/a.png").unlink()
    (tmp_path / "images/b.jpg").unlink()
    with pytest.raises(DataError, match=r"images/a\.jpg has no mask; masks/b\.png has no image\. Mend them"):
        read(tmp_path)
    dataset = read(tmp_path, on_error="skip")
    assert list(dataset.splits["all"].names) == ["images/c.jpg"]
    assert any("2 left out" in note for note in dataset.notes)


def test_a_split_without_masks_is_left_out(tmp_path):
    pair(tmp_path, "a", grid([0, 1]), "images/train/{}.jpg", "masks/train/{}.png")
    save(tmp_path / "images/test/b.jpg", grid([0, 1]))
    dataset = read(tmp_path)
    assert list(dataset.splits) == ["train"]
    assert "test has no masks and is left out (images: 1)" in dataset.notes


def test_sizes_that_differ_are_named_and_turned_images_are_told(tmp_path):
    pair(tmp_path, "a", grid([0, 1, 1]))
    pair(tmp_path, "b", grid([0, 1, 1]))
    pair(tmp_path, "c", grid([0, 1, 1]))
    save(tmp_path / "masks/a.png", grid([0, 1]))
    for name, turn in (("b", 6), ("c", 3)):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.new("RGB", (3, 1)).save(tmp_path / f"images/{name}.jpg", exif=exif)
    split = read(tmp_path).splits["all"]
    with pytest.raises(DataError, match=r"masks/a\.png is 2 x 1 pixels, and its image a\.jpg 3 x 1"):
        split.target(0)
    with pytest.raises(DataError, match=r"b\.jpg 1 x 3, as its EXIF turns it \(orientation 6\): the mask was drawn"):
        split.target(1)
    found = list(faults(split))
    assert [(one.kind, one.where) for one in found] == [
        ("mask", "images/a.jpg"),
        ("mask", "images/b.jpg"),
        ("mask-turned", "images/c.jpg"),
    ]


def test_files_that_are_no_masks(tmp_path, monkeypatch):
    pair(tmp_path, "a", grid([0, 1]))
    (tmp_path / "masks/a.png").unlink()
    save(tmp_path / "masks/a.jpg", grid([0, 1]))
    with pytest.raises(DataError, match=r"a\.jpg is a JPEG, which blurs the values"):
        read(tmp_path)
    (tmp_path / "masks/a.jpg").unlink()
    save(tmp_path / "masks/a.png", np.array([[[0, 0, 0, 255], [0, 0, 0, 9]]], np.uint8))
    with pytest.raises(DataError, match=r"a\.png is transparent in places \(alpha 9\)"):
        read(tmp_path)
    (tmp_path / "masks/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png: is empty"):
        read(tmp_path)
    with pytest.raises(DataError, match="no mask can be read"):
        read(tmp_path, on_error="skip")
    pair(tmp_path, "b", grid([0, 1]))
    dataset = read(tmp_path, on_error="skip")
    assert list(dataset.splits["all"].names) == ["images/b.jpg"]
    assert dataset.splits["all"].targets.tolist() == [[1, 1]]
    (tmp_path / "masks/b.png").unlink()
    (tmp_path / "images/b.jpg").unlink()
    save(tmp_path / "masks/a.png", np.zeros((9, 9), np.uint8))
    monkeypatch.setenv("VERTEBRA_MAX_PIXELS", "80")
    with pytest.raises(DataError, match=r"a\.png: 9 x 9 pixels are more than the 80 allowed"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("value,name\n1,a\n1,b\n", "gives 1 to two classes"),
        ("value,name\n1,a\n2,a\n", "lists 'a' twice"),
        ("value,name\nx,a\n", "line 2: 'x' where a whole number"),
        ("value,title\n1,a\n", "has no column called name; its columns are value, title"),
        ("value,name\n1,void\n", "lists no class"),
        ("name\n" + "".join(f"c{n}\n" for n in range(256)), "lists 256 classes"),
    ],
)
def test_lists_of_classes_that_cannot_be_right(tmp_path, text, reason):
    (tmp_path / "classes.csv").write_text(text)
    pair(tmp_path, "a", grid([0, 1]))
    with pytest.raises(DataError, match=reason):
        read(tmp_path)


def test_splits_of_images_alone_and_folders_that_are_no_split(tmp_path):
    pair(tmp_path / "above", "a", grid([0, 1]), "train/images/{}.jpg", "train/masks/{}.png")
    save(tmp_path / "above/test/images/b.jpg", grid([0, 1]))
    pair(tmp_path / "beside", "a", grid([0, 1]), "train/{}.jpg", "train/{}_mask.png")
    save(tmp_path / "beside/test/b.jpg", grid([0, 1]))
    for root in (tmp_path / "above", tmp_path / "beside"):
        assert "test has no masks and is left out (images: 1)" in read(root).notes
    pair(tmp_path / "inside", "a", grid([0, 1]), "images/train/{}.jpg", "masks/train/{}.png")
    pair(tmp_path / "inside", "a", grid([0, 1]), "images/more/{}.jpg", "masks/more/{}.png")
    with pytest.raises(DataError, match=r"images/ has folders of splits \(train\) and beside them more; move it away"):
        read(tmp_path / "inside")


def test_splits_have_the_same_kinds_of_masks(tmp_path):
    pair(tmp_path, "a", grid([0, 1]), "train/images/{}.jpg", "train/masks/{}.png")
    pair(tmp_path, "b", grid([0, 1]), "val/images/{}.jpg", "val/instances/{}.png")
    with pytest.raises(DataError, match="val has no masks of classes, and other splits have"):
        read(tmp_path)


def same(first, second):
    """Whether two data sets say the same of the same images."""
    assert (first.classes, first.label, list(first.splits)) == (second.classes, second.label, list(second.splits))
    for name, split in first.splits.items():
        other = second.splits[name]
        assert len(split) == len(other)
        assert np.array_equal(split.targets, other.targets)
        for index in range(len(split)):
            assert split.image(index).tobytes() == other.image(index).tobytes()
            one, two = split.target(index), other.target(index)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)


def test_written_and_read_again_it_is_the_same(tmp_path):
    for split in ("train", "test"):
        for name, mask in (("a", grid([0, 3], [9, 255])), ("b", grid([3, 3], [3, 0]))):
            pair(tmp_path / "one", f"{split}/{name}", mask)
    first = read(tmp_path / "one")
    write_masks(first, tmp_path / "two")
    second = read(tmp_path / "two")
    same(first, second)
    assert list(second.splits["test"].names) == ["images/test/a.jpg", "images/test/b.jpg"]
    assert first.fingerprint != second.fingerprint  # the files of the masks are others
    write_masks(second, tmp_path / "three")
    assert read(tmp_path / "three").fingerprint == second.fingerprint
    with pytest.raises(UsageError, match="is there already and is not empty"):
        write_masks(first, tmp_path / "two")


def test_the_fingerprint_is_that_of_the_data_wherever_they_lie(tmp_path):
    for folder in ("here", "there"):
        pair(tmp_path / folder, "a", grid([0, 3]))
    first, second = read(tmp_path / "here"), read(tmp_path / "there")
    assert first.fingerprint == second.fingerprint
    assert isinstance(first.splits["all"].annotations, MaskFiles)


@pytest.mark.data
def test_camvid(tmp_path):
    root = unpacked("seg/camvid-159.zip", tmp_path) / "camvid"
    dataset = read(root)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 74, "val": 26, "test": 59}
    assert dataset.classes[0] == "sky"
    assert len(dataset.classes) == 11
    raw = np.asarray(Image.open(root / "masks/test/0001TP_008550.png"))
    found = semantic(dataset, 0, "test").numpy()
    assert np.array_equal(found, np.where(raw == 11, IGNORE, raw))
    assert dataset.splits["test"].targets[0].tolist() == [int((raw == value).any()) for value in range(11)]
    assert not list(faults(dataset.splits["val"]))
    small = type(dataset)(**(vars(dataset) | {"splits": {"val": dataset.splits["val"].select(range(4))}}))
    write_masks(small, tmp_path / "again")
    same(small, read(tmp_path / "again"))


@pytest.mark.data
def test_nuclei_are_objects(tmp_path):
    dataset = read(unpacked("seg/nuclei-dsb2018-200.zip", tmp_path) / "nuclei")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 120, "val": 30, "test": 50}
    counts = [len(split.annotations.instances(i)[1]) for split in dataset.splits.values() for i in range(len(split))]
    assert sum(counts) == 5878
    target = dataset.splits["val"].target(3)
    for box, mask, area in zip(target["boxes"], target["masks"], target["area"], strict=True):
        ys, xs = np.nonzero(mask.numpy())
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert len(xs) == area
    small = type(dataset)(**(vars(dataset) | {"splits": {"val": dataset.splits["val"].select(range(4))}}))
    write_masks(small, tmp_path / "again")
    same(small, read(tmp_path / "again"))


@pytest.mark.data
def test_frames_of_a_video_with_masks(tmp_path):
    dataset = read(unpacked("video/video-seg-5.zip", tmp_path) / "video-seg-5")
    assert dataset.classes == ("_background_", "car", "track")
    assert semantic(dataset).shape == (563, 1000)
