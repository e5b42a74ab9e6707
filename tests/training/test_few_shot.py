"""`FewShotClassifier` and `FewShotRegressor`: what they compute, what they take, their files and their conventions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import signmaml
import signmaml_ext
from helpers.cases.toy_images import toy_images, write_class_folders
from signmaml import ExampleFormat, FewShotClassifier, FewShotRegressor, Learner, MetaTrainer, TrainConfig
from signmaml.adapted import CountedState
from signmaml.data import ImageSet, folder
from signmaml.episodes import EpisodeSampler

SIDE = 16
FORMAT = ExampleFormat((1, SIDE, SIDE))


def conv(ways: int = 3, norm: str = "batch") -> nn.Module:
    torch.manual_seed(4)
    return signmaml.Conv4(ways, channels=1, filters=4, image_size=SIDE, layers=2, norm=norm).double()


def with_running(ways: int = 3) -> nn.Module:
    """With BatchNorms that keep running statistics, some of them written."""
    torch.manual_seed(4)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, ways)
    model = nn.Sequential(*layers).double()
    model(images(20))
    return model


def images(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, SIDE, SIDE, dtype=torch.float64, generator=generator)


def labels(ways: int, count: int) -> list[str]:
    return [f"class {i % ways}" for i in range(count)]


def softmax(scores: Tensor) -> np.ndarray:
    return scores.softmax(-1).numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short 3-way run on images in folders; it inverts nothing and maps pixels to -1..1."""
    place = tmp_path_factory.mktemp("few_shot")
    root = write_class_folders(place / "images", classes=5, images=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNMAML_CACHE", str(place / "cache"))
        config = TrainConfig(
            data="folder", data_root=str(root), ways=3, queries=3, tasks=2, model="conv2", filters=4, iterations=4,
            validate_every=2, validate_tasks=4, test_tasks=0, normalize="signed", device="cpu", tensorboard=False,
        )  # fmt: skip
        MetaTrainer(config, out=place / "run", progress=False).fit()
    return place / "run"


def files_of(run: Path, ways: int, each: int) -> tuple[list[Path], list[str]]:
    classes = sorted((run.parent / "images" / "test").iterdir())[:ways]
    found = [path for place in classes for path in sorted(place.glob("*.png"))[:each]]
    return found, [path.parent.name for path in found]


# ---- What is computed


@pytest.mark.parametrize("transductive", [False, True])
@pytest.mark.parametrize("model", [conv(), conv(norm="group"), with_running()], ids=["batch", "group", "running"])
def test_probabilities_are_those_of_evaluate(model: nn.Module, transductive: bool) -> None:
    x, new = images(6), images(9, seed=2)
    fitted = FewShotClassifier(model, inner_lr=0.02, inner_steps=4, transductive=transductive).fit(x, labels(3, 6))
    mode = "batch" if transductive else "support"
    expected = signmaml_ext.evaluate(
        model.eval(), x[None], torch.arange(6)[None] % 3, new[None], torch.zeros(1, 9, dtype=torch.int64),
        inner_lr=0.02, inner_steps=4, batch_norm=mode,
    )  # fmt: skip
    np.testing.assert_allclose(fitted.predict_proba(new), softmax(expected.logits[0]), rtol=1e-9)
    np.testing.assert_allclose(fitted.decision_function(new), expected.logits[0], rtol=1e-9)
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(new)), fitted.predict_proba(new))
    assert list(fitted.predict(new)) == [f"class {i}" for i in expected.logits[0].argmax(-1).tolist()]


def test_running_statistics_serve_a_learner_that_uses_them() -> None:
    model = with_running().eval()
    x, new = images(6), images(5, seed=2)
    mine = Learner.of(model, inner_lr=0.02, inner_steps=4, batch_norm="running")
    expected = signmaml_ext.evaluate(
        model, x[None], torch.arange(6)[None] % 3, new[None], torch.zeros(1, 5, dtype=torch.int64),
        inner_lr=0.02, inner_steps=4, batch_norm="running",
    )  # fmt: skip
    fitted = FewShotClassifier(mine).fit(x, labels(3, 6))
    np.testing.assert_allclose(fitted.predict_proba(new), softmax(expected.logits[0]), rtol=1e-9)


def test_an_answer_depends_on_its_companions_only_if_transductive() -> None:
    x, new = images(6), images(4, seed=2)
    for transductive in (False, True):
        fitted = FewShotClassifier(conv(), inner_lr=0.02, inner_steps=2, transductive=transductive)
        together = fitted.fit(x, labels(3, 6)).predict_proba(new)
        pairs = np.concatenate([fitted.predict_proba(new[:2]), fitted.predict_proba(new[2:])])
        assert np.allclose(together, pairs, rtol=1e-9) is not transductive
    with pytest.raises(ValueError, match="at least 2 examples for a transductive prediction"):
        fitted.predict(new[:1])


def test_many_queries_go_in_parts() -> None:
    fitted = FewShotClassifier(conv(), inner_lr=0.02, inner_steps=2).fit(images(6), labels(3, 6))
    new = images(300, seed=3)
    one_by_one = np.concatenate([fitted.predict_proba(new[i : i + 50]) for i in range(0, 300, 50)])
    np.testing.assert_allclose(fitted.predict_proba(new), one_by_one, rtol=1e-9)


@pytest.mark.parametrize("ways", [3, 5])
@pytest.mark.parametrize("transductive", [False, True])
def test_counted_steps_predict_as_full_parameters(ways: int, transductive: bool) -> None:
    mine = Learner.of(conv(), inner_lr=0.02, inner_steps=4)
    x, new = images(2 * ways), images(7, seed=2)
    full, counted = (
        FewShotClassifier(mine, task_state=state, transductive=transductive).fit(x, labels(ways, 2 * ways))
        for state in ("full", "int8")
    )
    np.testing.assert_allclose(full.predict_proba(new), counted.predict_proba(new), rtol=1e-7)
    state = counted._adapted
    assert isinstance(state, CountedState)
    own_head = ways != 3
    assert (state.learner.model is mine.model) and bool(state.counts.head) is own_head
    parameters = sum(p.numel() for p in counted.module().parameters())
    in_full = sum(t.numel() * 8 for part in (state.counts.head, state.counts.statistics) for t in part.values())
    assert state.counts.bytes() == parameters + in_full


