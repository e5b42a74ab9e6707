"""Makes `glyphs.json`, the list of the characters of `glyphs`: ``python -m signmaml.data.glyph_selection``.

The list is stored rather than computed on every machine, so that another version of FreeType cannot change the classes.

The list has the letters (Unicode category L without modifier letters) of the scripts below that the reference font has
and that Unicode does not decompose, which excludes accented letters. A character that looks like an earlier one of any
script is left out. Two characters are compared as the reference font draws them, cropped, scaled to one size, centred
and blurred: once in their own proportions and, if those are similar, once more stretched to a square. Their difference
is the greatest mean difference of ink in any 7 x 7 window, for the best shift of up to one pixel.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from itertools import chain

import numpy as np
from PIL import Image

from .arguments import SPLITS
from .glyph_fonts import FONT_SIZE, REFERENCE_FONT, Font, fonts

# By ISO 15924 code, in the order in which look-alikes are resolved.
SCRIPTS = {
    "train": ("Latn", "Grek", "Cyrl", "Cans", "Copt", "Lisu", "Ital"),
    "test": ("Geor", "Armn", "Tfng", "Laoo", "Nkoo"),
    "val": ("Arab", "Hebr", "Ogam"),
}
LEFT_OUT = (0x0261,)  # script g: in sans-serif fonts every g looks like it
SIDE = 28  # side of the compared pictures
INK_SIDE = 24
WINDOW = 7
# Chosen by eye. Pairs such as upper and lower case S are below the first; across scripts, doubtful pairs go too.
ALIKE_IN_SCRIPT = 0.22
ALIKE_ACROSS_SCRIPTS = 0.28
SIMILAR_PROPORTIONS = 1.45
# Pixels of the longer side. Smaller glyphs are dots and dashes; strokes of larger ones get too fine when scaled down.
INK = (FONT_SIZE * 3 // 8, FONT_SIZE * 115 // 100)


@dataclass(frozen=True)
class Candidate:
    """A character that may become a class.

    Attributes:
        point: Its code point.
        script: Its script's code.
        aspect: Width over height of its ink.
        natural: Its picture in its own proportions, ``[SIDE, SIDE]`` in 0..1.
        stretched: Its picture stretched to a square.
    """

    point: int
    script: str
    aspect: float
    natural: np.ndarray
    stretched: np.ndarray


def select() -> dict[str, dict[str, str]]:
    """Split -> name of the script -> its characters in code order."""
    kept = {candidate.point for candidate in different(candidates())}
    return {
        split: {
            script_name(script): "".join(chr(p) for p in _letters(script) if p in kept) for script in SCRIPTS[split]
        }
        for split in SPLITS
    }


def candidates() -> list[Candidate]:
    """All letters of the scripts, in the order in which look-alikes are resolved."""
    found = []
    for script in chain.from_iterable(SCRIPTS.values()):
        for point in _letters(script):
            glyph = _reference_font().draw(point)
            if glyph is not None and INK[0] <= max(glyph.size) <= INK[1]:
                width, height = glyph.size
                scale = INK_SIDE / max(glyph.size)
                natural = _picture(glyph, max(1, round(width * scale)), max(1, round(height * scale)))
                found.append(Candidate(point, script, width / height, natural, _picture(glyph, INK_SIDE, INK_SIDE)))
    return found


def different(found: list[Candidate]) -> list[Candidate]:
    """The candidates that do not look like one kept before them."""
    earlier: dict[int, set[int]] = {}
    for i, j in look_alikes(found):
        earlier.setdefault(j, set()).add(i)
    kept: set[int] = set()
    for j in range(len(found)):
        if kept.isdisjoint(earlier.get(j, ())):
            kept.add(j)
    return [found[j] for j in sorted(kept)]


def look_alikes(found: list[Candidate]) -> set[tuple[int, int]]:
    """Pairs ``i < j`` that look alike."""
    natural = differences(np.stack([candidate.natural for candidate in found]), ALIKE_ACROSS_SCRIPTS)
    stretched = differences(np.stack([candidate.stretched for candidate in found]), ALIKE_ACROSS_SCRIPTS)
    alike = set()
    for (i, j), difference in chain(natural.items(), stretched.items()):
        one, other = found[i], found[j]
        limit = ALIKE_IN_SCRIPT if one.script == other.script else ALIKE_ACROSS_SCRIPTS
        if natural.get((i, j), 1.0) < limit or (difference < limit and _similar_proportions(one, other)):
            alike.add((i, j))
    return alike


def differences(pictures: np.ndarray, limit: float) -> dict[tuple[int, int], float]:
    """The difference of every pair ``i < j`` of pictures ``[n, SIDE, SIDE]`` in 0..1 that is below `limit`."""
    ink = _blurred(pictures.astype(np.float32))
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    tiles = _tiles(ink)
    found: dict[tuple[int, int], float] = {}
    for i in range(len(ink) - 1):
        for shift in shifts:
            shifted = np.roll(ink[i], shift, (0, 1))
            # Tiles give a lower bound of the worst window, which already rules out most pairs.
            near = i + 1 + np.flatnonzero(np.abs(_tiles(shifted[None]) - tiles[i + 1 :]).max(1) < limit)
            worst = _worst_window(np.abs(shifted - ink[near]))
            for j, difference in zip(near.tolist(), worst.tolist(), strict=True):
                if difference < min(limit, found.get((i, j), limit)):
                    found[i, j] = difference
    return found


def script_name(code: str) -> str:
    """The script's name with '_' for spaces, such as ``Old_Italic`` for ``Ital``."""
    from fontTools import unicodedata as scripts

    name: str = scripts.script_name(code)
    return name.replace(" ", "_")


