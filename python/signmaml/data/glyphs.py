"""`glyphs`: an image set that needs no download, drawn from the fonts that matplotlib ships."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from json import loads

import numpy as np
import PIL
import torch
from PIL import Image, ImageFilter, features

from .arguments import SPLITS, check_integer, check_split
from .cache import cached
from .glyph_fonts import fonts_digest, fonts_with
from .image_set import ImageSet
from .progress import track

# Increase it whenever the same arguments would give other pixels.
RECIPE = 1
GLYPH_SIZES = (16, 256)  # least and greatest height and width

# Ranges of the uniform variations. Lengths are fractions of the image's side.
INK = (0.60, 0.76)  # longer side of the upright glyph
ASPECT = (0.88, 1.14)  # width relative to height
ROTATION = (-12.0, 12.0)  # degrees
SHEAR = (-0.15, 0.15)
SHIFT = (-0.06, 0.06)
MARGIN = 1.0 / 28  # no ink beyond this
SUPERSAMPLING = 3  # drawn larger by this factor, then averaged


def glyphs(split: str, *, image_size: int = 28, samples: int = 20, seed: int = 0, progress: bool = True) -> ImageSet:
    """Printed characters, white on black: 735, 102 and 229 classes, no script in two splits.

    Each character is a class; splits go by script, as Omniglot's go by alphabet: train has Latin, Greek, Cyrillic,
    Canadian Aboriginal, Coptic, Lisu and Old Italic letters, val Arabic, Hebrew and Ogham, test Georgian, Armenian,
    Tifinagh, Lao and N'Ko. Accented letters, combining marks and characters that look like another one (such as Greek
    capital Alpha and Latin A) are left out. Samples vary in font (the 2 to 16 fonts of DejaVu Sans, Mono and Serif and
    STIX that have the character, in turn), stroke width, size, aspect, rotation (up to 12 degrees), shear and position.

    The set is drawn once (a few seconds) and cached. Do not use rotations as new classes with it: some characters are
    rotated copies of others.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        image_size: Height and width, 16 to 256. Default 28.
        samples: Images per class, 1 to 1000. Default 20.
        seed: 0 to 2**63 - 1; another seed gives other samples of the same classes. Default 0.
        progress: Whether to show progress on stderr.

    Returns:
        Images ``[classes * samples, 1, image_size, image_size]`` uint8; classes are named ``SCRIPT/U+XXXX``.

    Raises:
        TypeError, ValueError: An argument is out of range.
        FileNotFoundError: matplotlib is installed without its fonts.

    Determinism: the classes are always the same; for given versions of Pillow, its FreeType and the fonts, a sample
    depends only on (seed, character, number of the sample, `image_size`).
    """
    check_split(split)
    image_size = check_integer("image_size", image_size, *GLYPH_SIZES)
    samples = check_integer("samples", samples, 1, 1000)
    seed = check_integer("seed", seed, 0, 2**63 - 1)
    key = {
        "name": "glyphs",
        "split": split,
        "image_size": image_size,
        "samples": samples,
        "seed": seed,
        "recipe": RECIPE,
        "characters": hashlib.sha256("".join(character_lists()[split].values()).encode()).hexdigest(),
        "fonts": fonts_digest(),
        "pillow": [PIL.__version__, features.version("freetype2")],
    }
    return cached(key, lambda: draw_split(split, image_size, samples, seed, progress))


@cache
def character_lists() -> dict[str, dict[str, str]]:
    """Split -> script -> its characters (`glyphs.json`; see `signmaml.data.glyph_selection`)."""
    text = resources.files("signmaml.data").joinpath("glyphs.json").read_text(encoding="utf-8")
    lists: dict[str, dict[str, str]] = loads(text)
    return lists


def class_counts() -> dict[str, int]:
    """Split -> number of classes."""
    return {split: sum(map(len, character_lists()[split].values())) for split in SPLITS}


def draw_split(split: str, image_size: int, samples: int, seed: int, progress: bool) -> ImageSet:
    """Draws one split without using the cache; arguments as `glyphs`."""
    characters = [(script, char) for script, chars in character_lists()[split].items() for char in chars]
    images = torch.empty(len(characters), samples, 1, image_size, image_size, dtype=torch.uint8, device="cpu")
    pixels = images.numpy()
    # One thread: Pillow holds the GIL while it draws text.
    shown = track(characters, total=len(characters), what=f"glyphs/{split}: drawing", unit="classes", show=progress)
    for index, (_, char) in enumerate(shown):
        pixels[index, :, 0] = draw_class(ord(char), image_size, samples, seed)
    names = tuple(f"{script}/U+{ord(char):04X}" for script, char in characters)
    sizes = torch.full((len(names),), samples, device="cpu")
    # White on black, as scans of print are once they are inverted.
    return ImageSet("glyphs", split, images.flatten(0, 1), names, sizes, inverted=True)


def draw_class(codepoint: int, image_size: int, samples: int, seed: int) -> np.ndarray:
    """All samples of a character, ``[samples, image_size, image_size]`` uint8."""
    drawn = [
        (font.stroke_changes, glyph) for font in fonts_with(codepoint) if (glyph := font.draw(codepoint)) is not None
    ]
    first = int(_random_words(seed, codepoint, 0, 1)[0] % np.uint64(len(drawn)))
    pictures = np.empty((samples, image_size, image_size), dtype=np.uint8)
    for sample in range(samples):
        stroke_changes, glyph = drawn[(first + sample) % len(drawn)]
        variation = _variation(_random_words(seed, codepoint, sample + 1, 7), stroke_changes)
        pictures[sample] = np.asarray(_render(glyph, variation, image_size))
    return pictures


@dataclass(frozen=True)
class Variation:
    """How one sample of a glyph is varied; see the ranges at the top.

    `stroke` is the growth of strokes on each side, in pixels of the supersampled picture at 28 x 28.
    """

    ink: float
    aspect: float
    rotation: float
    shear: float
    shift_x: float
    shift_y: float
    stroke: int


def _variation(words: np.ndarray, stroke_changes: tuple[int, ...]) -> Variation:
    shares = (words[:6] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    ranges = (INK, ASPECT, ROTATION, SHEAR, SHIFT, SHIFT)
    ink, aspect, rotation, shear, shift_x, shift_y = (
        low + (high - low) * float(share) for (low, high), share in zip(ranges, shares, strict=True)
    )
    stroke = stroke_changes[int(words[6] % np.uint64(len(stroke_changes)))]
    return Variation(ink, aspect, rotation, shear, shift_x, shift_y, stroke)


def _render(glyph: Image.Image, variation: Variation, image_size: int) -> Image.Image:
    """One sample: the cropped glyph under the variation's affine map, antialiased."""
    side = image_size * SUPERSAMPLING
    grow = round(variation.stroke * image_size / 28)
    room = side / 2 - MARGIN * side - max(grow, 0)

    forward = _linear_map(variation) * (variation.ink * side / max(glyph.size))
    reach = np.abs(forward) @ (np.array(glyph.size) / 2)  # half width and height of the mapped box
    shrink = min(1.0, *(room / reach))
    forward, reach = forward * shrink, reach * shrink
    shift = np.array([variation.shift_x, variation.shift_y]) * side
    centre = side / 2 + np.clip(shift, reach - room, room - reach)

    # Pillow takes the inverse map, from each pixel of the result to its source.
    back = np.linalg.inv(forward)
    origin = np.array(glyph.size) / 2 - back @ centre
    data = (back[0, 0], back[0, 1], origin[0], back[1, 0], back[1, 1], origin[1])
    picture = glyph.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    if grow > 0:
        picture = picture.filter(ImageFilter.MaxFilter(2 * grow + 1))
    elif grow < 0:
        picture = picture.filter(ImageFilter.MinFilter(2 * -grow + 1))
    return picture.reduce(SUPERSAMPLING)


def _linear_map(variation: Variation) -> np.ndarray:
    """Stretch, then shear, then rotation: ``[2, 2]``."""
    angle = math.radians(variation.rotation)
    stretch = np.diag([math.sqrt(variation.aspect), 1 / math.sqrt(variation.aspect)])
    shear = np.array([[1.0, variation.shear], [0.0, 1.0]])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    product: np.ndarray = turn @ shear @ stretch
    return product


def _random_words(seed: int, codepoint: int, sample: int, count: int) -> np.ndarray:
    """uint64 words that depend only on the arguments: Philox keyed by seed and character, counter: the sample."""
    generator = np.random.Philox(
        key=np.array([seed, codepoint], np.uint64), counter=np.array([0, 0, 0, sample], np.uint64)
    )
    words: np.ndarray = generator.random_raw(count)
    return words