def test_the_module_is_plain_and_predicts_one_image_at_a_time() -> None:
    fitted = FewShotClassifier(conv(), inner_lr=0.02, inner_steps=2).fit(images(6), labels(3, 6))
    module, new = fitted.module(), images(3, seed=2)
    assert not module.training and type(module) is signmaml.Conv4
    with torch.no_grad():
        scores = torch.cat([module(image[None]) for image in new])
    np.testing.assert_allclose(scores, fitted.decision_function(new), rtol=1e-9)


def test_fit_each_gives_what_fit_gives() -> None:
    mine = FewShotClassifier(Learner.of(conv(), inner_lr=0.02, inner_steps=3))
    tasks = [(images(6, seed=i), labels(3, 6)) for i in range(3)]
    tasks += [(images(8, seed=9), labels(4, 8)), (images(3, seed=8), labels(3, 3))]
    new = images(5, seed=20)
    together = mine.fit_each(tasks)
    assert not mine.__sklearn_is_fitted__()
    for (x, y), found in zip(tasks, together, strict=True):
        alone = copy.deepcopy(mine).fit(x, y)
        assert list(found.classes_) == list(alone.classes_)
        np.testing.assert_allclose(found.predict_proba(new), alone.predict_proba(new), rtol=1e-9)


def test_later_training_of_the_module_changes_no_fitted_classifier() -> None:
    for state in ("full", "int8"):
        model, new = conv(), images(4, seed=2)
        fitted = FewShotClassifier(model, inner_lr=0.02, inner_steps=2, task_state=state).fit(images(6), labels(3, 6))
        before = fitted.predict_proba(new)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        np.testing.assert_array_equal(fitted.predict_proba(new), before)


def test_fitting_changes_neither_the_learner_nor_the_module() -> None:
    model = with_running().train()
    before = copy.deepcopy(model.state_dict())
    mine = Learner.of(model, inner_lr=0.02, inner_steps=2)
    digest = mine.digest
    for head in ("auto", "prototypes"):
        FewShotClassifier(mine, head=head).fit(images(6), labels(3, 6)).predict(images(2))
    assert model.training and mine.digest == digest
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.top = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.second(self.first(x).tanh()).tanh())

    model = Tied().double()
    x = torch.randn(6, 4, dtype=torch.float64)
    fitted = FewShotClassifier(model, inner_lr=0.05, inner_steps=3).fit(x, [0, 1, 2] * 2)
    module = fitted.module()
    assert module.first.weight is module.second.weight
    y = torch.arange(6)[None] % 3
    expected = signmaml_ext.evaluate(model, x[None], y, x[None], y, inner_lr=0.05, inner_steps=3).logits[0]
    np.testing.assert_allclose(fitted.decision_function(x), expected, rtol=1e-9)


# ---- Examples of any kind


def test_integers_are_numbers_unless_the_model_takes_them() -> None:
    table = np.arange(24).reshape(6, 4)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    fitted = FewShotClassifier(network, inner_lr=0.1, inner_steps=3).fit(table, [0, 0, 0, 1, 1, 1])
    as_floats = FewShotClassifier(network, inner_lr=0.1, inner_steps=3).fit(
        table.astype(np.float32), [0, 0, 0, 1, 1, 1]
    )
    assert np.array_equal(fitted.predict_proba(table), as_floats.predict_proba(table.astype(np.float32)))
    assert np.array_equal(fitted.predict_proba(table > 3), as_floats.predict_proba((table > 3).astype(np.float32)))
    words = nn.Sequential(nn.Embedding(24, 3), nn.Flatten(), nn.Linear(12, 2))
    learner = Learner.of(words, inner_lr=0.1, inner_steps=3)
    with pytest.raises(
        ValueError, match=r"X: expected examples that Sequential takes, found int64 \[6, 3\]: "
    ):  # and nothing is remembered
        FewShotClassifier(learner).fit(table[:, :3], [0, 0, 0, 1, 1, 1])
    of_words = FewShotClassifier(learner).fit(table, [0, 0, 0, 1, 1, 1])
    assert of_words.predict_proba(table).shape == (6, 2)


