"""The user's photos of one subject, made into equal RGB squares.

Phones and editors write photos that are turned by an EXIF flag, have transparency, are in CMYK or in 16 bits, are far
too large or far too small. Each is either converted correctly, or refused with a message that names the file; nothing
is clipped, guessed or skipped silently.
"""

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ibkit.errors import PhotoError
from ibkit.runs.files import IMAGE_SUFFIXES

# Pictures that Pillow does not decode: said, where it would otherwise look as if they were read.
NOT_READ = frozenset(f".{name}" for name in "dng cr2 cr3 nef arw orf rw2 raf jxl svg psd eps pdf mov mp4".split())
LFS_POINTER = b"version https://git-lfs"
# Raster formats only: Pillow would pass an EPS file to Ghostscript, whatever its name.
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "TGA", "PPM", "HEIF")
MAX_ENLARGEMENT = 4  # a photo that must be enlarged further has no detail to learn from
# Larger JPEGs are decoded at reduced size to save memory. Smaller ones are not: reduced decoding works in blocks and
# shifts the picture by up to 1 % of its width.
REDUCED_DECODING_PIXELS = 16_000_000


class PhotoWarning(UserWarning):
    """A photo is usable, but the result may be worse than the user expects."""


@dataclass(frozen=True)
class Photo:
    """One photo of the subject, ready for the model.

    Attributes:
        image: RGB, `size_px` × `size_px`.
        name: file name in its folder.
        sha256: hash of the file's bytes.
        original_size: (width, height) in px, after EXIF orientation.
    """

    image: Image.Image
    name: str
    sha256: str
    original_size: tuple[int, int]


def load_subject_photos(folder: str | Path, size_px: int) -> list[Photo]:
    """Read every photo of one subject in a folder (three to six are usual) as an RGB square, in the order of the names.

    Subfolders, hidden files and files without an image ending (`.txt`, `.DS_Store`) are left out.

    Raises:
        PhotoError: see `photo_files` and `load_photo`; the message names the file and says what to do.

    Warns:
        PhotoWarning: only one photo, a photo that had to be enlarged, or two photos with the same picture.
    """
    if size_px < 1:
        raise ValueError(f"size_px must be at least 1, not {size_px}")
    photos = [load_photo(path, size_px) for path in photo_files(folder)]
    if len(photos) == 1:
        _warn(
            f"{folder} holds one photo only ({photos[0].name}): the model will overfit to its pose and background; "
            "three to six photos from different sides work better."
        )
    first_with: dict[bytes, str] = {}
    for photo in photos:
        twin = first_with.setdefault(photo.image.tobytes(), photo.name)
        if twin != photo.name:
            _warn(f"{photo.name} shows the same picture as {twin}: it counts twice; delete one of them.")
    return photos


def photo_files(folder: str | Path) -> list[Path]:
    """List the image files of a folder in the order of their names; a PhotoError where it is missing, is a file, or
    holds none.
    """
    folder = Path(folder)
    if folder.is_file():
        raise PhotoError(f"{folder} is a file, not a folder: give the folder that holds the photos of the subject.")
    if not folder.is_dir():
        raise PhotoError(f"The photo folder {folder} does not exist: check the path (it is relative to {Path.cwd()}).")
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
        files = [path for path in entries if path.is_file()]
        lost = [path.name for path in entries if path.is_symlink() and not path.exists()]
        folders = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
        below = next((one for one in folders if any(p.suffix.lower() in IMAGE_SUFFIXES for p in one.iterdir())), None)
    except OSError as error:
        raise PhotoError(f"The photo folder {folder} cannot be read ({error.strerror}).") from error
    if lost:
        raise PhotoError(f"{folder / lost[0]} is a link to nothing: bring back what it points to, or delete the link.")
    photos = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    unread = [path.name for path in files if path.suffix.lower() in NOT_READ]
    if not photos and unread:
        raise PhotoError(f"{folder} holds no photo that can be read ({unread[0]} cannot): export it as JPEG or PNG.")
    if not photos and below:
        raise PhotoError(f"{folder} holds no photo itself, and its folder {below.name!r} does: give {below}.")
    if unread:
        _warn(f"{', '.join(unread[:3])} in {folder} cannot be read and is left out: export it as JPEG or PNG.")
    if not photos:
        others = ", ".join(path.name for path in files[:3]) + (", …" if len(files) > 3 else "")
        found = f"only {others}" if files else "nothing"
        raise PhotoError(f"{folder} holds no photo ({found} found): put three to six JPEG or PNG photos into it.")
    return photos


def require_pictures(folder: str | Path) -> None:
    """A PhotoError where the folder holds no photo, or one whose header cannot be read."""
    for path in photo_files(folder):
        _open(_content(path), path).close()


