import os
import pickle
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vertebra.data.folders import list_folder
from vertebra.data.videos import VideoStore, faults, find_videos, holes, read_videos, videos_file, write_videos
from vertebra.errors import DataError, UsageError

shared = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
STEP = 6
"""What a frame of `film` is brighter than the one before it."""


def film(file, frames=20, stamps=None, codec="mpeg4", audio=False, size=(64, 48), **options):
    """A video whose frame n has the grey level 6 n; 10 frames a second, or stamps in milliseconds."""
    av = pytest.importorskip("av")
    file.parent.mkdir(parents=True, exist_ok=True)
    base = Fraction(1, 1000) if stamps else Fraction(1, 10)
    with av.open(str(file), "w", options=options) as container:
        stream = container.add_stream(codec, rate=1000 if stamps else 10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", 5
        stream.codec_context.time_base = base
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), STEP * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamps[number] if stamps else number, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    return file


def store(file):
    return VideoStore(file.parent, np.array([file.name]), np.array([0, 0]), np.array([], dtype=np.str_))


def shades(clip):
    """Which frame of `film` each frame is."""
    return np.round(clip.reshape(len(clip), -1).mean(1) / STEP).astype(int).tolist()


def draw(file, shade=0, size=(4, 2)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, shade).save(file)


def read(root, certain=False):
    plan = find_videos(root, list_folder(root)[0], certain=certain)
    assert plan is not None
    return read_videos(str(root), root, plan)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mpg"])
def test_any_frames_in_any_order_are_those_of_decoding_from_the_start(tmp_path, name):
    file = mpeg(tmp_path / name) if name == "a.mpg" else film(tmp_path / name, 40)
    clips = store(file)
    import av

    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert clips.count(0) == len(frames) == 40
    assert clips.timeline(0).counted == (name == "a.mpg")
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(clips.clip(0, indices=order), np.stack(frames)[order])
    assert all(np.array_equal(clips.clip(0, indices=[n])[0], frame) for n, frame in enumerate(frames))
    assert np.array_equal(np.asarray(clips.image(0)), frames[20])


def mpeg(file, frames=40):
    """An MPEG program, whose packets do not all have a stamp, with frames that refer forward."""
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg2video", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.max_b_frames = 64, 48, "yuv420p", 10, 2
        stream.codec_context.time_base, stream.time_base = Fraction(1, 10), Fraction(1, 1000)
        for number in range(frames):
            pixels = np.full((48, 64, 3), 20, np.uint8)
            pixels[:, :32] = STEP * number
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def test_times_of_a_variable_rate(tmp_path):
    stamps = [0, 100, 150, 1000, 1010, 2000]
    clips = store(film(tmp_path / "a.mkv", 6, stamps))
    assert np.allclose(clips.timeline(0).times, np.array(stamps) / 1000)
    assert shades(clips.clip(0, times=[0, 0.12, 0.15, 0.99, 1.0, 1.5, 2.0])) == [0, 1, 2, 2, 3, 4, 5]
    with pytest.raises(UsageError, match=r"shows nothing at 9 s; it lasts from 0 to 2\.\d+ s"):
        clips.clip(0, times=[9])
    with pytest.raises(UsageError, match="shows nothing at -1 s"):
        clips.clip(0, times=[-1])


def test_what_is_asked_must_be_there(tmp_path, monkeypatch):
    clips = store(film(tmp_path / "a.mp4"))
    for asked in ({}, {"indices": [0], "times": [0]}):
        with pytest.raises(UsageError, match="give indices, or times in seconds"):
            clips.clip(0, **asked)
    with pytest.raises(UsageError, match=r"a\.mp4 has no frame 20; it has 20, from 0"):
        clips.clip(0, indices=[3, 20])
    assert clips.clip(0, indices=[]).shape == (0, 48, 64, 3)
    monkeypatch.setenv("VERTEBRA_MAX_PIXELS", str(64 * 48 * 3))
    assert clips.clip(0, indices=[1, 2, 2]).shape == (3, 48, 64, 3)
    with pytest.raises(DataError, match=r"4 frames of 64 x 48 pixels are more than the 9216 pixels allowed"):
        clips.clip(0, indices=[1, 2, 3, 4])
    monkeypatch.setenv("VERTEBRA_MAX_PIXELS", "100")
    with pytest.raises(DataError, match=r"64 x 48 pixels are more than the 100 allowed"):
        clips.image(0)


