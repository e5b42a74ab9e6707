"""TrainConfig: values, files, messages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from signmaml import config as configs
from signmaml.config import TrainConfig
from signmaml.presets import PRESETS

UNUSUAL = {
    "data": "folder", "data_root": "/some/where", "image_size": 32, "rotations": True, "ways": 7, "hidden": [3, 4],
    "inner_lr": 1e-5, "test_steps": 0, "adapt": ["classifier.*", "*.bias"], "test_queries": 15, "tensorboard": True,
}  # fmt: skip


def test_yaml_round_trip(tmp_path: Path) -> None:
    for config in (TrainConfig(), TrainConfig(**UNUSUAL)):
        path = tmp_path / "config.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert TrainConfig.from_dict(configs.read_file(path)) == config


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('ways = 7\ninner_lr = 1e-5\nadapt = ["classifier.*"]\nrotations = true\n', encoding="utf-8")
    found = TrainConfig.from_dict(configs.read_file(path))
    assert found == TrainConfig(ways=7, inner_lr=1e-5, adapt=("classifier.*",), rotations=True)


def test_yaml_number_without_a_dot(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text("outer_lr: 1e-4\n", encoding="utf-8")  # a string by YAML's rules
    assert TrainConfig.from_dict(configs.read_file(path)).outer_lr == 1e-4


def test_empty_file_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n", encoding="utf-8")
    assert TrainConfig.from_dict(configs.read_file(path)) == TrainConfig()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "inner-lr: 1\n", r"c\.yaml: expected fields .*, found 'inner-lr' \(did you mean 'inner_lr'\?\)"),
        ("c.yaml", "ways: [1\n", "expected YAML"),
        ("c.yaml", "!!python/object/apply:os.system [ls]\n", "expected YAML"),
        ("c.yaml", "- ways\n", "expected lines 'field: value', found a list"),
        ("c.toml", "ways = \n", "expected TOML"),
        ("c.json", "{}", "expected a name ending in .yaml"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        configs.read_file(path)


def test_changes_of_images_have_one_order() -> None:
    assert TrainConfig(augment=("crop", "flip", "crop")) == TrainConfig(augment=("flip", "crop"))
    with pytest.raises(ValueError, match="augment: expected none for data 'sinusoid'"):
        TrainConfig(data="sinusoid", model="mlp", augment=("flip",))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        configs.read_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ways", 1, "ways: expected an integer >= 2, found 1"),
        ("ways", 5.0, "ways: expected an integer >= 2, found 5.0"),
        ("ways", True, "ways: expected an integer"),
        ("ways", None, "ways: expected an integer >= 2, found none"),
        ("shots", 0, "shots"),
        ("inner_lr", 0, "inner_lr: expected a number > 0, found 0"),
        ("inner_lr", float("nan"), "inner_lr"),
        ("inner_lr", float("inf"), "inner_lr"),
        ("inner_lr", "fast", "inner_lr: expected a number, found 'fast'"),
        ("method", "sign_maml", r"'maml', found 'sign_maml' \(did you mean 'sign-maml'\?\)"),
        ("rotations", "yes", "rotations: expected true or false"),
        ("hidden", [4, 0], "hidden: expected a list, each an integer >= 1, found 0"),
        ("hidden", {"a": 1}, "hidden: expected a list"),
        ("adapt", [], "adapt: expected none or at least one"),
        ("augment", [], "augment: expected none or at least one"),
        ("augment", ["mirror"], "augment: expected one of 'flip', 'crop', found 'mirror'"),
        ("device", "gpu", "device: expected auto, cpu, cuda"),
        ("data", "folder", "data_root: expected the folder"),
        ("data", "sinusoid", "model: expected 'mlp'"),
        (
            "model",
            "resnet18",
            r"model: expected one of 'convN' .*, 'mlp', found 'resnet18' \(did you mean 'resnet12'\?\)",
        ),
        ("model", "Conv4", r"found 'Conv4' \(did you mean 'conv4'\?\)"),
        ("model", "conv0", "model: expected one of"),
        ("model", "conv4-64-96", "model: expected widths of blocks, 1 or 4 of them, found 2 in 'conv4-64-96'"),
        ("model", "conv4-", "model: expected one of"),
        ("model", "resnet12-64", "model: expected widths of blocks, 4 of them, found 1 in 'resnet12-64'"),
        ("norm", "layer", "norm: expected one of 'batch', 'group', 'instance', 'none', found 'layer'"),
        ("activation", "sine", "activation: expected one of"),
        ("seed", -1, "seed"),
    ],
)
def test_bad_values(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{field: value})


def test_what_a_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm: expected 'batch', the default, for 'mlp' .*, found 'group'"):
        TrainConfig(model="mlp", norm="group")
    with pytest.raises(ValueError, match="pooling: expected 'max' for model 'resnet12', found 'stride'"):
        TrainConfig(model="resnet12", pooling="stride")


def test_learned_rates_need_a_step() -> None:
    with pytest.raises(ValueError, match="inner_steps: expected at least 1"):
        TrainConfig(learn_inner_lr="scalar", inner_steps=0)


def test_every_field_is_described() -> None:
    for entry in dataclasses.fields(TrainConfig):
        assert len(configs.describe(entry.name)) > 10


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_valid(name: str) -> None:
    TrainConfig.from_dict(PRESETS[name])


def test_what_a_resumed_run_may_change() -> None:
    old = TrainConfig()
    allowed = old.replace(iterations=9, device="cpu", log_every=3, checkpoint_every=4, tensorboard=True, out="x")
    assert configs.differences(old, allowed) == []
    assert configs.differences(old, old.replace(inner_lr=0.5, seed=3)) == ["inner_lr: 0.01 -> 0.5", "seed: 0 -> 3"]


def test_data_may_be_named_with_a_hyphen() -> None:
    assert TrainConfig(data="mini-imagenet") == TrainConfig(data="mini_imagenet")


def test_a_configuration_prints_what_differs_from_the_defaults():
    assert repr(TrainConfig()) == "TrainConfig()"
    config = TrainConfig(ways=20, hidden=(8, 8), adapt=["classifier"])
    assert eval(repr(config)) == config
    assert repr(config) == f"TrainConfig(ways=20, hidden=(8, 8), adapt={config.adapt!r})"