def test_one_example_is_not_taken_for_several(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    fitted = FewShotClassifier(network, inner_lr=0.1, inner_steps=3).fit(table, [0, 0, 0, 1, 1, 1])
    fitted.save(tmp_path / "a.safetensors")
    for classifier in (fitted, FewShotClassifier.load(tmp_path / "a.safetensors", network)):
        with pytest.raises(ValueError, match=r"X: expected examples \[n, 4\] as in fit, found shape \[4\]"):
            classifier.predict(table[0])
        assert classifier.predict(table[:1]).shape == (1,)


@pytest.mark.slow
def test_files_become_what_training_made_of_them(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIGNMAML_CACHE", str(tmp_path))
    decoded = folder(run.parent / "images", "test", progress=False)
    sampler = EpisodeSampler(decoded, ways=3, shots=1, queries=1, tasks=1, normalize="signed")
    _, rows = sampler.draw_indices(0, 1)
    episode = sampler.draw_tasks(0, 1)
    every = [path for place in sorted((run.parent / "images" / "test").iterdir()) for path in sorted(place.iterdir())]
    chosen = [every[row] for row in rows[0, :, 0].tolist()]
    assert torch.equal(Learner.load(run, device="cpu").inputs(chosen), episode.support_x[0])


def _pixels(channels_last: bool = True) -> list[np.ndarray]:
    found = [toy_images(size=SIDE, channels=3).images_of(c)[0].numpy() for c in range(3)]
    return [np.ascontiguousarray(p.transpose(1, 2, 0)) if channels_last else p for p in found]


COLOUR = ExampleFormat((3, SIDE, SIDE))
KINDS: dict[str, Callable[[Path], Any]] = {
    "PIL images": lambda _: [Image.fromarray(p) for p in _pixels()],
    "paths": lambda place: [_saved(place, i, p) for i, p in enumerate(_pixels())],
    "strings": lambda place: [str(_saved(place, i, p)) for i, p in enumerate(_pixels())],
    "an array of strings": lambda place: np.array([str(_saved(place, i, p)) for i, p in enumerate(_pixels())]),
    "an array of paths": lambda place: np.array([_saved(place, i, p) for i, p in enumerate(_pixels())], dtype=object),
    "arrays, channels last": lambda _: np.stack(_pixels()),
    "arrays, channels first": lambda _: np.stack(_pixels(False)),
    "a list of arrays": lambda _: _pixels(),
    "a tensor": lambda _: torch.from_numpy(np.stack(_pixels(False))),
    "a list of tensors": lambda _: [torch.from_numpy(p) for p in _pixels(False)],
    "inputs": lambda _: np.stack(_pixels(False)) / 255.0,
    "inputs, channels last": lambda _: np.stack(_pixels()) / 255.0,
    "lists of numbers": lambda _: (np.stack(_pixels(False)) / 255.0).tolist(),
}


def _saved(place: Path, number: int, pixels: np.ndarray) -> Path:
    path = place / f"{number}.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_example_gives_the_same_inputs(kind: str, tmp_path: Path) -> None:
    expected = torch.from_numpy(np.stack(_pixels(False))).float() / 255
    found = COLOUR.inputs(KINDS[kind](tmp_path))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-7)


def test_images_are_resized_made_grey_inverted_and_normalised() -> None:
    white = Image.new("RGB", (40, 30), "white")
    inputs = ExampleFormat((1, SIDE, SIDE), "signed", invert=True).inputs([white, Image.new("L", (9, 9), 0)])
    assert inputs.shape == (2, 1, SIDE, SIDE)
    assert inputs[0].unique().tolist() == [-1.0] and inputs[1].unique().tolist() == [1.0]
    by_moments = ExampleFormat((3, SIDE, SIDE), ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)))
    seen = by_moments.inputs([white])[0, :, 0, 0]
    torch.testing.assert_close(seen, torch.tensor([5.0, 3.0, 0.7 / 0.3]), rtol=1e-5, atol=0)
    assert ExampleFormat.from_json(by_moments.to_json()) == by_moments


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], ValueError, "X: expected at least one example, found none"),
        ("a.png", TypeError, "X: expected several examples, such as a list, found one str"),
        (3, TypeError, "X: expected an array, a tensor or a list, found int"),
        (["nowhere.png"], FileNotFoundError, "image: expected a file, found nothing at nowhere.png"),
        (["a.png", 3], TypeError, "X: expected files or images, found int at 1"),
        (np.zeros((2, 5), np.float32), ValueError, r"X: expected examples of 3 x 16 x 16, found \[5\]"),
        (np.full((2, 3, 16, 16), np.nan), ValueError, "X: expected finite numbers, found NaN or Inf"),
        (
            np.zeros((2, 3, 16, 16), np.int64),
            TypeError,
            "X: expected pixels as uint8 or floating-point inputs, found int64",
        ),
        (np.zeros((2, 7, 7, 2), np.uint8), ValueError, r"X: expected images \[H, W\], .* found uint8 \[7, 7, 2\]"),
        ([[1.0], [1.0, 2.0]], TypeError, "X: expected examples of one kind and shape"),
        ([object()], TypeError, "X: expected numbers, images or paths of files, found object"),
        (np.zeros((2, 768)), ValueError, r"X: expected examples of 3 x 16 x 16, found \[768\]"),
        (np.zeros((2, 768), np.uint8), ValueError, r"X: expected images \[H, W\], .* found uint8 \[768\]"),
        (np.zeros((16, 16, 3), np.uint8), ValueError, r"X: expected several images .* found \[16, 16, 3\]; one image?"),
        ([np.zeros((16, 16, 3)), np.zeros((16, 16, 3), np.uint8)], TypeError, "X: .* found uint8 beside others"),
        (np.array(3.0), ValueError, r"X: expected examples \[n, ...\], found a single value"),
        (np.float64(1), TypeError, "X: expected an array, a tensor or a list, found float64"),
        (torch.tensor(1.0), ValueError, r"X: expected examples \[n, ...\], found a single number"),
    ],
)
def test_examples_that_do_not_fit(examples: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        COLOUR.inputs(examples)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    with pytest.raises(ValueError, match=r"image: cannot decode .*bad\.png"):
        COLOUR.inputs([bad])


def test_a_module_takes_images_only_with_a_format() -> None:
    classifier = FewShotClassifier(conv(), inner_lr=0.01, inner_steps=1)
    with pytest.raises(TypeError, match=r"an ExampleFormat: Learner.of\(module, example="):
        classifier.fit([Image.new("L", (4, 4))] * 2, [0, 1])
    mine = Learner.of(conv(), inner_lr=0.01, inner_steps=1, example=FORMAT)
    pictures = [Image.fromarray((255 * image[0]).byte().numpy()) for image in images(3)]
    assert FewShotClassifier(mine).fit(pictures, [5, 6, 7]).predict_proba(pictures).shape == (3, 3)


# ---- Labels and arguments


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (["b", "a", "c"] * 2, ["a", "b", "c"]),
        (np.array([7, 3, 5] * 2), [3, 5, 7]),
        (torch.tensor([7, 3, 5] * 2), [3, 5, 7]),
        (np.array([True, False, True] * 2), [False, True]),
        (np.array([2.0, 1.0, 4.0] * 2), [1.0, 2.0, 4.0]),
        ([("a", 1), ("b", 2), ("a", 2)] * 2, [("a", 1), ("a", 2), ("b", 2)]),
    ],
)
def test_labels_of_any_kind(y: Any, classes: list[Any]) -> None:
    x = images(6)
    fitted = FewShotClassifier(conv(), inner_lr=0.05, inner_steps=20).fit(x, y)
    assert fitted.classes_.tolist() == classes
    assert fitted.predict(x).tolist() == [label.item() if hasattr(label, "item") else label for label in y]
    assert fitted.score(x, y) == 1.0
    assert fitted.score(x, y, sample_weight=[1, 2, 3, 4, 5, 6]) == 1.0


