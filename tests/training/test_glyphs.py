"""Glyphs: as many classes as promised, each of one script, legible, and the same on every build."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools import unicodedata as scripts

from signmaml.data import ImageSet, glyphs
from signmaml.data.glyph_fonts import REFERENCE_FONT, Font, fonts, fonts_with
from signmaml.data.glyphs import character_lists, class_counts, draw_class

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="session")
def glyph_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(autouse=True)
def _own_cache(glyph_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNMAML_CACHE", str(glyph_cache))


@pytest.fixture(scope="session")
def built(glyph_cache: Path) -> dict[str, ImageSet]:
    """All splits, drawn once per session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNMAML_CACHE", str(glyph_cache))
        return {split: glyphs(split, progress=False) for split in SPLITS}


def point(class_name: str) -> int:
    return int(class_name.rpartition("U+")[2], 16)


# --- which characters ------------------------------------------------------------------------------------------------


def test_there_are_at_least_a_thousand_classes() -> None:
    counts = class_counts()
    assert counts["train"] >= 700 and counts["val"] >= 100 and counts["test"] >= 200
    assert sum(counts.values()) >= 1000


def test_every_script_is_in_one_split_and_listed_under_its_name() -> None:
    seen: set[str] = set()
    for split in SPLITS:
        for script, characters in character_lists()[split].items():
            assert script not in seen
            seen.add(script)
            assert {scripts.script(character) for character in characters} == {
                scripts.script_code(script.replace("_", " "))
            }


def test_every_character_is_a_letter_that_the_fonts_have_and_there_once() -> None:
    lists = character_lists()
    characters = [c for split in SPLITS for characters in lists[split].values() for c in characters]
    assert len(set(characters)) == len(characters)
    reference = next(font for font in fonts() if font.name == REFERENCE_FONT)
    for character in characters:
        assert unicodedata.category(character) in {"Lu", "Ll", "Lt", "Lo"}  # no marks, no modifiers, no digits
        assert not unicodedata.decomposition(character)
        assert ord(character) in reference.characters
        assert all(ord(character) in font.characters for font in fonts_with(ord(character)))


# The Latin A, B, O, P, H, T, X, V, S with look-alikes in Greek, Cyrillic, Armenian, Lisu, syllabics and lower case.
LOOK_ALIKES = (
    *("\u0041\u0391\u0410\ua4ee", "\u0042\u0392\u0412\ua4d0", "\u004f\u006f\u039f\u041e\u0555\ua4f3"),
    *(
        "\u0050\u03a1\u0420\ua4d1",
        "\u0048\u0397\u041d\ua4e7",
        "\u0054\u03a4\u0422\ua4d4",
        "\u0058\u0078\u03a7\u0425\ua4eb",
    ),
    *("\u0056\u0076\u0474\u142f\ua4e6", "\u0053\u0073\u0405\u0455\u054f\ua4e2"),
)


@pytest.mark.parametrize("alike", LOOK_ALIKES)
def test_look_alikes_are_one_class(alike: str) -> None:
    everything = {c for lists in character_lists().values() for characters in lists.values() for c in characters}
    assert len(everything & set(alike)) == 1