def _letters(script: str) -> list[int]:
    from fontTools import unicodedata as scripts

    return [
        point
        for point in sorted(_reference_font().characters)
        if scripts.script(chr(point)) == script
        and unicodedata.category(chr(point)) in ("Lu", "Ll", "Lt", "Lo")
        and not unicodedata.decomposition(chr(point))
        and point not in LEFT_OUT
    ]


def _reference_font() -> Font:
    return next(font for font in fonts() if font.name == REFERENCE_FONT)


def _picture(glyph: Image.Image, width: int, height: int) -> np.ndarray:
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(glyph.resize((width, height), Image.Resampling.LANCZOS), ((SIDE - width) // 2, (SIDE - height) // 2))
    return np.asarray(picture, dtype=np.float32) / 255


def _similar_proportions(one: Candidate, other: Candidate) -> bool:
    return max(one.aspect / other.aspect, other.aspect / one.aspect) < SIMILAR_PROPORTIONS


def _blurred(pictures: np.ndarray) -> np.ndarray:
    """Each picture smoothed by the binomial filter 1 2 1 in both directions."""
    for axis in (1, 2):
        pictures = (np.roll(pictures, 1, axis) + 2 * pictures + np.roll(pictures, -1, axis)) / 4
    return pictures


def _tiles(pictures: np.ndarray) -> np.ndarray:
    """``[n, tiles]``: mean ink of the windows that tile a picture."""
    count = SIDE // WINDOW
    means: np.ndarray = pictures.reshape(-1, count, WINDOW, count, WINDOW).mean((2, 4))
    return means.reshape(len(pictures), -1)


def _worst_window(differences: np.ndarray) -> np.ndarray:
    """``[n]``: the greatest mean over all windows of ``[n, SIDE, SIDE]``."""
    sums = np.pad(differences.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    w = WINDOW
    windows = sums[:, w:, w:] - sums[:, :-w, w:] - sums[:, w:, :-w] + sums[:, :-w, :-w]
    worst: np.ndarray = windows.max((1, 2), initial=0.0)
    return worst / w**2


def main() -> None:
    """Prints the list as JSON, one line per script."""
    splits = []
    for split, scripts in select().items():
        lines = [f"  {json.dumps(name)}: {json.dumps(chars, ensure_ascii=False)}" for name, chars in scripts.items()]
        splits.append(f" {json.dumps(split)}: {{\n" + ",\n".join(lines) + "\n }")
    print("{\n" + ",\n".join(splits) + "\n}")


if __name__ == "__main__":
    main()
