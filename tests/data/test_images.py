import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from vertebra.data.images import MAX_PIXELS, decode
from vertebra.errors import DataError, UsageError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image, kind="PNG", **options):
    return decode(encoded(image, kind, **options), name="x")


def noise(height=40, width=60, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def claiming(width, height):
    """A PNG whose header claims a size that its few bytes do not hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_keep_their_pixels(kind):
    pixels = noise()
    image = decoded(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_grey_stays_grey():
    pixels = noise(channels=1)
    image = decoded(Image.fromarray(pixels))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation, kind):
    upright = noise(4, 6)
    back = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decoded(Image.fromarray(np.ascontiguousarray(back)), kind, exif=exif, **options)
    np.testing.assert_array_equal(np.asarray(image), upright)
    assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_counts_as_none():
    data = encoded(Image.fromarray(noise()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    assert decode(data, name="x").size == (60, 40)


def test_sixteen_bit_grey_is_rescaled_by_its_range():
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        image = decoded(Image.fromarray(values), kind)
        assert image.mode == "L"
        assert np.asarray(image).tolist() == [[0, 1, 128, 255]]


def test_integers_and_floats_are_scaled_or_refused():
    assert np.asarray(decoded(Image.fromarray(np.array([[0, 65535]], np.int32)), "TIFF")).tolist() == [[0, 255]]
    assert np.asarray(decoded(Image.fromarray(np.array([[0, 0.2, 1]], np.float32)), "TIFF")).tolist() == [[0, 51, 255]]
    for values in (np.array([[-1, 9]], np.int32), np.array([[0, 65536]], np.int32)):
        with pytest.raises(DataError, match=r"x: values from .* where 0 to 65535 is expected"):
            decoded(Image.fromarray(values), "TIFF")
    for values in ([[0, 7]], [[0, np.nan]]):
        with pytest.raises(DataError, match=r"0 to 1 is expected"):
            decoded(Image.fromarray(np.array(values, np.float32)), "TIFF")


def test_colour_models_become_rgb():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    cmyk = decoded(red.convert("CMYK"), "TIFF")
    palette = decoded(red.convert("P"), "PNG")
    for image in (cmyk, palette):
        assert (image.mode, image.getpixel((3, 3))) == ("RGB", (255, 0, 0))
    assert np.asarray(decoded(Image.new("1", (2, 2), 1))).tolist() == [[255, 255], [255, 255]]


def test_cmyk_jpeg_keeps_its_colour():
    red, green, blue = decoded(Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK"), "JPEG").getpixel((3, 3))
    assert red > 240 and green < 15 and blue < 15


def test_alpha_is_composited_on_white():
    assert decoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    half = decoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128))).getpixel((0, 0))
    assert half == (255, 127, 127)
    grey = decoded(Image.new("LA", (2, 2), (0, 0)))
    assert (grey.mode, grey.getpixel((0, 0))) == ("L", 255)
    hidden = decode(encoded(Image.new("P", (2, 2), 0), "PNG", transparency=0), name="x")
    assert hidden.getpixel((0, 0)) == (255, 255, 255)
    key = decode(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), name="x")
    assert key.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(kind):
    first, second = Image.new("RGB", (8, 8), "black"), Image.new("RGB", (8, 8), "white")
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decoded(first, kind, save_all=True, append_images=[second], **options)
    assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_images_are_errors(kind):
    data = encoded(Image.fromarray(noise(200, 200)), kind)
    with pytest.raises(DataError, match=r"cut: .*damaged: copy or download it again"):
        decode(data[: len(data) // 2], name="cut")


def test_what_is_no_image(tmp_path):
    cases = {
        b"": r"is empty \(0 bytes\)",
        b"<html>404 Not Found</html>": "is text, not an image",
        b"%PDF-1.7\0": "is a PDF file",
        b"%!PS-Adobe-3.0 EPSF-3.0\n": "is a EPS file",
        b"\0\0\0\x18ftypheic\0\0": "is a HEIC file",
        b"\x80\x81\x82": "is no image that is read",
    }
    for number, (content, message) in enumerate(cases.items()):
        file = tmp_path / f"{number}.jpg"
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{number}.jpg: {message}"):
            decode(file, name=file.name)
    with pytest.raises(DataError, match=r"gone.jpg: cannot be opened: No such file"):
        decode(tmp_path / "gone.jpg", name="gone.jpg")


def test_the_suffix_does_not_matter(tmp_path):
    file = tmp_path / "really_png.jpg"
    file.write_bytes(encoded(Image.fromarray(noise())))
    np.testing.assert_array_equal(np.asarray(decode(file, name="x")), noise())


def test_a_bomb_is_refused_from_its_header(monkeypatch):
    def never(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    with pytest.raises(DataError, match=f"bomb: 60000 x 60000 pixels are more than the {MAX_PIXELS} allowed"):
        decode(claiming(60000, 60000), name="bomb")


def test_the_limit_can_be_set(monkeypatch):
    data = encoded(Image.fromarray(noise(40, 60)))
    assert decode(data, name="x", max_pixels=2400).size == (60, 40)
    with pytest.raises(DataError, match=r"60 x 40 pixels are more than the 2399 allowed"):
        decode(data, name="x", max_pixels=2399)
    monkeypatch.setenv("VERTEBRA_MAX_PIXELS", "100")
    with pytest.raises(DataError, match=r"raise VERTEBRA_MAX_PIXELS"):
        decode(data, name="x")
    monkeypatch.setenv("VERTEBRA_MAX_PIXELS", "lots")
    with pytest.raises(UsageError, match=r"VERTEBRA_MAX_PIXELS is 'lots'"):
        decode(data, name="x")


def test_large_images_below_the_limit_raise_no_warning():
    """Pillow warns from 89,478,486 pixels on; warnings are errors here."""
    image = decode(encoded(Image.new("1", (9500, 9500))), name="x")
    assert image.size == (9500, 9500)


def test_pillow_keeps_its_settings():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    decoded(Image.fromarray(noise()))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize(
    ("least", "size"), [((224, 224), (500, 375)), ((376, 100), (1000, 750)), ((9, 4001), (4000, 3000))]
)
def test_jpeg_is_decoded_no_larger_than_needed(least, size):
    data = encoded(Image.new("RGB", (4000, 3000), "gray"), "JPEG")
    assert decode(data, name="x", least=least).size == size
    assert decode(data, name="x").size == (4000, 3000)


def test_least_counts_sides_as_seen():
    """The image is stored lying (800 x 400) and seen standing: 400 pixels wide, 800 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (800, 400)), "JPEG", exif=exif)
    assert decode(data, name="x", least=(800, 100)).size == (400, 800)
    assert decode(data, name="x", least=(400, 200)).size == (200, 400)


def test_decoding_in_threads_gives_the_same():
    data = encoded(Image.fromarray(noise(120, 160)), "JPEG")
    alone = np.asarray(decode(data, name="x"))
    with ThreadPoolExecutor(8) as pool:
        for image in pool.map(lambda _: decode(data, name="x", least=None), range(64)):
            np.testing.assert_array_equal(np.asarray(image), alone)