@pytest.mark.parametrize(
    ("changes", "y", "error", "message"),
    [
        ({}, ["a"] * 6, ValueError, "y: expected at least 2 classes, found 1"),
        ({}, ["a", "b"], ValueError, "y: expected 6 labels, one for each example of X, found 2"),
        ({}, np.linspace(0, 1, 6), ValueError, "y: expected class labels, found fractions; FewShotRegressor"),
        ({}, np.zeros((6, 2)), ValueError, r"y: expected labels \[n\], found shape \[6, 2\]"),
        ({}, "abcdef", TypeError, "y: expected labels, one for each example, found str"),
        ({}, ["a", 1] * 3, TypeError, "y: expected labels that can be sorted"),
        ({"head": "zero"}, [0, 1] * 3, ValueError, "head: expected one of"),
        ({"task_state": "int4"}, [0, 1] * 3, ValueError, "task_state: expected 'full' or 'int8', found 'int4'"),
        ({"transductive": 1}, [0, 1] * 3, TypeError, "transductive: expected True or False, found 1"),
        ({"inner_lr": None}, [0, 1] * 3, ValueError, "inner_lr: expected a value for a module as the learner"),
        ({"inner_steps": -1}, [0, 1] * 3, ValueError, "inner_steps"),
        (
            {"learner": 3},
            [0, 1] * 3,
            TypeError,
            "learner: expected a run folder, a weights file, a module or a Learner",
        ),
        ({"learner": "nowhere"}, [0, 1] * 3, FileNotFoundError, "nowhere"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], y: Any, error: type[Exception], message: str) -> None:
    classifier = FewShotClassifier(conv(), inner_lr=0.01, inner_steps=1).set_params(**changes)
    with pytest.raises(error, match=message):
        classifier.fit(images(6), y)
    assert not classifier.__sklearn_is_fitted__()


def test_a_failed_fit_keeps_the_previous_one() -> None:
    fitted = FewShotClassifier(conv(), inner_lr=0.01, inner_steps=1).fit(images(6), labels(3, 6))
    before = fitted.predict_proba(images(2))
    with pytest.raises(ValueError, match="classes"):
        fitted.fit(images(6, seed=5), ["a"] * 6)
    np.testing.assert_array_equal(fitted.predict_proba(images(2)), before)


def test_an_inner_loop_that_blows_up_is_an_error() -> None:
    mine = Learner.of(conv(norm="none"), inner_lr=1e200, inner_steps=4, method="fo-maml")
    with pytest.raises(FloatingPointError):
        FewShotClassifier(mine).fit(images(6), labels(3, 6))


def test_before_fit() -> None:
    classifier = FewShotClassifier(conv(), inner_lr=0.01, inner_steps=1)
    for call in (lambda: classifier.predict(images(2)), classifier.module, lambda: classifier.save("x.safetensors")):
        with pytest.raises(ValueError, match="expected a call of fit first"):
            call()


# ---- Runs


def test_a_run_folder_a_file_and_a_learner_are_the_same(run: Path) -> None:
    x, y = files_of(run, 3, 2)
    sources = run, str(run), run / "best.safetensors", Learner.load(run, device="cpu")
    first, *others = (FewShotClassifier(source, device="cpu").fit(x, y).predict_proba(x) for source in sources)
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_a_run_adapts_as_it_did_when_it_was_tested(run: Path) -> None:
    x, y = files_of(run, 3, 4)
    mine = Learner.load(run, device="cpu")
    inputs = mine.inputs(x)
    numbers = torch.arange(3).repeat_interleave(4)
    trainer_model = signmaml.Conv4(3, 1, 4, SIDE, layers=2)
    signmaml.load_weights(trainer_model, run / "best.safetensors")
    expected = signmaml_ext.evaluate(
        trainer_model.eval(), inputs[None], numbers[None], inputs[None], numbers[None],
        inner_lr=0.01, inner_steps=3, batch_norm="support",
    )  # fmt: skip
    found = FewShotClassifier(mine).fit(x, y).decision_function(x)
    # float32 sign steps may part at a gradient near 0, but not on the same inputs in the same order
    np.testing.assert_allclose(found, expected.logits[0], rtol=1e-3, atol=1e-3)


def test_a_newer_checkpoint_of_a_run_is_seen(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "weights.safetensors"
    mine.write_bytes((run / "best.safetensors").read_bytes())
    x, y = files_of(run, 3, 2)
    before = FewShotClassifier(mine, device="cpu").fit(x, y).predict_proba(x)
    tensors, metadata = signmaml.checkpoint.load(mine)
    tensors["classifier.bias"] += torch.arange(3.0)
    signmaml.checkpoint.save(mine, tensors, kind="weights", metadata=metadata)
    assert not np.array_equal(FewShotClassifier(mine, device="cpu").fit(x, y).predict_proba(x), before)


def test_overrides_of_a_run(run: Path) -> None:
    mine = Learner.load(run, "last", device="cpu", inner_lr=0.2, test_steps=7, method="fo-maml")
    assert mine.in_words() == "fo-maml, 7 steps of 0.2"
    with pytest.raises(ValueError, match=r"overrides: expected any of inner_lr, .*found ways"):
        Learner.load(run, ways=4)
    with pytest.raises(ValueError, match="inner_lr: expected a number > 0"):
        Learner.load(run, inner_lr=-1.0)
    with pytest.raises(ValueError, match="checkpoint: expected 'best' or 'last', found 'first'"):
        Learner.load(run, "first")


def test_a_run_with_a_model_of_its_own_takes_the_model(tmp_path: Path) -> None:
    torch.manual_seed(4)
    own = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 6), nn.Tanh(), nn.Linear(6, 3))
    config = TrainConfig(
        ways=3, queries=2, tasks=2, iterations=2, validate_every=0, test_tasks=0, device="cpu", tensorboard=False
    )
    MetaTrainer(config, model=own, train=toy_images(), out=tmp_path / "run", progress=False).fit()
    with pytest.raises(ValueError, match=r"signmaml.Learner.load and model="):
        Learner.load(tmp_path / "run")
    mine = Learner.load(tmp_path / "run", model=own, device="cpu")
    assert mine.example == FORMAT and mine.model is not own
    pixels = toy_images("test").images
    fitted = FewShotClassifier(mine).fit(pixels[::10][:4], list("abcd"))
    assert fitted.predict(pixels[:2]).shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["scalar", "per-layer", "per-parameter"])
def test_learned_rates_serve_other_heads(tmp_path: Path, learn: str) -> None:
    config = TrainConfig(
        ways=3, queries=2, tasks=2, iterations=3, validate_every=0, test_tasks=0, model="conv2", filters=4,
        learn_inner_lr=learn, device="cpu", tensorboard=False, data="glyphs",
    )  # fmt: skip
    sets = {"train": toy_images(classes=6)}
    trainer = MetaTrainer(config, out=tmp_path / "run", progress=False, **sets)
    trainer.fit()
    mine = Learner.load(tmp_path / "run", model=trainer.model, device="cpu")
    pixels = toy_images("test").images
    for ways in (2, 3, 5):
        fitted = FewShotClassifier(mine).fit(pixels[::10][:ways], range(ways))
        assert fitted.predict_proba(pixels[:4]).shape == (4, ways)


# ---- Files