def load_photo(path: str | Path, size_px: int) -> Photo:
    """Read one photo as an RGB square: EXIF turn, white behind transparency, shorter side to `size_px`, centre crop. A
    PhotoError where it is damaged, too large, too small, or in a format that cannot be converted correctly.

    Warns:
        PhotoWarning: the photo had to be enlarged.
    """
    path = Path(path)
    content = _content(path)
    with _open(content, path) as picture:
        icc_profile = picture.info.get("icc_profile")
        width, height = picture.size
        if min(width, height) * MAX_ENLARGEMENT < size_px:
            raise PhotoError(
                f"The photo {path} is too small ({width} × {height} px): its shorter side must have at least "
                f"{-(-size_px // MAX_ENLARGEMENT)} px for a model of {size_px} px; use a larger photo."
            )
        if min(width, height) < size_px:
            _warn(
                f"{path.name} has only {width} × {height} px and was enlarged to {size_px} px: the model learns blur."
            )
        if width * height > REDUCED_DECODING_PIXELS:
            # A JPEG can decode at 1/2, 1/4 or 1/8 of its size; four times the target is left for the resize below.
            picture.draft(None, (4 * size_px, 4 * size_px))
        upright = _decode(picture, path)
    turned = (upright.width > upright.height) != (width > height)
    square = ImageOps.fit(_flatten(upright, path), (size_px, size_px), Image.Resampling.LANCZOS)
    return Photo(
        image=_to_srgb(square, icc_profile, path),
        name=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        original_size=(height, width) if turned else (width, height),
    )


def read_rgb(path: str | Path) -> Image.Image:
    """A picture that the kit wrote, such as a run's PNG, as RGB; for a user's photo see `load_photo`."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def png(picture: Image.Image, **options) -> bytes:
    """A picture as a PNG file, written anew: without the file name and metadata of where it is from."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PhotoError(f"The photo {path} cannot be read ({error.strerror}).") from error


def _open(content: bytes, path: Path) -> Image.Image:
    """Read the header of a picture, but not its pixels."""
    Image.init()
    known = [name for name in DECODERS if name in Image.OPEN]
    too_large = f"The photo {path} is too large to decode safely ({{}}): save a smaller copy, say 2000 px wide."
    with warnings.catch_warnings():
        # Pillow warns above 89 megapixels and refuses above 179. A JPEG in between is decoded at reduced size.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture = Image.open(io.BytesIO(content), formats=known)
        except Image.DecompressionBombError:
            raise PhotoError(too_large.format("more than 179 megapixels")) from None
        except UnidentifiedImageError:
            raise PhotoError(_not_a_picture(content, path)) from None
        except (OSError, ValueError, SyntaxError) as error:
            raise PhotoError(f"The photo {path} cannot be read ({error}): save it again as JPEG or PNG.") from error
    n_pixels, most = picture.width * picture.height, Image.MAX_IMAGE_PIXELS
    if picture.format not in ("JPEG", "MPO") and most and n_pixels > most:
        raise PhotoError(too_large.format(f"{picture.width} × {picture.height} px"))
    return picture


def _not_a_picture(content: bytes, path: Path) -> str:
    """The message for a file with an image ending that is no picture."""
    if content.startswith(LFS_POINTER):
        return f"The photo {path} is a git-lfs pointer and not the picture: run `git lfs pull` in its repository."
    if not content:
        return f"The photo {path} is empty (0 bytes): copy it again or delete it."
    if path.suffix.lower() in (".heic", ".heif"):
        return f"The photo {path} is in Apple's HEIC format, which Pillow cannot read here: export it as JPEG."
    return f"The file {path} is not a picture in a known format, in spite of its name: save it as JPEG or PNG."


def _decode(picture: Image.Image, path: Path) -> Image.Image:
    """Decode the pixels and turn the picture as its EXIF flag says."""
    try:
        picture.load()
    except (OSError, ValueError, SyntaxError, struct.error, MemoryError) as error:
        raise PhotoError(f"The photo {path} is damaged or cut off ({error}): copy it again or delete it.") from error
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error) as error:
        _warn(f"{path.name} has a damaged EXIF block ({error}): it is used without turning.")
        return picture


def _flatten(picture: Image.Image, path: Path) -> Image.Image:
    """Return an 8-bit opaque picture in mode L, RGB or CMYK; transparency goes on white."""
    mode = picture.mode
    if mode == "F" or mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if mode == "F" or values.min() < 0 or values.max() > 65535:
            kind = "floating-point" if mode == "F" else "32-bit"
            raise PhotoError(f"The photo {path} has {kind} pixels of unknown range: save it with 8 or 16 bits.")
        # Pillow's own conversion of 16-bit grey clips everything above 255 to white.
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    if mode in ("L", "RGB", "CMYK"):
        return picture
    try:
        return picture.convert("RGB")
    except ValueError as error:
        raise PhotoError(f"The photo {path} has the colour mode {mode}: save it as an RGB JPEG or PNG.") from error


def _to_srgb(picture: Image.Image, icc_profile: bytes | None, path: Path) -> Image.Image:
    """Convert to sRGB by the photo's own colour profile if it has one (CMYK, Display P3), else by Pillow's formula."""
    if icc_profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
            space = source.profile.xcolor_space.strip()
            if space == {"L": "GRAY"}.get(picture.mode, picture.mode):
                to_srgb = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), picture.mode, "RGB")
                return to_srgb.apply(picture)
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            _warn(f"{path.name} has a damaged colour profile ({error}): its colours may be slightly off.")
    return picture.convert("RGB")


def _warn(message: str) -> None:
    warnings.warn(message, PhotoWarning, stacklevel=3)
