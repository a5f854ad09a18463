"""Small datasets in every layout and edge case that users have: `LAYOUTS` makes them, one entry each.

A case is a function that fills a folder and returns what to read, and what must come of it: the layout, how many
images a split has and the classes, or the words of an error.
"""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (24, 16)  # width, height


@dataclass(frozen=True)
class Case:
    """One dataset and what reading it must give.

    Attributes:
        fill: makes it in a folder; returns the path to read, or None for the folder.
        layout: what it is recognised as.
        images: split -> images.
        classes: of the dataset, or None where nobody cares.
        error: words of the message, where reading must fail.
        options: for `read`.
        note: words that one of the notes must have.
    """

    fill: Callable[[Path], Path | None]
    layout: str = ""
    images: Mapping[str, int] | None = None
    classes: Sequence[str] | None = None
    error: str = ""
    options: Mapping[str, Any] | None = None
    note: str = ""


def photo(file: Path, shade: int = 0, size: tuple[int, int] = SIZE) -> None:
    """An RGB image whose pixels depend on its name, so that no two are equal."""
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(sum(map(ord, str(file.name))) + shade)
    Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(file)


def photos(root: Path, *names: str) -> None:
    for name in names:
        photo(root / name)


def text(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")


# one class an image


def imagefolder(root: Path) -> None:
    photos(
        root, *(f"{split}/{name}/{i}.jpg" for split in ("train", "val") for name in ("cat", "dog") for i in range(2))
    )


def imagefolder_flat(root: Path) -> None:
    photos(root, "cat/a.png", "dog/b.png", "dog/c.png")


def imagefolder_synonyms(root: Path) -> None:
    photos(root, "Training/cat/a.png", "Training/dog/b.png", "validation/cat/c.png", "TEST/dog/d.png")


def imagefolder_empty_class(root: Path) -> None:
    imagefolder(root)
    (root / "train" / "eel").mkdir()


def imagefolder_nested(root: Path) -> None:
    photos(root, "train/cat/house/a.png", "train/cat/wild/b.png", "train/dog/c.png")


def imagefolder_hidden(root: Path) -> None:
    imagefolder_flat(root)
    photos(root, ".cache/x.png")
    text(root / "cat" / ".DS_Store", "x")
    text(root / "Thumbs.db", "x")


def imagefolder_link(root: Path) -> None:
    photos(root / "store", "a.png", "b.png")
    (root / "data" / "cat").mkdir(parents=True)
    (root / "data" / "dog").symlink_to(root / "store", target_is_directory=True)
    photos(root, "data/cat/c.png")
    return root / "data"  # type: ignore[return-value]


def imagefolder_upper_case(root: Path) -> None:
    photos(root, "cat/A.JPG", "dog/B.PNG", "dog/C.JPEG")


def imagefolder_unicode(root: Path) -> None:
    photos(root, "Köter/ä.png", "猫/b.png")


def imagefolder_strange_val(root: Path) -> None:
    photos(root, "train/cat/a.png", "train/dog/b.png", "val/cow/c.png")


def flat(root: Path) -> None:
    photos(root, "a.jpg", "b.jpg", "c.png")


def flat_splits(root: Path) -> None:
    photos(root, "train/a.jpg", "train/b.jpg", "val/c.jpg")


def nothing(root: Path) -> None:
    text(root / "readme.txt", "hello")


# tables


def table(root: Path, header: Sequence[str], rows: Sequence[Sequence[object]], name: str = "labels.csv") -> None:
    sheet = io.StringIO()
    csv.writer(sheet, delimiter="\t" if name.endswith(".tsv") else ",").writerows([header, *rows])
    text(root / name, sheet.getvalue())


def csv_labels(root: Path) -> None:
    photos(root, "images/a.png", "images/b.png")
    table(root, ["filename", "label"], [["images/a.png", "cat"], ["images/b.png", "dog"]])


def csv_multi(root: Path) -> None:
    photos(root, "a.png", "b.png")
    table(root, ["filename", "labels"], [["a.png", "cat|dog"], ["b.png", "dog"]])


def csv_splits(root: Path) -> None:
    photos(root, "a.png", "b.png", "c.png")
    rows = [["a.png", "cat", "train"], ["b.png", "dog", "train"], ["c.png", "cat", "valid"]]
    table(root, ["filename", "label", "split"], rows)


def tsv(root: Path) -> None:
    photos(root, "a.png", "b.png")
    table(root, ["filename", "label"], [["a.png", "cat"], ["b.png", "dog"]], "labels.tsv")


def csv_file(root: Path) -> Path:
    csv_labels(root)
    return root / "labels.csv"


def csv_missing_file(root: Path) -> None:
    csv_labels(root)
    table(root, ["filename", "label"], [["images/a.png", "cat"], ["images/lost.png", "dog"]])


def csv_quoted(root: Path) -> None:
    photos(root, "a, b.png", "c.png")
    table(root, ["filename", "label"], [["a, b.png", 'big "cat"'], ["c.png", "dog"]])


def csv_escape(root: Path) -> None:
    photos(root, "a.png")
    photo(root.parent / "outside.png")
    table(root, ["filename", "label"], [["a.png", "cat"], ["../outside.png", "dog"]])


# other containers


def webdataset(root: Path) -> None:
    with tarfile.open(root / "shard-000.tar", "w") as tar:
        for number, label in enumerate(("cat", "dog")):
            image = io.BytesIO()
            Image.new("RGB", SIZE, (number * 90, 0, 0)).save(image, "PNG")
            for name, content in ((f"{number}.png", image.getvalue()), (f"{number}.cls", label.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


# boxes: COCO


def coco(
    root: Path, name: str, files: Sequence[str], annotations: Sequence[Mapping[str, Any]] | None = None, **more: Any
) -> None:
    """A COCO json; categories 1 cat, 3 dog; one box an image unless `annotations` says otherwise."""
    images = [
        {"id": 10 + 5 * number, "file_name": file, "width": SIZE[0], "height": SIZE[1]}
        for number, file in enumerate(files)
    ]
    boxes = [
        {"id": 1 + 2 * number, "image_id": image["id"], "category_id": 1 + 2 * (number % 2), "bbox": [2, 3, 8, 6],
         "area": 48, "iscrowd": 0}
        for number, image in enumerate(images)
    ]  # fmt: skip
    content = {
        "images": images,
        "annotations": boxes if annotations is None else list(annotations),
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    text(root / name, json.dumps(content | more))


def coco_2017(root: Path) -> None:
    photos(root, "train2017/a.jpg", "train2017/b.jpg", "val2017/c.jpg")
    coco(root, "annotations/instances_train2017.json", ["a.jpg", "b.jpg"])
    coco(root, "annotations/instances_val2017.json", ["c.jpg"])


def coco_images_folder(root: Path) -> None:
    photos(root, "images/a.jpg", "images/b.jpg")
    coco(root, "annotations/instances.json", ["a.jpg", "b.jpg"])


def coco_roboflow(root: Path) -> None:
    photos(root, "train/a.jpg", "train/b.jpg", "valid/c.jpg")
    coco(root, "train/_annotations.coco.json", ["a.jpg", "b.jpg"])
    coco(root, "valid/_annotations.coco.json", ["c.jpg"])


def coco_beside(root: Path) -> None:
    photos(root, "a.jpg", "b.jpg")
    coco(root, "instances.json", ["a.jpg", "b.jpg"])


def coco_file(root: Path) -> Path:
    coco_beside(root)
    return root / "instances.json"


def coco_negative(root: Path) -> None:
    coco_beside(root)
    coco(root, "instances.json", ["a.jpg", "b.jpg"], [])


def coco_polygons(root: Path) -> None:
    coco_beside(root)
    shape = {"segmentation": [[2, 3, 10, 3, 10, 9, 2, 9]], "area": 48, "iscrowd": 0, "bbox": [2, 3, 8, 6]}
    coco(root, "instances.json", ["a.jpg", "b.jpg"], [{"id": 1, "image_id": 10, "category_id": 3, **shape}])


def coco_crowd(root: Path) -> None:
    coco_beside(root)
    runs = {"size": [SIZE[1], SIZE[0]], "counts": [10, 20, SIZE[0] * SIZE[1] - 30]}
    shape = {"segmentation": runs, "area": 20, "iscrowd": 1, "bbox": [0, 0, 2, 16]}
    coco(root, "instances.json", ["a.jpg", "b.jpg"], [{"id": 1, "image_id": 10, "category_id": 3, **shape}])


def coco_escape(root: Path) -> None:
    photos(root, "a.jpg")
    photo(root.parent / "outside.jpg")
    coco(root, "instances.json", ["a.jpg", "../outside.jpg"])


def coco_absolute(root: Path) -> None:
    photos(root, "a.jpg")
    coco(root, "instances.json", ["a.jpg", "/etc/passwd"])


def coco_nan(root: Path) -> None:
    coco_beside(root)
    box = {"id": 7, "image_id": 10, "category_id": 1, "bbox": [2, float("nan"), 8, 6], "area": 1, "iscrowd": 0}
    coco(root, "instances.json", ["a.jpg", "b.jpg"], [box])


def coco_unknown_category(root: Path) -> None:
    coco_beside(root)
    box = {"id": 7, "image_id": 10, "category_id": 2, "bbox": [2, 3, 8, 6], "area": 48, "iscrowd": 0}
    coco(root, "instances.json", ["a.jpg", "b.jpg"], [box])


def coco_bomb(root: Path) -> None:
    coco_beside(root)
    runs = {"size": [1_000_000, 1_000_000], "counts": [0, 1_000_000_000_000]}
    shape = {"segmentation": runs, "area": 20, "iscrowd": 1, "bbox": [0, 0, 2, 16]}
    coco(root, "instances.json", ["a.jpg", "b.jpg"], [{"id": 1, "image_id": 10, "category_id": 3, **shape}])


def coco_broken(root: Path) -> None:
    coco_beside(root)
    text(root / "instances.json", '{"images": [')


# boxes: VOC


def voc_xml(root: Path, name: str, boxes: str = "", file: str | None = None) -> None:
    text(
        root / "Annotations" / f"{name}.xml",
        f"<annotation><filename>{file or name + '.jpg'}</filename><size><width>{SIZE[0]}</width>"
        f"<height>{SIZE[1]}</height><depth>3</depth></size>{boxes}</annotation>",
    )


def voc_box(name: str = "cat", left: object = 3, top: object = 4, right: object = 10, bottom: object = 9) -> str:
    return (
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
    )


def voc(root: Path) -> None:
    photos(root, "JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg")
    for name, label in (("a", "cat"), ("b", "dog"), ("c", "cat")):
        voc_xml(root, name, voc_box(label))
    text(root / "ImageSets/Main/train.txt", "a\nb\n")
    text(root / "ImageSets/Main/val.txt", "c\n")


def voc_without_sets(root: Path) -> None:
    photos(root, "JPEGImages/a.jpg", "JPEGImages/b.jpg")
    voc_xml(root, "a", voc_box())
    voc_xml(root, "b", voc_box("dog"))


def voc_beside(root: Path) -> None:
    photos(root, "a.jpg", "b.jpg")
    for name in ("a", "b"):
        voc_xml(root / "x", name, voc_box())
        (root / "x" / "Annotations" / f"{name}.xml").rename(root / f"{name}.xml")
    (root / "x" / "Annotations").rmdir()
    (root / "x").rmdir()


def voc_swapped(root: Path) -> None:
    voc_without_sets(root)
    voc_xml(root, "a", voc_box(left=10, right=3))


def voc_float(root: Path) -> None:
    voc_without_sets(root)
    voc_xml(root, "a", voc_box(left=3.5, right=10.25))


def voc_entities(root: Path) -> None:
    voc_without_sets(root)
    attack = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>'
    text(root / "Annotations/a.xml", attack)


# boxes: YOLO


def yolo_yaml(root: Path, content: str) -> None:
    text(root / "data.yaml", content)


def yolo(root: Path) -> None:
    photos(root, "images/train/a.jpg", "images/train/b.jpg", "images/val/c.jpg")
    for name in ("train/a", "train/b", "val/c"):
        text(root / f"labels/{name}.txt", "0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.1 0.1\n")
    yolo_yaml(root, "train: images/train\nval: images/val\nnames: [cat, dog]\n")


def yolo_roboflow(root: Path) -> None:
    photos(root, "train/images/a.jpg", "valid/images/b.jpg")
    text(root / "train/labels/a.txt", "0 0.5 0.5 0.25 0.5\n")
    text(root / "valid/labels/b.txt", "1 0.5 0.5 0.25 0.5\n")
    yolo_yaml(root, "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n")


def yolo_names_map(root: Path) -> None:
    yolo(root)
    yolo_yaml(root, "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n")


def yolo_file(root: Path) -> Path:
    yolo(root)
    return root / "data.yaml"


def yolo_polygons(root: Path) -> None:
    yolo(root)
    text(root / "labels/train/a.txt", "1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.6 0.05 0.3\n")


def yolo_negative(root: Path) -> None:
    yolo(root)
    text(root / "labels/train/a.txt", "")


def yolo_missing_label(root: Path) -> None:
    yolo(root)
    (root / "labels/train/a.txt").unlink()


def yolo_columns(root: Path) -> None:
    yolo(root)
    text(root / "labels/train/a.txt", "0 0.5 0.5 0.25\n")


def yolo_class(root: Path) -> None:
    yolo(root)
    text(root / "labels/train/a.txt", "7 0.5 0.5 0.25 0.5\n")


def coco_beside_voc(root: Path) -> None:
    voc_without_sets(root)
    coco(root, "instances.json", ["JPEGImages/a.jpg", "JPEGImages/b.jpg"])


# masks


def mask(file: Path, values: Sequence[int], mode: str = "L", size: tuple[int, int] = SIZE) -> None:
    """Stripes of the values across the image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    row = np.array(values, dtype=np.uint8)[np.arange(size[0]) * len(values) // size[0]]
    image = Image.fromarray(np.tile(row, (size[1], 1)))
    if mode == "P":
        image.putpalette([channel for value in range(256) for channel in (value, 255 - value, value // 2)])
    image.save(file)


def masks(root: Path) -> None:
    photos(root, "images/a.jpg", "images/b.jpg")
    mask(root / "masks/a.png", [0, 1])
    mask(root / "masks/b.png", [1, 2, 255])
    text(root / "classes.txt", "sky\nroad\ncar\n")


def masks_splits(root: Path) -> None:
    photos(root, "images/train/a.jpg", "images/train/b.jpg", "images/val/c.jpg")
    for name in ("train/a", "train/b", "val/c"):
        mask(root / f"masks/{name}.png", [0, 1])
    text(root / "classes.txt", "sky\nroad\n")


def masks_nested(root: Path) -> None:
    photos(root, "train/images/a.jpg", "val/images/b.jpg")
    mask(root / "train/masks/a.png", [0, 1])
    mask(root / "val/masks/b.png", [1])
    text(root / "classes.txt", "sky\nroad\n")


def masks_palette(root: Path) -> None:
    masks(root)
    mask(root / "masks/a.png", [0, 2], "P")


def masks_size(root: Path) -> None:
    masks(root)
    mask(root / "masks/a.png", [0, 1], size=(10, 16))


def masks_unknown_value(root: Path) -> None:
    masks(root)
    mask(root / "masks/a.png", [0, 9])


def masks_missing(root: Path) -> None:
    masks(root)
    (root / "masks/a.png").unlink()


def masks_voc(root: Path) -> None:
    photos(root, "JPEGImages/a.jpg", "JPEGImages/b.jpg")
    mask(root / "SegmentationClass/a.png", [0, 1, 255], "P")
    mask(root / "SegmentationClass/b.png", [0, 2], "P")
    text(root / "ImageSets/Segmentation/train.txt", "a\n")
    text(root / "ImageSets/Segmentation/val.txt", "b\n")


def masks_cityscapes(root: Path) -> None:
    photos(root, "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png", "leftImg8bit/val/bonn/bonn_0_leftImg8bit.png")
    mask(root / "gtFine/train/ulm/ulm_0_gtFine_labelIds.png", [7, 8])
    mask(root / "gtFine/val/bonn/bonn_0_gtFine_labelIds.png", [7])


def panoptic(root: Path) -> None:
    photos(root, "images/a.jpg")
    ids = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    ids[:, :10, 0], ids[:, 10:20, 1] = 5, 1  # 5 and 256
    (root / "panoptic").mkdir()
    Image.fromarray(ids).save(root / "panoptic/a.png")
    segments = [
        {"id": number, "category_id": category, "area": 160, "bbox": [0, 0, 10, 16], "iscrowd": 0}
        for number, category in ((5, 1), (256, 3))
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": SIZE[0], "height": SIZE[1]}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 3, "name": "sky", "isthing": 0}],
    }
    text(root / "panoptic.json", json.dumps(content))


# pairs


def pairs(root: Path) -> None:
    for name in ("a", "b"):
        photo(root / f"HR/{name}.png", size=(24, 16))
        photo(root / f"LR/{name}.png", size=(12, 8))


def pairs_gt_lq(root: Path) -> None:
    for name in ("a", "b"):
        photo(root / f"gt/{name}.png")
        photo(root / f"lq/{name}.png", shade=9)


def pairs_scales(root: Path) -> None:
    photo(root / "HR/a.png", size=(24, 16))
    photo(root / "LR_bicubic_x2/a.png", size=(12, 8))
    photo(root / "LR_bicubic_x4/a.png", size=(6, 4))


def pairs_missing(root: Path) -> None:
    pairs(root)
    (root / "LR/a.png").unlink()


# words


def captions_csv(root: Path) -> None:
    photos(root, "a.jpg", "b.jpg")
    table(root, ["filename", "caption"], [["a.jpg", "a cat, asleep"], ["b.jpg", "a dog"]], "captions.csv")


def captions_jsonl(root: Path) -> None:
    photos(root, "images/a.jpg", "images/b.jpg")
    rows = [{"file_name": "images/a.jpg", "text": "a cat"}, {"file_name": "images/b.jpg", "text": "a dog"}]
    text(root / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def captions_coco(root: Path) -> None:
    photos(root, "images/a.jpg", "images/b.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "a cat"},
            {"id": 2, "image_id": 1, "caption": "a sleeping cat"},
            {"id": 3, "image_id": 2, "caption": "a dog"},
        ],
    }
    text(root / "annotations/captions_train.json", json.dumps(content))


# frames


def frames(root: Path) -> None:
    for clip, label in (("run1", "run"), ("jump1", "jump")):
        for number in range(4):
            photo(root / label / clip / f"frame_{number:05d}.jpg")


def frames_of_any_name(root: Path) -> None:
    for clip in ("a", "b"):
        for number in range(3):
            photo(root / clip / f"{number:05d}.jpg")


CASES: dict[str, Case] = {
    "imagefolder": Case(imagefolder, "imagefolder", {"train": 4, "val": 4}, ("cat", "dog")),
    "imagefolder without splits": Case(imagefolder_flat, "imagefolder", {"all": 3}, ("cat", "dog")),
    "imagefolder, synonyms of splits": Case(imagefolder_synonyms, "imagefolder", {"train": 2, "val": 1, "test": 1}),
    "imagefolder, an empty class": Case(
        imagefolder_empty_class, "imagefolder", {"train": 4, "val": 4}, None, note="eel"
    ),
    "imagefolder, nested classes": Case(imagefolder_nested, "imagefolder", {"train": 3}, ("cat", "dog")),
    "imagefolder, hidden files": Case(imagefolder_hidden, "imagefolder", {"all": 3}, ("cat", "dog")),
    "imagefolder, a linked class": Case(imagefolder_link, "imagefolder", {"all": 3}, ("cat", "dog")),
    "imagefolder, upper-case suffixes": Case(imagefolder_upper_case, "imagefolder", {"all": 3}),
    "imagefolder, names beyond ASCII": Case(imagefolder_unicode, "imagefolder", {"all": 2}, ("Köter", "猫")),
    "imagefolder, a class that train lacks": Case(imagefolder_strange_val, error="class 'cow' that train lacks"),
    "flat": Case(flat, "flat", {"all": 3}, ()),
    "flat with splits": Case(flat_splits, "flat", {"train": 2, "val": 1}, ()),
    "nothing": Case(nothing, error="nothing that is read"),
    "csv": Case(csv_labels, "table", {"all": 2}, ("cat", "dog")),
    "csv, the file itself": Case(csv_file, "table", {"all": 2}, ("cat", "dog")),
    "csv, many labels": Case(csv_multi, "table", {"all": 2}, ("cat", "dog")),
    "csv, a column of splits": Case(csv_splits, "table", {"train": 2, "val": 1}, ("cat", "dog")),
    "csv, a missing file": Case(csv_missing_file, error=r"lost\.png"),
    "csv, quotes and commas": Case(csv_quoted, "table", {"all": 2}, ('big "cat"', "dog")),
    "csv, a path that leaves": Case(csv_escape, error=r"\.\./outside\.png"),
    "tsv": Case(tsv, "table", {"all": 2}, ("cat", "dog")),
    "webdataset": Case(webdataset, "webdataset", {"all": 2}, ("cat", "dog")),
    "coco 2017": Case(coco_2017, "coco", {"train": 2, "val": 1}, ("cat", "dog")),
    "coco, images/": Case(coco_images_folder, "coco", {"all": 2}, ("cat", "dog")),
    "coco, roboflow": Case(coco_roboflow, "coco", {"train": 2, "val": 1}, ("cat", "dog")),
    "coco, beside the images": Case(coco_beside, "coco", {"all": 2}, ("cat", "dog")),
    "coco, the file itself": Case(coco_file, "coco", {"all": 2}, ("cat", "dog")),
    "coco, images without objects": Case(coco_negative, "coco", {"all": 2}, ("cat", "dog")),
    "coco, polygons": Case(coco_polygons, "coco", {"all": 2}, ("cat", "dog")),
    "coco, a crowd in runs": Case(coco_crowd, "coco", {"all": 2}, ("cat", "dog")),
    "coco, a path that leaves": Case(coco_escape, error=r"\.\./outside\.jpg"),
    "coco, an absolute path": Case(coco_absolute, error="/etc/passwd"),
    "coco, a box of nan": Case(coco_nan, error="(?i)nan"),
    "coco, an unknown category": Case(coco_unknown_category, error="category"),
    "coco, an endless mask": Case(coco_bomb, error="1000000|1,000,000"),
    "coco, half a file": Case(coco_broken, error=r"instances\.json"),
    "voc": Case(voc, "voc", {"train": 2, "val": 1}, ("cat", "dog")),
    "voc without image sets": Case(voc_without_sets, "voc", {"all": 2}, ("cat", "dog")),
    "voc, beside the images": Case(voc_beside, "voc", {"all": 2}, ("cat",)),
    "voc, swapped corners": Case(voc_swapped, "voc", {"all": 2}, ("cat", "dog"), note="exchanged"),
    "voc, fractions of pixels": Case(voc_float, "voc", {"all": 2}, ("cat", "dog")),
    "voc, an entity attack": Case(voc_entities, error=r"a\.xml"),
    "coco beside voc": Case(coco_beside_voc, "coco", {"all": 2}, ("cat", "dog"), note="layout='voc' reads the other"),
    "yolo": Case(yolo, "yolo", {"train": 2, "val": 1}, ("cat", "dog")),
    "yolo, roboflow": Case(yolo_roboflow, "yolo", {"train": 1, "val": 1}, ("cat", "dog")),
    "yolo, names as a map": Case(yolo_names_map, "yolo", {"train": 2, "val": 1}, ("cat", "dog")),
    "yolo, the file itself": Case(yolo_file, "yolo", {"train": 2, "val": 1}, ("cat", "dog")),
    "yolo, polygons": Case(yolo_polygons, "yolo", {"train": 2, "val": 1}, ("cat", "dog")),
    "yolo, an image without objects": Case(yolo_negative, "yolo", {"train": 2, "val": 1}, ("cat", "dog")),
    "yolo, a missing label file": Case(yolo_missing_label, "yolo", {"train": 2, "val": 1}, note="a"),
    "yolo, a wrong number of columns": Case(yolo_columns, error=r"a\.txt.*1"),
    "yolo, an unknown class": Case(yolo_class, error=r"a\.txt.*7|7.*a\.txt"),
    "masks": Case(masks, "masks", {"all": 2}, ("sky", "road", "car")),
    "masks, splits inside": Case(masks_splits, "masks", {"train": 2, "val": 1}, ("sky", "road")),
    "masks, splits outside": Case(masks_nested, "masks", {"train": 1, "val": 1}, ("sky", "road")),
    "masks with a palette": Case(masks_palette, "masks", {"all": 2}, ("sky", "road", "car")),
    "masks of another size": Case(masks_size, error=r"a\.png"),
    "masks with an unknown value": Case(masks_unknown_value, error=r"a\.png.*9|9.*a\.png"),
    "a mask is missing": Case(masks_missing, error=r"a\.jpg|a\.png"),
    "voc masks": Case(masks_voc, "masks", {"train": 1, "val": 1}),
    "cityscapes": Case(masks_cityscapes, "masks", {"train": 1, "val": 1}),
    "panoptic": Case(panoptic, "panoptic", {"all": 1}, ("cat", "sky")),
    "pairs": Case(pairs, "pairs", {"all": 2}, ()),
    "pairs, gt and lq": Case(pairs_gt_lq, "pairs", {"all": 2}, ()),
    "pairs, several scales": Case(pairs_scales, error="LR_bicubic_x4|scale"),
    "pairs, a partner is missing": Case(pairs_missing, error=r"a\.png"),
    "captions, csv": Case(captions_csv, "image_text", {"all": 2}, ()),
    "captions, jsonl": Case(captions_jsonl, "image_text", {"all": 2}, ()),
    "frames of clips in classes": Case(frames, "videos", {"all": 2}, ("jump", "run")),
    "frames, said so": Case(frames_of_any_name, "videos", {"all": 2}, (), options={"layout": "videos"}),
    "numbered images in folders are classes": Case(frames_of_any_name, "imagefolder", {"all": 6}, ("a", "b")),
    "captions, coco": Case(captions_coco, "image_text", {"train": 2}, ()),
}