# --- the pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_classes_and_samples_are_complete(built: dict[str, ImageSet], split: str) -> None:
    images = built[split]
    assert images.classes == class_counts()[split]
    assert images.image_shape == (1, 28, 28)
    assert set(images.class_sizes.tolist()) == {20}
    for name in images.class_names:
        assert chr(point(name)) in character_lists()[split][name.partition("/")[0]]


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_no_picture_is_blank_clipped_or_flooded(built: dict[str, ImageSet], split: str) -> None:
    images = built[split].images
    edge = torch.ones(28, 28, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert int(images[:, 0, edge].max()) < 32  # nothing but faint antialiasing reaches the edge
    share = images.float().mean((1, 2, 3)) / 255
    assert float(share.min()) > 0.01 and float(share.max()) < 0.45
    assert bool((images.amax((1, 2, 3)) >= 160).all())


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_samples_of_a_class_differ_and_no_two_classes_share_a_picture(built: dict[str, ImageSet], split: str) -> None:
    images = built[split].images.flatten(1)
    distinct = torch.unique(images, dim=0)
    assert len(distinct) == len(images)


def overlaps(characters: list[str], font: Font) -> torch.Tensor:
    """Shared ink over joint ink of every pair of glyphs of one font, cropped, scaled alike and centred."""
    pictures = torch.zeros(len(characters), 28, 28)
    for picture, character in zip(pictures, characters, strict=True):
        glyph = font.draw(ord(character))
        assert glyph is not None
        width, height = (max(1, round(side * 24 / max(glyph.size))) for side in glyph.size)
        pixels = torch.from_numpy(np.array(glyph.resize((width, height))))
        top, left = (28 - height) // 2, (28 - width) // 2
        picture[top : top + height, left : left + width] = pixels / 255
    flat = pictures.flatten(1)
    shared, own = flat @ flat.T, flat.square().sum(1)
    return (shared / (own[:, None] + own - shared)).fill_diagonal_(0)


@pytest.mark.parametrize("font", fonts(), ids=lambda font: font.name)
def test_no_class_is_a_copy_of_another_in_any_font(font: Font) -> None:
    split_of = {c: split for split in SPLITS for chars in character_lists()[split].values() for c in chars}
    characters = [c for c in split_of if font in fonts_with(ord(c))]
    overlap = overlaps(characters, font)
    splits = torch.tensor([SPLITS.index(split_of[c]) for c in characters])
    across = splits[:, None] != splits
    limit = torch.where(across, 0.97, 0.985)
    alike = [(characters[i], characters[j], float(overlap[i, j])) for i, j in (overlap > limit).nonzero().tolist()]
    assert not alike


@pytest.mark.slow
def test_samples_vary_in_font_and_weight(built: dict[str, ImageSet]) -> None:
    train = built["train"]
    letter = train.images_of(train.class_names.index("Latin/U+0052")).float()
    ink = letter.sum((1, 2, 3)) / 255
    assert float(ink.max() / ink.min()) > 1.5
    assert len(fonts_with(ord("R"))) == 16


# --- determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sample_depends_on_seed_class_and_number_alone(built: dict[str, ImageSet]) -> None:
    val = built["val"]
    for number in (0, 17, val.classes - 1):
        again = torch.from_numpy(draw_class(point(val.class_names[number]), 28, 20, 0))
        assert torch.equal(again, val.images_of(number)[:, 0])
        fewer = torch.from_numpy(draw_class(point(val.class_names[number]), 28, 3, 0))
        assert torch.equal(fewer, again[:3])
        other = torch.from_numpy(draw_class(point(val.class_names[number]), 28, 20, 1))
        assert not torch.equal(other, again)


@pytest.mark.slow
def test_options_and_cache(built: dict[str, ImageSet], glyph_cache: Path) -> None:
    files = set(glyph_cache.iterdir())
    assert len(files) >= 3
    again = glyphs("val", progress=False)
    assert torch.equal(again.images, built["val"].images) and again.class_names == built["val"].class_names
    assert set(glyph_cache.iterdir()) == files
    small = glyphs("val", image_size=20, samples=2, seed=5, progress=False)
    assert small.images.shape == (2 * again.classes, 1, 20, 20)
    assert small.class_names == again.class_names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "valid"}, r"split: expected one of 'train', 'val', 'test', found 'valid'"),
        ({"image_size": 8}, r"image_size: expected an integer in 16\.\.256, found 8"),
        ({"samples": 0}, r"samples: .* found 0"),
        ({"seed": -1}, r"seed: .* found -1"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs(**({"split": "val"} | change))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_list_of_characters_is_what_the_selection_gives() -> None:
    from signmaml.data.glyph_selection import select

    assert select() == character_lists()
