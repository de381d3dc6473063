"""Photos as users have them: turned, transparent, grey, CMYK, 16-bit, huge, tiny, broken, missing."""

import hashlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ibkit.data.photos import PhotoWarning, load_photo, load_subject_photos
from ibkit.errors import PhotoError

DREAMBENCH = Path(__file__).resolve().parents[2] / "shared" / "dreambench" / "dataset"
SIZE = 32


def halves(width=80, height=64, left=(255, 0, 0), right=(0, 0, 255)):
    """A picture whose left half and right half have different colours."""
    picture = Image.new("RGB", (width, height), right)
    picture.paste(left, (0, 0, width // 2, height))
    return picture


def load(path):
    """Load one photo, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_photo(path, SIZE)


def colour(image, x, y):
    return image.getpixel((int(x * (SIZE - 1)), int(y * (SIZE - 1))))


def near(a, b, tolerance=3):
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tolerance


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_16_bit(path, values, colour_type):
    """Write a 16-bit PNG by hand; Pillow cannot write every kind. values: (H, W, channels) of uint16."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))


# --- a folder ------------------------------------------------------------------------------------------------------


def test_folder_is_read_in_the_order_of_names_and_other_files_are_left_out(tmp_path):
    for name, grey in (("b.png", 20), ("a.JPG", 10), ("c.webp", 30)):
        Image.new("RGB", (64, 64), (grey, grey, grey)).save(tmp_path / name, "PNG" if name != "a.JPG" else "JPEG")
    (tmp_path / "notes.txt").write_text("my cat")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "._a.JPG").write_bytes(b"\0")  # what macOS leaves on USB sticks
    (tmp_path / "more.jpg").mkdir()
    photos = load_subject_photos(tmp_path, SIZE)
    assert [photo.name for photo in photos] == ["a.JPG", "b.png", "c.webp"]
    assert all(photo.image.mode == "RGB" and photo.image.size == (SIZE, SIZE) for photo in photos)
    assert photos[1].sha256 == hashlib.sha256((tmp_path / "b.png").read_bytes()).hexdigest()
    assert photos[1].original_size == (64, 64)
    again = load_subject_photos(tmp_path, SIZE)
    assert [a.image.tobytes() for a in photos] == [b.image.tobytes() for b in again]


def test_missing_folder_empty_folder_and_a_file_in_its_place(tmp_path):
    with pytest.raises(PhotoError, match="does not exist"):
        load_subject_photos(tmp_path / "nowhere", SIZE)
    with pytest.raises(PhotoError, match=r"holds no photo \(nothing found\)"):
        load_subject_photos(tmp_path, SIZE)
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(PhotoError, match=r"holds no photo \(only readme.txt found\)"):
        load_subject_photos(tmp_path, SIZE)
    with pytest.raises(PhotoError, match="is a file, not a folder"):
        load_subject_photos(tmp_path / "readme.txt", SIZE)


def test_one_photo_is_accepted_with_a_warning(tmp_path):
    halves().save(tmp_path / "only.png")
    with pytest.warns(PhotoWarning, match="one photo only"):
        assert len(load_subject_photos(tmp_path, SIZE)) == 1


def test_the_same_picture_twice_is_a_warning_even_in_another_format(tmp_path):
    halves().save(tmp_path / "a.png")
    halves().save(tmp_path / "b.bmp")
    halves(left=(0, 255, 0)).save(tmp_path / "c.png")
    with pytest.warns(PhotoWarning, match="b.bmp shows the same picture as a.png") as caught:
        assert len(load_subject_photos(tmp_path, SIZE)) == 3
    assert len(caught) == 1


def test_one_bad_photo_stops_the_whole_folder_and_is_named(tmp_path):
    halves().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("<html>not found</html>")
    with pytest.raises(PhotoError, match=r"b\.png is not a picture"):
        load_subject_photos(tmp_path, SIZE)


# --- geometry ------------------------------------------------------------------------------------------------------

# Where the red left half of the stored picture ends up once the viewer has applied the flag.
RED_SIDE = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    halves(640, 480).save(path, exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    photo = load(path)
    points = {"left": (0.1, 0.5), "right": (0.9, 0.5), "top": (0.5, 0.1), "bottom": (0.5, 0.9)}
    red = {side for side, point in points.items() if near(colour(photo.image, *point), (255, 0, 0), 12)}
    assert red == {RED_SIDE[orientation]}
    assert photo.original_size == ((640, 480) if orientation <= 4 else (480, 640))


def test_shorter_side_is_fitted_and_the_centre_kept(tmp_path):
    # Three equal squares side by side: only the middle one, green, may survive.
    wide = Image.new("RGB", (192, 64), (255, 0, 0))
    wide.paste((0, 255, 0), (64, 0, 128, 64))
    wide.save(tmp_path / "wide.png")
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        centre = np.asarray(load(tmp_path / name).image)[3:-3, 3:-3]  # the filter reaches 3 px far
        assert (centre == (0, 255, 0)).all()


def test_reduction_is_antialiased(tmp_path):
    # A one-pixel chessboard must become even grey, not a moiré pattern of black and white.
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    inner = np.asarray(load(tmp_path / "board.png").image)[1:-1, 1:-1]
    assert abs(inner.astype(int) - 127).max() <= 3


# --- colour --------------------------------------------------------------------------------------------------------


def test_transparency_goes_on_white(tmp_path):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # transparent black: black if the alpha is merely dropped
    picture.paste((255, 0, 0, 128), (0, 0, 32, 64))
    picture.save(tmp_path / "alpha.png")
    image = load(tmp_path / "alpha.png").image
    assert colour(image, 0.9, 0.5) == (255, 255, 255)
    assert near(colour(image, 0.1, 0.5), (255, 127, 127))


def test_grey_with_alpha_and_one_bit(tmp_path):
    Image.new("LA", (64, 64), (0, 0)).save(tmp_path / "la.png")
    assert colour(load(tmp_path / "la.png").image, 0.5, 0.5) == (255, 255, 255)
    Image.new("1", (64, 64), 1).save(tmp_path / "one.png")
    assert colour(load(tmp_path / "one.png").image, 0.5, 0.5) == (255, 255, 255)
    Image.new("L", (64, 64), 77).save(tmp_path / "grey.jpg", quality=100)
    assert near(colour(load(tmp_path / "grey.jpg").image, 0.5, 0.5), (77, 77, 77))


def test_palette_with_and_without_transparency(tmp_path):
    palette = halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    palette.save(tmp_path / "plain.gif")
    image = load(tmp_path / "plain.gif").image
    assert near(colour(image, 0.1, 0.5), (255, 0, 0)) and near(colour(image, 0.9, 0.5), (0, 0, 255))
    palette.save(tmp_path / "clear.png", transparency=palette.getpixel((0, 0)))
    image = load(tmp_path / "clear.png").image
    assert colour(image, 0.1, 0.5) == (255, 255, 255) and near(colour(image, 0.9, 0.5), (0, 0, 255))


def test_animated_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert near(colour(load(tmp_path / "moving.gif").image, 0.5, 0.5), (255, 0, 0))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / f"red.{suffix}")
    image = load(tmp_path / f"red.{suffix}").image
    assert near(colour(image, 0.5, 0.5), (255, 0, 0), 6)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "ramp.png")
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "ramp.tif")
    for name in ("ramp.png", "ramp.tif"):
        row = np.asarray(load(tmp_path / name).image)[SIZE // 2, :, 0].astype(int)
        assert np.abs(row - np.linspace(0, 255, SIZE)).max() < 6


def test_16_bit_rgb_and_grey_with_alpha(tmp_path):
    rgb = np.broadcast_to(np.array([65535, 32768, 0], dtype=np.uint16), (64, 64, 3))
    png_16_bit(tmp_path / "rgb.png", rgb, colour_type=2)
    assert near(colour(load(tmp_path / "rgb.png").image, 0.5, 0.5), (255, 128, 0), 1)
    half = np.broadcast_to(np.array([0, 32768], dtype=np.uint16), (64, 64, 2))
    png_16_bit(tmp_path / "la.png", half, colour_type=4)
    assert near(colour(load(tmp_path / "la.png").image, 0.5, 0.5), (127, 127, 127), 1)


def test_pixels_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.full((64, 64), 1_000_000, dtype=np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(PhotoError, match=r"deep\.tif has 32-bit pixels"):
        load(tmp_path / "deep.tif")
    Image.fromarray(np.full((64, 64), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(PhotoError, match=r"float\.tif has floating-point pixels"):
        load(tmp_path / "float.tif")


def test_colour_profile_is_converted_to_srgb(tmp_path):
    # A profile that is not sRGB must change the numbers; sRGB's own must not.
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.new("RGB", (64, 64), (200, 100, 50))
    picture.save(tmp_path / "srgb.png", icc_profile=srgb)
    assert near(colour(load(tmp_path / "srgb.png").image, 0.5, 0.5), (200, 100, 50), 1)
    # A profile of another kind of colour than the pixels cannot be meant: it is ignored.
    picture.save(tmp_path / "lab.png", icc_profile=lab)
    assert colour(load(tmp_path / "lab.png").image, 0.5, 0.5) == (200, 100, 50)
    # Swapping the red and blue primaries inside the profile gives a profile that swaps the colours.
    swapped = srgb.replace(b"rXYZ", b"tmp ").replace(b"bXYZ", b"rXYZ").replace(b"tmp ", b"bXYZ")
    picture.save(tmp_path / "swapped.png", icc_profile=swapped)
    assert near(colour(load(tmp_path / "swapped.png").image, 0.5, 0.5), (50, 100, 200), 12)
    picture.save(tmp_path / "broken.png", icc_profile=b"not a profile")
    with pytest.warns(PhotoWarning, match="damaged colour profile"):
        assert colour(load_photo(tmp_path / "broken.png", SIZE).image, 0.5, 0.5) == (200, 100, 50)


# --- size ----------------------------------------------------------------------------------------------------------


def test_tiny_photos_are_refused_and_small_ones_enlarged_with_a_warning(tmp_path):
    halves(100, 7).save(tmp_path / "tiny.png")
    with pytest.raises(PhotoError, match=r"tiny\.png is too small \(100 × 7 px\).* at least 8 px"):
        load(tmp_path / "tiny.png")
    halves(40, 8).save(tmp_path / "small.png")
    with pytest.warns(PhotoWarning, match="small.png has only 40 × 8 px and was enlarged"):
        assert load_photo(tmp_path / "small.png", SIZE).image.size == (SIZE, SIZE)


def test_a_large_jpeg_is_decoded_at_reduced_size(tmp_path, monkeypatch):
    halves(6000, 4000).save(tmp_path / "phone.jpg")
    decoded = []
    original = Image.Image.resize
    spy = lambda self, *args, **options: decoded.append(self.size) or original(self, *args, **options)  # noqa: E731
    monkeypatch.setattr(Image.Image, "resize", spy)
    photo = load(tmp_path / "phone.jpg")
    assert decoded == [(750, 500)]  # one eighth, still more than four times the target
    assert photo.original_size == (6000, 4000)
    assert near(colour(photo.image, 0.1, 0.5), (255, 0, 0), 6)


def test_pictures_beyond_the_decompression_limit_are_refused_in_words(tmp_path):
    # 20000 × 20000 grey pixels of zeros: a file of a few hundred kB, 400 MB decoded.
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    chunks = (b"IHDR", header), (b"IDAT", body), (b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    with pytest.raises(PhotoError, match=r"bomb\.png is too large to decode safely"):
        load(tmp_path / "bomb.png")
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", body), (b"IEND", b"")
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    with pytest.raises(PhotoError, match="10000 × 10000 px.*smaller copy"):
        load(tmp_path / "large.png")


def test_a_jpeg_between_the_limits_is_read(tmp_path):
    # 100 megapixels: Pillow alone would warn of a decompression bomb; reduced decoding makes it cheap.
    Image.new("L", (10_000, 10_000), 90).save(tmp_path / "hundred.jpg")
    assert near(colour(load(tmp_path / "hundred.jpg").image, 0.5, 0.5), (90, 90, 90))


# --- broken files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_truncated_files_are_refused_and_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(PhotoError, match=rf"cut\.{suffix} (is damaged|is not a picture|cannot be read)"):
        load(path)


def test_what_is_no_picture_is_refused_and_named(tmp_path):
    (tmp_path / "page.jpg").write_text("<!doctype html>")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n")
    for name, message in (
        ("page.jpg", "is not a picture"),
        ("empty.png", r"is empty \(0 bytes\)"),
        ("phone.heic", "HEIC"),
        ("script.jpg", "is not a picture"),
        ("gone.jpg", "cannot be read"),
    ):
        with pytest.raises(PhotoError, match=message) as refusal:
            load(tmp_path / name)
        assert name in str(refusal.value)


def test_damaged_exif_does_not_lose_the_photo(tmp_path):
    halves().save(tmp_path / "odd.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert near(colour(load_photo(tmp_path / "odd.jpg", SIZE).image, 0.1, 0.5), (255, 0, 0), 12)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_file_is_named(tmp_path):
    halves().save(tmp_path / "locked.png")
    (tmp_path / "locked.png").chmod(0)
    with pytest.raises(PhotoError, match=r"locked\.png cannot be read"):
        load(tmp_path / "locked.png")


# --- real photos ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="the DreamBench photos are not beside this checkout")
@pytest.mark.parametrize("size_px", [64, 512])
def test_every_real_subject_loads(size_px):
    folders = sorted(folder for folder in DREAMBENCH.iterdir() if folder.is_dir())
    assert folders
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            photos = load_subject_photos(folder, size_px)
        assert [photo.name for photo in photos] == sorted(path.name for path in folder.glob("*.jpg"))
        for photo in photos:
            pixels = np.asarray(photo.image)
            assert pixels.shape == (size_px, size_px, 3) and pixels.std() > 10
            with Image.open(folder / photo.name) as whole:
                plain = np.asarray(whole.convert("RGB").resize((size_px, size_px), Image.Resampling.LANCZOS))
            assert np.abs(pixels.astype(int) - plain).mean() < 0.5


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="the DreamBench photos are not beside this checkout")
def test_real_photo_in_every_disguise_still_shows_the_same(tmp_path):
    """One real photo turned, cut out, in CMYK, with 16 bits …: all must load as nearly the same picture."""
    source = next(iter(sorted((DREAMBENCH / "cat").glob("*.jpg"))))
    plain = Image.open(source).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    opaque = plain.copy()
    opaque.putalpha(255)
    opaque.save(tmp_path / "alpha.png")
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    png_16_bit(tmp_path / "deep.png", np.asarray(plain).astype(np.uint16) * 257, colour_type=2)
    plain.quantize(256).save(tmp_path / "palette.png")
    wanted = np.asarray(load_photo(source, 64).image).astype(int)
    for photo in [load_photo(path, 64) for path in sorted(tmp_path.iterdir())]:
        assert np.abs(np.asarray(photo.image) - wanted).mean() < 3, photo.name
    grey = np.asarray(plain.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "grey16.png")
    shade = np.asarray(Image.fromarray(wanted.astype(np.uint8)).convert("L")).astype(int)
    assert np.abs(np.asarray(load_photo(tmp_path / "grey16.png", 64).image)[..., 0] - shade).mean() < 2
    cut = source.read_bytes()
    (tmp_path / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(PhotoError, match=r"cut\.jpg is damaged or cut off"):
        load_photo(tmp_path / "cut.jpg", 64)