@pytest.mark.parametrize("state", ["full", "int8"])
@pytest.mark.parametrize(("ways", "head"), [(3, "auto"), (5, "auto"), (2, "trained")])
def test_a_saved_classifier_predicts_the_same(run: Path, tmp_path: Path, state: str, ways: int, head: str) -> None:
    x, y = files_of(run, ways, 2)
    fitted = FewShotClassifier(run, device="cpu", task_state=state, head=head, inner_lr=0.03).fit(x, y)
    fitted.save(tmp_path / "adapted.safetensors")
    given = run if state == "int8" else None
    loaded = FewShotClassifier.load(tmp_path / "adapted.safetensors", given, device="cpu")
    assert list(loaded.classes_) == list(fitted.classes_) and loaded.head == head
    np.testing.assert_array_equal(loaded.predict_proba(x), fitted.predict_proba(x))
    assert loaded.in_words() == fitted.in_words()
    with open(tmp_path / "adapted.safetensors", "rb") as file:
        assert b"pickle" not in file.read(2000)


def test_an_int8_file_is_small_and_only_for_its_own_learner(run: Path, tmp_path: Path) -> None:
    wide = signmaml.MLP(SIDE * SIDE, 3, (64,))
    mine = Learner.of(wide, inner_lr=0.01, inner_steps=3, example=FORMAT)
    x, y = files_of(run, 3, 2)
    small, full = (
        FewShotClassifier(mine, task_state=state).fit(x, y) for state in ("int8", "full")
    )  # fmt: skip
    small.save(tmp_path / "small.safetensors")
    full.save(tmp_path / "full.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("small", "full")]
    assert 3 * sizes[0] < sizes[1]
    found = FewShotClassifier.load(tmp_path / "small.safetensors", mine)
    np.testing.assert_array_equal(found.predict_proba(x), small.predict_proba(x))
    for path in ("small", "full"):
        with pytest.raises(ValueError, match="load: expected learner= for a file that holds"):
            FewShotClassifier.load(tmp_path / f"{path}.safetensors")
    other = Learner.of(signmaml.MLP(SIDE * SIDE, 3, (64,)), inner_lr=0.01, inner_steps=3, example=FORMAT)
    with pytest.raises(ValueError, match="load: expected the learner that it was adapted from"):
        FewShotClassifier.load(tmp_path / "small.safetensors", other)
    again = FewShotClassifier.load(tmp_path / "full.safetensors", other)  # full parameters replace all of the other's
    np.testing.assert_array_equal(again.predict_proba(x), full.predict_proba(x))


def test_files_of_other_kinds_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected an adapted file, found a weights file"):
        FewShotClassifier.load(run / "best.safetensors")
    x = torch.linspace(-1, 1, 6)[:, None]
    FewShotRegressor(signmaml.MLP(1, 1), inner_lr=0.01, inner_steps=1).fit(x, x[:, 0]).save(tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match="expected a FewShotClassifier, found a FewShotRegressor"):
        FewShotClassifier.load(tmp_path / "r.safetensors")
    tensors, metadata = signmaml.checkpoint.load(tmp_path / "r.safetensors")
    del metadata["parameters"]
    signmaml.checkpoint.save(tmp_path / "r.safetensors", tensors, kind="adapted", metadata=metadata)
    with pytest.raises(ValueError, match="damaged header"):
        FewShotRegressor.load(tmp_path / "r.safetensors", signmaml.MLP(1, 1))


def test_labels_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    y = [("a", 1), ("b", 2), ("c", 3)] * 2
    fitted = FewShotClassifier(conv(), inner_lr=0.01, inner_steps=1).fit(images(6), y)
    with pytest.raises(TypeError, match="save: expected labels that are strings or integers"):
        fitted.save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_pickling(run: Path) -> None:
    x, y = files_of(run, 3, 2)
    for state in ("full", "int8"):
        fitted = FewShotClassifier(run, device="cpu", task_state=state).fit(x, y)
        again = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))


# ---- Regression


def waves(tasks: int = 1) -> tuple[Tensor, ...]:
    sampler = signmaml.SinusoidSampler(shots=10, queries=15, tasks=tasks)
    return tuple(part[0].double() for part in sampler.draw(0))


@pytest.mark.parametrize("state", ["full", "int8"])
def test_a_regressor_predicts_as_evaluate(state: str, tmp_path: Path) -> None:
    model = signmaml.MLP(1, 1, (20,)).double()
    x, y, new_x, new_y = waves()
    mine = FewShotRegressor(Learner.of(model, inner_lr=0.01, inner_steps=5), task_state=state)
    expected = signmaml_ext.evaluate(
        model, x[None], y[None], new_x[None], new_y[None], inner_lr=0.01, inner_steps=5, loss="mse"
    ).logits[0]
    np.testing.assert_allclose(mine.fit(x, y).predict(new_x), expected, rtol=1e-9)
    flat = mine.fit(x.numpy(), y[:, 0].numpy())
    np.testing.assert_allclose(flat.predict(new_x), expected[:, 0], rtol=1e-9)
    flat.save(tmp_path / "wave.safetensors")
    again = FewShotRegressor.load(tmp_path / "wave.safetensors", mine.learner)
    np.testing.assert_array_equal(again.predict(new_x), flat.predict(new_x))


