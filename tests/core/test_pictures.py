"""Pictures of every mode, read as their owner sees them; damaged ones refused in one line."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from wanlab.core.errors import WanlabError
from wanlab.core.pictures import BACKGROUND, converted, read_picture

RAMP = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(6, 8)


def pixels(path):
    picture, note = read_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture), note


@pytest.mark.parametrize(
    ("name", "values", "note"),
    [
        ("a.png", RAMP.astype(np.uint16) * 257, ""),
        ("a.tif", RAMP.astype(np.uint16) * 257, ""),
        ("a.tif", (RAMP / 255).astype(np.float32), ""),
        ("a.tif", RAMP.astype(np.float32), "has float values, taken as 0 to 255"),
        ("a.tif", RAMP.astype(np.float32) * 257, "has float values, taken as 0 to 65535"),
        ("a.tif", RAMP.astype(np.int32) * 257, ""),
    ],
)
def test_16_bit_and_float_pictures_are_scaled_to_8_bits(tmp_path, name, values, note):
    Image.fromarray(values).save(tmp_path / name)
    shown, said = pixels(tmp_path / name)
    assert said == note
    assert np.array_equal(shown, np.stack([RAMP] * 3, -1))


@pytest.mark.parametrize("top", [3.0, 1e6, np.nan, np.inf])
def test_float_pictures_on_no_known_scale_are_refused(tmp_path, top):
    Image.fromarray(np.array([[0, top]], np.float32)).save(tmp_path / "hdr.tif")
    with pytest.raises(WanlabError, match=r"hdr\.tif has (float )?values"):
        read_picture(tmp_path / "hdr.tif")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparent_pictures_are_laid_over_white_and_said(tmp_path, kind):
    layers = np.zeros((4, 6, 4), np.uint8)
    layers[:, :2] = (80, 80, 80, 255)
    layers[:, 2:4] = (80, 80, 80, 0 if kind == "P" else 51)
    layers[:, 4:] = (200, 200, 200, 0)  # a hidden colour
    Image.fromarray(layers).convert(kind).save(tmp_path / "a.png")
    shown, note = pixels(tmp_path / "a.png")
    assert BACKGROUND == (255, 255, 255)
    assert "transparent in places, which is laid over white" in note
    assert (shown[:, :2] == 80).all()
    assert (shown[:, 4:] == 255).all()
    assert (shown[:, 2:4] == (255 if kind == "P" else 220)).all()  # 0.2 * 80 + 0.8 * 255
    Image.fromarray(np.full((2, 2, 4), 255, np.uint8)).save(tmp_path / "opaque.png")
    assert read_picture(tmp_path / "opaque.png")[1] == ""


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    picture = Image.new("RGB", (4, 4), (255, 255, 255))
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(picture, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    else:
        picture = picture.convert(mode)
    shown, note = converted(picture, "it")
    assert (shown.mode, note) == ("RGB", "")
    assert np.asarray(shown).min() >= 253


def test_the_orientation_of_a_photograph_is_applied(tmp_path):
    values = np.zeros((8, 16, 3), np.uint8)
    values[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    shown, _ = pixels(tmp_path / "a.png")
    assert shown.shape == (16, 8, 3)
    assert (shown[:8].min(), shown[8:].max()) == (255, 0)


def test_a_colour_profile_is_converted_to_srgb(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    picture = Image.fromarray(np.full((2, 2, 3), (10, 100, 200), np.uint8))
    picture.save(tmp_path / "srgb.png", icc_profile=srgb.tobytes())
    assert (pixels(tmp_path / "srgb.png")[0] == (10, 100, 200)).all()
    # sRGB with red and green exchanged: swap the two tags' names in the profile.
    data = srgb.tobytes().replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    data = data.replace("sRGB".encode("utf-16-be"), "othr".encode("utf-16-be")).replace(b"sRGB", b"othr")
    picture.save(tmp_path / "other.png", icc_profile=data)
    shown = pixels(tmp_path / "other.png")[0][0, 0].astype(int)
    assert np.abs(shown - (100, 10, 200)).max() <= 2
    picture.save(tmp_path / "bad.png", icc_profile=b"no profile")
    assert (pixels(tmp_path / "bad.png")[0] == (10, 100, 200)).all()


def linear(space):
    """A profile of linear values, in the colours of sRGB or in grey, with "sRGB" in its name."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    count = int.from_bytes(srgb[128:132], "big")
    rows = [srgb[132 + 12 * i : 144 + 12 * i] for i in range(count)]
    tags = {
        row[:4]: srgb[int.from_bytes(row[4:8], "big") :][: int.from_bytes(row[8:12], "big")] for row in rows
    }
    curve = b"curv" + bytes(8)  # no entries: the identity
    if space == b"RGB ":
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    else:
        tags = {name: tags[name] for name in (b"desc", b"cprt", b"wtpt")} | {b"kTRC": curve}
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + (start + len(data)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        data += content + bytes(-len(content) % 4)
    whole = srgb[4:16] + space + srgb[20:128] + len(tags).to_bytes(4, "big") + table + data
    return (len(whole) + 4).to_bytes(4, "big") + whole


ENCODED = np.where(
    RAMP / 255 <= 0.0031308, RAMP / 255 * 12.92, 1.055 * (RAMP / 255) ** (1 / 2.4) - 0.055
) * 255  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16"])
def test_linear_values_become_srgb_also_where_the_profile_is_named_srgb(tmp_path, mode):
    picture = (
        Image.fromarray(RAMP.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(RAMP).convert(mode)
    )
    picture.save(tmp_path / "a.png", icc_profile=linear(b"RGB " if mode.startswith("RGB") else b"GRAY"))
    shown, _ = pixels(tmp_path / "a.png")
    assert np.abs(shown - ENCODED[..., None]).max() <= 3


def test_a_tiff_of_16_bits_whose_white_is_0_is_no_negative(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "a.tif", tiffinfo={262: 0})
    data = bytearray((tmp_path / "a.tif").read_bytes())
    entry = data.index((262).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    data[entry + 8 : entry + 10] = bytes(2)
    (tmp_path / "a.tif").write_bytes(data)
    assert np.array_equal(pixels(tmp_path / "a.tif")[0][..., 0], 255 - RAMP)


def test_a_grey_level_that_is_transparent_is_laid_over_white(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    clear = b"tRNS" + (int(RAMP[2, 3]) * 257).to_bytes(2, "big")
    at = data.index(b"IDAT") - 4
    chunk = (2).to_bytes(4, "big") + clear + zlib.crc32(clear).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data[:at] + chunk + data[at:])
    shown, note = pixels(tmp_path / "a.png")
    assert shown[2, 3].tolist() == [255] * 3
    assert shown[2, 4, 0] == RAMP[2, 4]
    assert "over white" in note


def test_of_several_pictures_the_first_is_read_and_said(tmp_path):
    first, *rest = (Image.fromarray(np.full((6, 8), step, np.uint8)) for step in (0, 90, 200))
    for name in ("a.gif", "a.webp", "a.tif"):
        first.save(tmp_path / name, save_all=True, append_images=rest)
        assert pixels(tmp_path / name)[1] == "has 3 pictures, of which the first is read"


def bomb(width, height):
    """A PNG of a few bytes that states a huge size."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(10)))
        + chunk(b"IEND", b"")
    )


def test_what_is_no_picture_is_refused_in_one_line(tmp_path, monkeypatch):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "PNG")
    data = whole.getvalue()
    cases = {
        "text.png": (b"a photograph", r"text\.png cannot be read as an image; give"),
        "empty.png": (b"", r"empty\.png is empty and cannot be read as an image"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "is a HEIC picture and cannot be read"),
        "page.png": (b"<!DOCTYPE html><html>", "is an HTML page in place of the file"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "half.png": (data[: len(data) // 2], "cannot be read as an image"),
        "damaged.png": (data[:2000] + bytes(4000) + data[6000:], "cannot be read as an image"),
        "bomb.png": (bomb(60_000, 60_000), "3,600,000,000 is over the limit"),
        "large.png": (bomb(18_000, 18_000), "324,000,000 is over the limit"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WanlabError, match=message) as error:
            read_picture(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(WanlabError, match="not a file"):
        read_picture(tmp_path)
    (tmp_path / "whole.png").write_bytes(data)
    monkeypatch.setenv("WANLAB_LIMITS", "picture_pixels=1000")
    with pytest.raises(WanlabError, match="picture_pixels="):
        read_picture(tmp_path / "whole.png")
    monkeypatch.setenv("WANLAB_LIMITS", "picture_pixels=5000")
    assert read_picture(tmp_path / "whole.png")[0].size == (64, 64)