def test_a_rotation_tag_is_applied(tmp_path):
    file = film(tmp_path / "a.mp4", 3)
    plain = store(file).clip(0, indices=[2])[0]
    data = bytearray(file.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version, times and ids, reserved, layer to volume
    data[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)  # a quarter clockwise
    (tmp_path / "b.mp4").write_bytes(data)
    turned = store(tmp_path / "b.mp4")
    assert np.array_equal(turned.clip(0, indices=[2])[0], np.rot90(plain, -1))
    assert turned.image(0).size == (48, 64)


def test_a_file_that_is_cut_off_keeps_what_is_there(tmp_path):
    whole = film(tmp_path / "whole.mp4", 40, movflags="faststart")
    cut = tmp_path / "cut.mp4"
    data = whole.read_bytes()
    start = data.index(b"mdat")
    cut.write_bytes(data[: start + (len(data) - start) // 2])
    _, plan = videos_file(cut)
    assert plan is not None
    dataset = read_videos(str(cut), tmp_path, plan)
    split = dataset.splits["all"]
    there = split.store.count(0)
    assert 5 < there < 35
    assert any(f"the video is cut off: {there} of 40 frames are there" in note for note in dataset.notes)
    good = split.store.clip(0, indices=range(there - 1))
    assert np.array_equal(good, store(whole).clip(0, indices=range(there - 1)))
    (finding,) = faults(split)
    assert (finding.kind, finding.where) == ("video-cut", "cut.mp4")


def test_a_broken_frame_shows_the_one_before_and_a_broken_stretch_is_an_error(tmp_path):
    file = film(tmp_path / "a.mp4", 20)
    import av

    with av.open(str(file)) as container:
        packets = [(p.pos, p.size, p.is_keyframe) for p in container.demux(video=0) if p.size]
    good = store(file).clip(0, indices=range(20))
    data = bytearray(file.read_bytes())
    keys = [number for number, packet in enumerate(packets) if packet[2]]
    one = bytearray(data)
    victim = next(number for number in range(3, 20) if not packets[number][2])
    position, size, _ = packets[victim]
    one[position : position + size] = bytes(size)
    (tmp_path / "one.mp4").write_bytes(one)
    seen = store(tmp_path / "one.mp4").clip(0, indices=[victim - 1, victim])
    assert np.array_equal(seen, good[[victim - 1, victim - 1]])
    for number in range(keys[2], keys[3]):  # a whole stretch from key frame to key frame
        position, size, _ = packets[number]
        data[position : position + size] = bytes(size)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    clips = store(broken)
    before = list(range(keys[2]))
    assert np.array_equal(clips.clip(0, indices=before), good[before])
    assert np.array_equal(clips.clip(0, indices=[keys[3]])[0], good[keys[3]])
    with pytest.raises(DataError, match=rf"frame {keys[2]} \(.* s\) does not decode; it is damaged there"):
        clips.clip(0, indices=[0, keys[2]])
    split = read(tmp_path).splits["all"]
    assert [(one.kind, one.where) for one in faults(split)] == [
        ("video-cut", "broken.mp4"),
        ("video-cut", "one.mp4"),
    ]


def test_files_that_are_no_videos(tmp_path):
    pytest.importorskip("av")
    film(tmp_path / "good.mp4", 3)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video " * 99)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (tmp_path / "net.mp4").write_text("#EXTM3U\n#EXTINF:10,\ngood.mp4\n#EXT-X-ENDLIST\n")
    reasons = {
        "empty": r"is empty \(0 bytes\)",
        "text": "cannot be opened",
        "list": "cannot be opened",
        "net": "cannot be",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=rf"{name}\.mp4: {reason}"):
            store(tmp_path / f"{name}.mp4").image(0)
    found = {one.where: one.kind for one in faults(read(tmp_path).splits["all"])}
    assert found == {f"{name}.mp4": "video" for name in reasons}
    with pytest.raises(DataError, match=r"gone\.mp4: there is no such file"):
        store(tmp_path / "gone.mp4").image(0)


def test_sound_means_nothing(tmp_path):
    with_sound = store(film(tmp_path / "a.mp4", 4, audio=True))
    without = store(film(tmp_path / "b.mp4", 4))
    assert np.array_equal(with_sound.clip(0, indices=[1, 3]), without.clip(0, indices=[1, 3]))


def test_without_pyav_the_extra_is_named_and_frames_do_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "films").mkdir()
    (tmp_path / "films/a.mp4").write_bytes(b"0")
    dataset = read(tmp_path / "films")
    with pytest.raises(UsageError, match=r"pip install 'vertebra\[video\]'"):
        dataset.splits["all"].image(0)
    draw(tmp_path / "frames/one/1.png", 7)
    assert np.asarray(read(tmp_path / "frames").splits["all"].image(0)).max() == 7


def test_folders_of_clips(tmp_path):
    for name in ("train/jump/a.mp4", "train/run/b.AVI", "test/jump/c.mp4", "test/run/deep/d.mkv"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "classes" / name).write_bytes(b"0")
    dataset = read(tmp_path / "classes")
    assert (dataset.layout, dataset.label, dataset.classes) == ("videos", "single", ("jump", "run"))
    assert list(dataset.splits["test"].names) == ["test/jump/c.mp4", "test/run/deep/d.mkv"]
    assert dataset.splits["test"].targets.tolist() == [0, 1]
    (tmp_path / "classes/loose.mp4").write_bytes(b"0")
    with pytest.raises(DataError, match=r"loose\.mp4 lies beside folders of clips"):
        read(tmp_path / "classes")
    for name in ("videos/a.mp4", "videos/b.mp4", "notes.txt"):
        (tmp_path / "flat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "flat" / name).write_bytes(b"0")
    dataset = read(tmp_path / "flat")
    assert (dataset.label, list(dataset.splits["all"].names)) == ("none", ["videos/a.mp4", "videos/b.mp4"])
    draw(tmp_path / "flat/cover.jpg")
    assert find_videos(tmp_path / "flat", list_folder(tmp_path / "flat")[0]) is None


def test_folders_of_frames(tmp_path):
    for clip, label in (("one", "jump"), ("two", "run")):
        for number in (1, 2, 10):
            draw(tmp_path / f"data/train/{label}/{clip}/frame_{number}.png", number)
    dataset = read(tmp_path / "data")
    split = dataset.splits["train"]
    assert (dataset.classes, list(split.names)) == (("jump", "run"), ["train/jump/one", "train/run/two"])
    assert split.targets.tolist() == [0, 1]
    assert [file.name for file in split.store.files(0)] == ["frame_1.png", "frame_2.png", "frame_10.png"]
    assert np.asarray(split.image(1)).max() == 2  # the middle one
    assert split.store.clip(1, indices=[2, 0]).max((1, 2, 3)).tolist() == [10, 1]
    with pytest.raises(UsageError, match="is a folder of frames, which have no times; ask for indices"):
        split.store.clip(0, times=[0.5])
    assert "train/jump/one/: 7 frames are missing in the numbering, such as 3" in dataset.notes
    draw(tmp_path / "data/train/run/two/frame_10.png", 1, (9, 9))
    with pytest.raises(DataError, match=r"frame_10\.png is 9 x 9 pixels, and frame_1\.png 4 x 2"):
        split.store.clip(1, indices=[0, 2])


def test_numbered_images_are_clips_only_where_somebody_says_so(tmp_path):
    for name in ("cat/0001.png", "cat/0002.png", "dog/0001.png"):
        draw(tmp_path / name)
    assert find_videos(tmp_path, list_folder(tmp_path)[0]) is None
    assert list(read(tmp_path, certain=True).splits["all"].names) == ["cat", "dog"]
    for number in range(3):
        draw(tmp_path / f"frames/{number}.png", number)
    dataset = read(tmp_path / "frames")
    assert list(dataset.splits["all"].names) == ["frames"]
    assert np.asarray(dataset.splits["all"].image(0)).max() == 1


def test_holes_in_the_numbering():
    assert holes(["f1", "f2", "f5"]) == [3, 4]
    assert holes(["f0", "f5", "f10"]) == []
    assert holes(["f0", "f5", "f15"]) == [10]
    assert holes(["only"]) == []


def test_written_and_read_again_it_is_the_same(tmp_path):
    for name in ("train/jump/a.mp4", "train/run/b.mp4", "val/run/c.mp4"):
        film(tmp_path / "one" / name, 3 + len(name) % 3)
    first = read(tmp_path / "one")
    write_videos(first, tmp_path / "two")
    second = read(tmp_path / "two")
    assert second.fingerprint == first.fingerprint
    assert list(second.splits["train"].names) == list(first.splits["train"].names)
    copy = pickle.loads(pickle.dumps(second.splits["train"].select([1])))
    assert copy.image(0).tobytes() == first.splits["train"].image(1).tobytes()
    for clip in ("x", "y"):
        for number in range(3):
            draw(tmp_path / f"three/frames/{clip}/{number}.png", number)
    frames = read(tmp_path / "three")
    write_videos(frames, tmp_path / "four")
    again = read(tmp_path / "four")
    assert again.fingerprint == frames.fingerprint
    assert list(again.splits["all"].names) == ["frames/x", "frames/y"]


@pytest.mark.data
def test_a_real_video():
    pytest.importorskip("av")
    if not (file := shared / "video/armwrestling.mp4").exists():
        pytest.skip(f"{file} is not here")
    _, plan = videos_file(file)
    assert plan is not None
    dataset = read_videos(str(file), file.parent, plan)
    assert dataset.notes == ()
    clips = dataset.splits["all"].store
    line = clips.timeline(0)
    assert (clips.count(0), line.height, line.width) == (280, 256, 340)
    assert np.allclose(line.times, np.arange(280) / 28)
    assert np.array_equal(clips.clip(0, times=[5.0]), clips.clip(0, indices=[140]))
    assert dataset.splits["all"].image(0).size == (340, 256)
    assert not list(faults(dataset.splits["all"]))


@pytest.mark.data
def test_real_frames(tmp_path):
    import zipfile

    if not (archive := shared / "video/video-seg-5.zip").exists():
        pytest.skip(f"{archive} is not here")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    split = read(tmp_path / "video-seg-5/frames").splits["all"]
    assert split.store.clip(0, indices=range(5)).shape == (5, 563, 1000, 3)