def test_the_score_of_a_regressor_is_r2() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    model = signmaml.MLP(2, 2, (8,))
    x, y = torch.randn(12, 2), torch.randn(12, 2)
    mine = FewShotRegressor(model, inner_lr=0.01, inner_steps=3).fit(x, y)
    weights = np.arange(1.0, 13.0)
    assert mine.score(x, y) == pytest.approx(metrics.r2_score(y, mine.predict(x)), rel=1e-6)
    assert mine.score(x, y, weights) == pytest.approx(metrics.r2_score(y, mine.predict(x), sample_weight=weights))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([1.0, 2.0], "y: expected 6 targets, one for each example of X, found 2"),
        ([np.nan] * 6, "y: expected finite targets of torch.float32, found NaN, Inf or larger ones"),
        ([1e300] * 6, "y: expected finite targets of torch.float32, found NaN, Inf or larger ones"),
        (np.zeros((6, 1, 1)), r"y: expected targets \[n\] or \[n, targets\]"),
        (np.zeros((6, 2)), r"targets' shape \[6, 2\] for loss 'mse', found shape \[6, 1\]"),
    ],
)
def test_targets_that_do_not_fit(y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotRegressor(signmaml.MLP(1, 1), inner_lr=0.01, inner_steps=1).fit(torch.zeros(6, 1), y)


def test_classifier_and_regressor_refuse_each_others_learners(run: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data="sinusoid", model="mlp", shots=5, iterations=2, validate_every=0, test_tasks=0, device="cpu",
        tensorboard=False,
    )  # fmt: skip
    MetaTrainer(config, out=tmp_path / "waves", progress=False).fit()
    x, y, new_x, _ = waves()
    assert FewShotRegressor(tmp_path / "waves", device="cpu").fit(x, y[:, 0]).predict(new_x).shape == (15,)
    with pytest.raises(ValueError, match=r"expected one that predicts classes, found Learner\(.*loss 'mse'"):
        FewShotClassifier(tmp_path / "waves", device="cpu").fit(x, [0, 1] * 5)
    with pytest.raises(ValueError, match="expected one that predicts numbers"):
        FewShotRegressor(run, device="cpu").fit(*files_of(run, 3, 1)[:1], [1.0, 2.0, 3.0])


# ---- scikit-learn


@pytest.fixture
def sklearn() -> Any:
    return pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.mark.slow
def test_clones_searches_and_cross_validation(run: Path, sklearn: Any) -> None:
    from sklearn.base import clone, is_classifier, is_regressor
    from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score

    classifier = FewShotClassifier(run, device="cpu")
    assert is_classifier(classifier) and not is_regressor(classifier)
    assert is_regressor(FewShotRegressor("anything"))
    x, y = files_of(run, 3, 6)
    copied = clone(classifier.fit(x, y))
    assert not copied.__sklearn_is_fitted__() and copied.get_params() == classifier.get_params()
    mine = Learner.load(run, device="cpu")
    assert clone(FewShotClassifier(mine)).learner is mine
    scores = cross_val_score(classifier, x, y, cv=3)
    assert scores.shape == (3,) and scores.min() >= 0 and scores.max() <= 1
    pixels = np.stack([np.asarray(Image.open(path)) for path in x])
    np.testing.assert_array_equal(scores, cross_val_score(classifier, pixels, np.array(y), cv=3))
    np.testing.assert_array_equal(scores, cross_val_score(classifier, torch.from_numpy(pixels), y, cv=3))
    assert cross_val_predict(classifier, x, y, cv=3, method="predict_proba").shape == (18, 3)
    losses = cross_val_score(classifier, x, y, cv=3, scoring="neg_log_loss")
    assert np.isfinite(losses).all()
    grid = {"inner_lr": [0.01, 0.1], "inner_steps": [1, 3], "head": ["trained", "prototypes"]}
    search = GridSearchCV(classifier, grid, cv=2).fit(x, y)
    assert set(search.best_params_) == set(grid) and search.predict(x).shape == (18,)


def test_in_a_pipeline(sklearn: Any) -> None:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = signmaml.MLP(4, 2)
    x, y = np.random.default_rng(0).normal(5, 3, (20, 4)), ["no", "yes"] * 10
    pipeline = make_pipeline(StandardScaler(), FewShotClassifier(model, inner_lr=0.01, inner_steps=3)).fit(x, y)
    scaled = StandardScaler().fit_transform(x)
    alone = FewShotClassifier(model, inner_lr=0.01, inner_steps=3).fit(scaled, y)
    np.testing.assert_array_equal(pipeline.predict_proba(x), alone.predict_proba(scaled))
    assert pipeline.set_params(fewshotclassifier__inner_steps=1)[-1].inner_steps == 1


def test_parameters_and_repr() -> None:
    classifier = FewShotClassifier("runs/x", head="prototypes")
    assert repr(classifier) == "FewShotClassifier(learner='runs/x', head='prototypes')"
    assert list(classifier.get_params()) == [
        "learner", "inner_lr", "inner_steps", "head", "transductive", "task_state", "device",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"set_params: expected any of learner, .*found 'ways'"):
        classifier.set_params(ways=3)


def test_a_head_that_the_inner_loop_does_not_move_stays_with_its_task() -> None:
    mine = Learner.of(conv(), inner_lr=0.05, inner_steps=2, adapt=["features.*"])
    tasks = [(images(4, seed=i), labels(4, 4)) for i in range(2)]
    new = images(3, seed=9)
    for state in ("full", "int8"):
        first = FewShotClassifier(mine, task_state=state).fit(*tasks[0])
        before = first.predict_proba(new)
        second = FewShotClassifier(mine, task_state=state).fit(*tasks[1])
        np.testing.assert_array_equal(first.predict_proba(new), before)
        assert not np.allclose(second.predict_proba(new), before)


@pytest.mark.slow
def test_threads_share_a_learner() -> None:
    mine = Learner.of(conv(), inner_lr=0.05, inner_steps=2)
    tasks = [(images(8, seed=i), labels(4, 8)) for i in range(12)]
    new = images(3, seed=99)

    def answer(task: tuple[Tensor, list[str]]) -> np.ndarray:
        return FewShotClassifier(mine).fit(*task).predict_proba(new)

    expected = [answer(task) for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, tasks))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_flattened_grey_images_are_clear() -> None:
    grey = ExampleFormat((1, SIDE, SIDE))
    pixels = toy_images(size=SIDE).images[:3]
    expected = grey.inputs(pixels)
    for same in (pixels.reshape(3, -1), pixels[:, 0], (pixels / 255.0).reshape(3, -1), (pixels[:, 0] / 255.0).numpy()):
        torch.testing.assert_close(grey.inputs(same).float(), expected, rtol=0, atol=1e-7)


def test_arrays_of_other_byte_orders_and_widths() -> None:
    points = np.arange(6.0).reshape(3, 2)
    for kind in (">f4", "<f8", "longdouble", "f2"):
        found = ExampleFormat((2,)).inputs(points.astype(kind))
        assert found.tolist() == points.tolist()


def test_numbers_beyond_the_models_type_are_refused() -> None:
    model = signmaml.MLP(2, 2)
    fitted = FewShotClassifier(model, inner_lr=0.01, inner_steps=1).fit(np.eye(2), [0, 1])
    with pytest.raises(ValueError, match="X: expected numbers that float32 holds, found larger"):
        fitted.predict(np.full((1, 2), 1e300))


@pytest.mark.parametrize("transductive", [False, True])
def test_bfloat16(transductive: bool) -> None:
    model = conv().float()
    mine = Learner.of(model, inner_lr=0.02, inner_steps=2, precision="bf16")
    x, new = images(6).float(), images(5, seed=2).float()
    fitted = FewShotClassifier(mine, transductive=transductive).fit(x, labels(3, 6))
    strict = FewShotClassifier(model, inner_lr=0.02, inner_steps=2, transductive=transductive).fit(x, labels(3, 6))
    np.testing.assert_allclose(fitted.predict_proba(new), strict.predict_proba(new), atol=0.1)
    assert FewShotClassifier(mine).fit(images(8).float(), labels(4, 8)).predict_proba(new).shape == (5, 4)


