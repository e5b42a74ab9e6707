"""The fonts behind `glyphs`, which are those that matplotlib ships, and the drawing of a character in one of them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
REFERENCE_FONT = "DejaVuSans"  # has every character of the set
FONT_SIZE = 96  # pixels per em: about twice what a 28 x 28 sample needs

_SLANTED_SERIFS = ("DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneralItalic", "STIXGeneralBolIta")
_DEJAVU_SERIFS = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
_STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
# Code points first..last, and the fonts that must not draw them.
_OTHER_SHAPES = (
    (0x0400, 0x052F, _SLANTED_SERIFS),  # Cyrillic in cursive: a letter may look like a different upright one
    (0x10A0, 0x10C5, _DEJAVU_SERIFS),  # Georgian capitals (Asomtavruli) in a different design
    (0x2D00, 0x2D2D, _DEJAVU_SERIFS),  # and their small letters (Nuskhuri)
    # These fonts draw the same glyph as for another character of the set.
    (0xA740, 0xA740, _DEJAVU_SERIFS),  # K with stroke: as the Cyrillic letter
    (0x0251, 0x0251, _SLANTED_SERIFS),  # Latin alpha: as the Greek letter
    (0x026A, 0x026A, _STIX),  # small capital I: as the capital
    (0x045B, 0x045B, _STIX),  # Cyrillic tshe: as the Latin h with stroke
)


@dataclass(frozen=True)
class Font:
    """One font file.

    Attributes:
        name: The file's stem.
        path: The file.
        characters: The code points it has.
    """

    name: str
    path: Path
    characters: frozenset[int]

    @property
    def stroke_changes(self) -> tuple[int, ...]:
        """Allowed changes of stroke width, in steps of the drawing, that keep glyphs legible; smaller for bold fonts.

        In a bold serif font, thinner strokes would vanish and thicker ones would fill the counters.
        """
        if "Bol" not in self.name:
            return (0, 1)
        return (-1, 0) if self.name.startswith("DejaVuSans") else (0,)

    def draw(self, codepoint: int) -> Image.Image | None:
        """The character, white on black, cropped to its ink; None if it has none."""
        side = 4 * FONT_SIZE  # room for the widest and tallest characters
        image = Image.new("L", (side, side))
        drawing = ImageDraw.Draw(image)
        drawing.text((side // 3, side // 3), chr(codepoint), fill=255, font=_loaded(self.path))
        box = image.getbbox()
        return image.crop(box) if box else None


@cache
def fonts() -> tuple[Font, ...]:
    """The fonts of `FONTS` with the characters that they have.

    Raises:
        FileNotFoundError: This installation of matplotlib lacks some of them.
    """
    return tuple(Font(path.stem, path, _characters(path)) for path in font_files())


@cache
def font_files() -> tuple[Path, ...]:
    """The files of `FONTS` in matplotlib's data folder.

    Raises:
        FileNotFoundError: This installation of matplotlib lacks some of them.
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    absent = [name for name in FONTS if not (folder / f"{name}.ttf").is_file()]
    if absent:
        raise FileNotFoundError(
            f"glyphs: expected matplotlib's own fonts in {folder}, found no {absent[0]}.ttf "
            f"({len(absent)} of {len(FONTS)} are missing); install matplotlib from PyPI or conda-forge"
        )
    return tuple(folder / f"{name}.ttf" for name in FONTS)


def fonts_with(codepoint: int) -> list[Font]:
    """The fonts that draw this character in its usual shape.

    Raises:
        ValueError: There is none.
    """
    unfit = {name for first, last, names in _OTHER_SHAPES if first <= codepoint <= last for name in names}
    found = [font for font in fonts() if codepoint in font.characters and font.name not in unfit]
    if not found:
        raise ValueError(f"glyphs: no font of this matplotlib has U+{codepoint:04X}")
    return found


def fonts_digest() -> str:
    """SHA-256 over all font files, because other fonts give other glyphs."""
    digest = hashlib.sha256()
    for path in font_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _characters(path: Path) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns about the fonts' creation dates
    with TTFont(path, lazy=True) as font:
        return frozenset(font.getBestCmap())


@cache
def _loaded(path: Path) -> ImageFont.FreeTypeFont:
    # Basic layout: one character needs no shaping, and not every Pillow has Raqm.
    return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
