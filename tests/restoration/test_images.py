"""Picture files: every value read back is the value written, and every unusable file is refused with a reason."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from smcdiff.restoration.images import Crop, ImageFileError, read_image, read_mask, write_png


def save_png16(path, values):
    """A 16-bit PNG, grey or RGB, written by hand: Pillow writes no 16-bit colour."""
    colour = {2: 0, 3: 2}[values.ndim]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_grey_values_are_read_exactly(tmp_path, rng, suffix, dtype, white):
    values = rng.integers(0, white + 1, (5, 7), dtype=dtype)
    values[0, :2] = 0, white
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.dtype == torch.float32
    expected = torch.from_numpy((2 * values.astype(np.float64) / white - 1).astype(np.float32))[None]
    assert torch.equal(image, expected)
    assert image[0, 0, 0] == -1 and image[0, 0, 1] == 1


def test_a_sixteen_bit_png_of_another_writer(tmp_path, rng):
    values = rng.integers(0, 65536, (4, 3), dtype=np.uint16)
    save_png16(tmp_path / "a.png", values)
    expected = torch.from_numpy(2 * values.astype(np.float64) / 65535 - 1).float()
    assert torch.equal(read_image(tmp_path / "a.png")[0], expected)


def test_floating_point_and_a_white_of_ones_own(tmp_path, rng):
    values = rng.random((4, 6)).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    torch.testing.assert_close(read_image(tmp_path / "a.tif")[0], torch.from_numpy(2 * values - 1))
    twelve_bit = np.array([[0, 4095, 2047]], dtype=np.uint16)
    Image.fromarray(twelve_bit).save(tmp_path / "b.png")
    expected = torch.tensor([[-1.0, 1.0, 2 * 2047 / 4095 - 1]])
    torch.testing.assert_close(read_image(tmp_path / "b.png", white=4095)[0], expected)
    Image.fromarray(np.array([[0, 100_000]], dtype=np.int32)).save(tmp_path / "c.tif")
    assert read_image(tmp_path / "c.tif", white=200_000).tolist() == [[[-1.0, 0.0]]]
    with pytest.raises(ImageFileError, match="32-bit integers; say which value"):
        read_image(tmp_path / "c.tif")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_becomes_luma(tmp_path, rng, mode):
    colours = rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)
    if mode == "P":
        colours = np.where(colours > 128, 255, 0).astype(np.uint8)  # eight colours: a palette holds them exactly
    picture = Image.fromarray(colours)
    picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
    if mode == "RGBA":
        picture.putalpha(7)  # transparency says nothing about grey values
    picture.save(tmp_path / "a.png")
    luma = colours.astype(np.float64) @ [0.299, 0.587, 0.114]
    torch.testing.assert_close(read_image(tmp_path / "a.png")[0], torch.from_numpy(2 * luma / 255 - 1).float())


def test_sixteen_bit_colour_keeps_eight_bits(tmp_path, rng):
    colours = rng.integers(0, 65536, (3, 5, 3), dtype=np.uint16)
    save_png16(tmp_path / "a.png", colours)
    luma = torch.from_numpy((colours / 65535) @ [0.299, 0.587, 0.114])
    torch.testing.assert_close(read_image(tmp_path / "a.png")[0].double(), 2 * luma - 1, atol=2 / 255, rtol=0)


def test_crop(tmp_path):
    values = np.arange(30, dtype=np.uint8).reshape(5, 6)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", Crop(top=1, left=2, height=3, width=2))
    assert ((image[0] + 1) * 127.5).round().tolist() == [[8, 9], [14, 15], [20, 21]]
    with pytest.raises(ValueError, match="of a picture of 5 rows and 6 columns"):
        read_image(tmp_path / "a.png", Crop(3, 0, 3, 2))
    with pytest.raises(ValueError, match="at least 1"):
        Crop(0, 0, 0, 2)


def test_a_mask_is_bright_where_measured(tmp_path):
    Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[[0.0, 0.0, 1.0, 1.0]]]
    Image.fromarray(np.full((2, 2), 255, dtype=np.uint8)).save(tmp_path / "n.png")
    with pytest.raises(ImageFileError, match="every pixel is measured"):
        read_mask(tmp_path / "n.png")


def test_written_and_read_back(tmp_path):
    image = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(1, 16, 16)
    write_png(tmp_path / "a.png", image)
    torch.testing.assert_close(read_image(tmp_path / "a.png").double(), image, atol=1e-6, rtol=0)
    write_png(tmp_path / "b.png", torch.tensor([[-5.0, 0.0, 1.0, 2.0, 9.0]]), low=0.0, high=2.0)
    assert np.asarray(Image.open(tmp_path / "b.png")).tolist() == [[0, 0, 128, 255, 255]]
    with pytest.raises(ValueError, match="expected \\(1, rows, columns\\)"):
        write_png(tmp_path / "c.png", torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="finite"):
        write_png(tmp_path / "c.png", torch.tensor([[float("nan")]]))


def test_unusable_files_are_refused_with_the_reason(tmp_path, rng):
    values = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    (tmp_path / "text.png").write_text("not a picture")
    frames = [Image.fromarray(values), Image.fromarray(values)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    bad = values.astype(np.float32) / 255
    bad[3, 4] = np.nan
    Image.fromarray(bad).save(tmp_path / "nan.tif")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "range.tif")
    expected = {
        "none.png": "there is no file",
        "cut.png": "cannot be read.*damaged",
        "text.png": "no picture that Pillow can read",
        ".": "is a folder",
        "stack.tif": "holds 2 pictures",
        "nan.tif": "NaN or infinite",
        "range.tif": "expected 0 to 1",
    }
    for name, reason in expected.items():
        with pytest.raises(ImageFileError, match=reason):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="greater than 0"):
        read_image(tmp_path / "whole.png", white=0)