def test_a_learner_of_running_statistics_is_not_transductive() -> None:
    mine = Learner.of(with_running(), inner_lr=0.02, inner_steps=2, batch_norm="running")
    with pytest.raises(ValueError, match="transductive: expected False for a learner with batch_norm 'running'"):
        FewShotClassifier(mine, transductive=True).fit(images(6), labels(3, 6))


def test_large_integers_stay_apart() -> None:
    large = [2**63 + 10, 2**63 + 11, 5] * 2
    fitted = FewShotClassifier(conv(), inner_lr=0.05, inner_steps=20).fit(images(6), large)
    assert fitted.classes_.tolist() == [5, 2**63 + 10, 2**63 + 11]
    assert fitted.predict(images(6)).tolist() == large


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        ([0, 1, float("nan")] * 2, ValueError, "found NaN or Inf"),
        (np.array([0, 1, np.inf] * 2), ValueError, "found NaN or Inf"),
        ([0.5, 1.5, 2.5] * 2, ValueError, "found fractions"),
        (np.array([1j, 2, 3] * 2), TypeError, "found complex numbers"),
    ],
)
def test_labels_that_are_no_classes(y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"y: expected class labels, {message}"):
        FewShotClassifier(conv(), inner_lr=0.01, inner_steps=1).fit(images(6), y)


def test_scores_compare_what_can_be_compared() -> None:
    x = images(6)
    fitted = FewShotClassifier(conv(), inner_lr=0.01, inner_steps=1).fit(x, labels(3, 6))
    with pytest.raises(ValueError, match="y: expected 6 labels, one for each example of X, found 1"):
        fitted.score(x, ["class 0"])
    with pytest.raises(TypeError, match="y: expected str as in fit, found numbers"):
        fitted.score(x, [0, 1, 2] * 2)
    for strange in ([0.0, 1.0, 2.0] * 2, np.array(labels(3, 6), dtype="S")):
        with pytest.raises(TypeError, match=r"y: expected str as in fit, found (numbers|bytes)"):
            fitted.score(x, strange)
    right = fitted.predict(x) == np.array(labels(3, 6))
    assert fitted.score(x, labels(3, 6), sample_weight=np.arange(6) < 3) == pytest.approx(right[:3].mean())
    with pytest.raises(TypeError, match="sample_weight: expected real numbers, found <U1"):
        fitted.score(x, labels(3, 6), sample_weight=list("abcdef"))
    with pytest.raises(ValueError, match="sample_weight: expected 6 numbers"):
        fitted.score(x, labels(3, 6), sample_weight=[1, 2])
    wave = FewShotRegressor(signmaml.MLP(1, 2), inner_lr=0.01, inner_steps=1).fit(np.ones((3, 1)), np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"y: expected targets \[3, 2\] as in fit, found \[6\]"):
        wave.score(np.ones((3, 1)), np.ones(6))
    with pytest.raises(TypeError, match="y: expected real numbers, found <U1"):
        wave.fit(np.ones((3, 1)), list("abc"))


def test_a_module_that_a_caller_changes_changes_nothing_else() -> None:
    mine = Learner.of(conv(), inner_lr=0.05, inner_steps=2, adapt=["classifier.*"])
    x, new = images(6), images(3, seed=2)
    for state in ("full", "int8"):
        first, second = (FewShotClassifier(mine, task_state=state).fit(x, labels(3, 6)) for _ in range(2))
        before = second.predict_proba(new)
        with torch.no_grad():
            for parameter in first.module().parameters():
                parameter.add_(1)
        np.testing.assert_array_equal(first.predict_proba(new), before)
        np.testing.assert_array_equal(second.predict_proba(new), before)


@pytest.mark.parametrize("number", [np.float32(0.02), np.float64(0.02), torch.tensor(0.02, dtype=torch.float64)])
@pytest.mark.parametrize("state", ["full", "int8"])
def test_numbers_of_other_libraries_are_stored(tmp_path: Path, number: Any, state: str) -> None:
    model = conv()
    mine = FewShotClassifier(model, inner_lr=number, inner_steps=np.int64(2), task_state=state)
    fitted, new = mine.fit(images(6), labels(3, 6)), images(3, seed=2)
    fitted.save(tmp_path / "a.safetensors")
    given = model if state == "full" else Learner.of(model, inner_lr=number, inner_steps=2)
    again = FewShotClassifier.load(tmp_path / "a.safetensors", given)
    np.testing.assert_array_equal(again.predict_proba(new), fitted.predict_proba(new))
    assert again.in_words() == fitted.in_words()


def test_rates_that_a_file_cannot_hold(tmp_path: Path) -> None:
    model = conv()
    rates = {name: torch.tensor(0.02, dtype=torch.float64) for name, _ in model.named_parameters()}
    x, new = images(6), images(3, seed=2)
    full = FewShotClassifier(model, inner_lr=rates, inner_steps=2).fit(x, labels(3, 6))
    full.save(tmp_path / "a.safetensors")
    again = FewShotClassifier.load(tmp_path / "a.safetensors", model)
    np.testing.assert_array_equal(again.predict_proba(new), full.predict_proba(new))
    assert again.in_words()["steps"] == "sign-maml, 2 steps of learned rates"
    counted = FewShotClassifier(model, inner_lr=rates, inner_steps=2, task_state="int8").fit(x, labels(3, 6))
    with pytest.raises(TypeError, match="save: expected inner_lr as a number, or rates as part of a Learner"):
        counted.save(tmp_path / "b.safetensors")


def test_a_wrong_learner_is_named_as_such(run: Path, tmp_path: Path) -> None:
    x, y = files_of(run, 3, 1)
    FewShotClassifier(run, device="cpu").fit(x, y).save(tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match="learner: expected a run folder"):
        FewShotClassifier.load(tmp_path / "a.safetensors", 5)  # type: ignore[arg-type]


def test_overrides_outlive_saving(run: Path, tmp_path: Path) -> None:
    x, y = files_of(run, 3, 2)
    mine = Learner.load(run, device="cpu", precision="bf16", test_steps=7)
    fitted = FewShotClassifier(mine).fit(x, y)
    fitted.save(tmp_path / "a.safetensors")
    again = FewShotClassifier.load(tmp_path / "a.safetensors", device="cpu")
    np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))
    assert again.in_words()["steps"] == "sign-maml, 7 steps of 0.01"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inner_lr": "x"}, TypeError, "inner_lr: expected a number, a tensor or a mapping, found str"),
        ({"inner_steps": 1.5}, TypeError, "inner_steps: expected an integer, found 1.5"),
        ({"inner_steps": -1}, ValueError, "inner_steps: expected an integer >= 0, found -1"),
        ({"method": "reptile"}, ValueError, "method: expected one of 'sign-maml', 'fo-maml', 'maml', found 'reptile'"),
        ({"example": (1, 2)}, TypeError, "example: expected an ExampleFormat or None, found tuple"),
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, found int"),
        ({"ways": 3}, ValueError, "options: expected any of method, .* found ways"),
    ],
)
def test_learners_of_modules_are_checked(options: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": conv(), "inner_lr": 0.1, "inner_steps": 1, **options}
    with pytest.raises(error, match=message):
        Learner.of(arguments.pop("model"), **arguments)


def test_a_rate_as_a_tensor_is_no_learned_one() -> None:
    mine = Learner.of(conv(), inner_lr=torch.tensor(0.5), inner_steps=2)
    assert mine.in_words() == "sign-maml, 2 steps of 0.5"
    assert mine.changed(inner_steps=5).in_words() == "sign-maml, 5 steps of 0.5"
    rates = {name: torch.tensor(0.1) for name, _ in conv().named_parameters()}
    with pytest.raises(ValueError, match="inner_steps: expected 2 with the learned rates, found 3"):
        Learner.of(conv(), inner_lr=rates, inner_steps=2).changed(inner_steps=3)


def test_sets_that_a_caller_loaded_keep_their_inversion(tmp_path: Path) -> None:
    """A loader such as Omniglot's has inverted the pixels, so files must be inverted too."""
    drawn = toy_images(size=28)
    images = ImageSet("own", "train", drawn.images, drawn.class_names, drawn.class_sizes, inverted=True)
    config = TrainConfig(
        ways=3, queries=2, tasks=2, iterations=1, validate_every=0, test_tasks=0, device="cpu", tensorboard=False
    )
    trainer = MetaTrainer(config, train=images, out=tmp_path / "run", progress=False)
    trainer.fit()
    example = Learner.load(tmp_path / "run", model=trainer.model, device="cpu").example
    assert example == ExampleFormat((1, 28, 28), invert=True)


def test_a_file_of_an_adapted_network_is_no_start_for_another_fit(run: Path, tmp_path: Path) -> None:
    """It holds no meta-trained weights."""
    x, y = files_of(run, 3, 2)
    fitted = FewShotClassifier(run, device="cpu").fit(x, y)
    fitted.save(tmp_path / "a.safetensors")
    loaded = FewShotClassifier.load(tmp_path / "a.safetensors", device="cpu")
    for again in (loaded, copy.deepcopy(loaded), loaded.set_params(inner_lr=0.1)):
        with pytest.raises(ValueError, match=r"learner: expected one with trained weights, .*set_params\(learner="):
            again.fit(x, y)
    np.testing.assert_array_equal(loaded.predict_proba(x), fitted.predict_proba(x))
    refitted = loaded.set_params(learner=run, inner_lr=None).fit(x, y)
    np.testing.assert_array_equal(refitted.predict_proba(x), fitted.predict_proba(x))


def test_a_file_says_what_was_fitted_whatever_is_set_later(tmp_path: Path) -> None:
    model, new = conv(), images(3, seed=2)
    fitted = FewShotClassifier(model, inner_lr=0.02, inner_steps=2).fit(images(6), labels(3, 6))
    fitted.set_params(task_state="int8", transductive=True).save(tmp_path / "a.safetensors")
    loaded = FewShotClassifier.load(tmp_path / "a.safetensors", model)
    np.testing.assert_array_equal(loaded.predict_proba(new), fitted.predict_proba(new))


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"batch_norm": "running"}])
def test_a_file_keeps_how_a_modules_learner_computes(tmp_path: Path, options: dict[str, Any]) -> None:
    model, new = with_running().float(), images(3, seed=2).float()
    mine = Learner.of(model, inner_lr=0.02, inner_steps=2, **options)
    fitted = FewShotClassifier(mine).fit(images(6).float(), labels(3, 6))
    fitted.save(tmp_path / "a.safetensors")
    loaded = FewShotClassifier.load(tmp_path / "a.safetensors", model)
    np.testing.assert_array_equal(loaded.predict_proba(new), fitted.predict_proba(new))
    assert loaded.in_words() == fitted.in_words()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: header.pop("classes"), "damaged header in .*: classes"),
        (lambda tensors, header: header.update(prototypes=1), "damaged header in .*: prototypes"),
        (lambda tensors, header: header.update(parameters=[]), "damaged header in .*: parameters"),
        (lambda tensors, header: header.update(input=[4]), "expected the sizes and the dtype of an input"),
        (lambda tensors, header: header["input"].update(dtype="load"), "expected the sizes and the dtype of an input"),
        (lambda tensors, header: header["input"].update(sizes=[10**9, 10**9]), "expected the sizes and the dtype"),
        (lambda tensors, header: header["input"].update(sizes=[0, 10**30]), "expected the sizes and the dtype"),
        (lambda tensors, header: tensors.update({"steps/other": torch.zeros(1, dtype=torch.int8)}), "found others"),
        (lambda tensors, header: tensors.pop("head/classifier.weight"), "expected the weight of the head 'classifier'"),
    ],
)
def test_damaged_files(tmp_path: Path, change: Callable[..., Any], message: str) -> None:
    mine = Learner.of(conv(), inner_lr=0.02, inner_steps=2)
    FewShotClassifier(mine, task_state="int8").fit(images(8), labels(4, 8)).save(tmp_path / "a.safetensors")
    tensors, header = signmaml.checkpoint.load(tmp_path / "a.safetensors")
    change(tensors, header)
    signmaml.checkpoint.save(tmp_path / "a.safetensors", tensors, kind="adapted", metadata=header)
    with pytest.raises(ValueError, match=f"load: .*{message}"):
        FewShotClassifier.load(tmp_path / "a.safetensors", mine)


def test_a_learner_changes_by_numbers_of_numpy() -> None:
    mine = Learner.of(conv(), inner_lr=0.1, inner_steps=2)
    assert mine.changed(inner_lr=np.float32(0.5), inner_steps=np.int64(3)).in_words() == "sign-maml, 3 steps of 0.5"
