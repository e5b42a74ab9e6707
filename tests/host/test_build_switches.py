"""setup.py: the environment's switches, and the search for nvcc."""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    spec = importlib.util.spec_from_file_location("signmaml_setup", SETUP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refused(driver: ModuleType) -> type[Exception]:
    error: type[Exception] = driver.SetupError
    return error


def fake_nvcc(folder: Path, release: str = "13.0", codes: str = "sm_80 sm_90", refusal: str = "") -> Path:
    """A fake nvcc: answers queries as nvcc does and compiles anything, or fails with the message `refusal`."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    compile_step = f"echo '{refusal}' >&2; exit 1" if refusal else "exit 0"
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.88' ;;\n"
        f"--list-gpu-code) printf '%s\\n' {codes} ;;\n"
        f"*) {compile_step} ;;\n"
        "esac\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_flags(driver):
    for text in ("1", "ON", "true", " yes "):
        assert driver.read_flag({"FORCE_CUDA": text}, "FORCE_CUDA") is True
    for text in ("", "0", "off", "No"):
        assert driver.read_flag({"FORCE_CUDA": text}, "FORCE_CUDA") is False
    assert driver.read_flag({}, "FORCE_CUDA") is False


@pytest.mark.parametrize("name", ["FORCE_CUDA", "SIGNMAML_NO_CUDA", "SIGNMAML_DEBUG", "SIGNMAML_EMULATED"])
def test_bad_flag(driver, refused, name):
    with pytest.raises(refused, match=f"^{name}: expected 1 or 0, found 'maybe'$"):
        driver.read_flag({name: "maybe"}, name)


def test_jobs(driver, refused):
    assert driver.read_jobs({}) is None
    assert driver.read_jobs({"MAX_JOBS": " 3 "}) == 3
    for bad in ("0", "-1", "two", "1.5"):
        with pytest.raises(refused, match=r"^MAX_JOBS: expected a whole number of at least 1, found"):
            driver.read_jobs({"MAX_JOBS": bad})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8.0", ["8.0"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("9.0 8.0", ["8.0", "9.0"]),
        ("8.0, 8.6,", ["8.0", "8.6"]),
        ("9.0a;10.0f", ["9.0a", "10.0f"]),
        ("Hopper", ["9.0+PTX"]),
        ("Ampere;Ada", ["8.0", "8.6+PTX", "8.9+PTX"]),
        ("Blackwell+Tegra", ["11.0"]),
        ("8.0;8.0+PTX;8.0", ["8.0+PTX"]),
        ("12.0;8.0", ["8.0", "12.0"]),
    ],
)
def test_architectures(driver, text, expected):
    assert [str(each) for each in driver.parse_architectures(text)] == expected


@pytest.mark.parametrize("text", ["banana", "8", "8.0;banana", "sm_80", "8.0+SASS", "hopper", ";"])
def test_bad_architectures(driver, refused, text):
    with pytest.raises(refused, match=r"^TORCH_CUDA_ARCH_LIST: expected numbers such as .*; found ") as caught:
        driver.parse_architectures(text)
    assert "\n" not in str(caught.value)


def test_newest_architecture_gets_ptx(driver):
    def complete(text: str) -> list[str]:
        return [str(each) for each in driver.with_ptx_for_newest(driver.parse_architectures(text))]

    assert complete("8.0;9.0") == ["8.0", "9.0+PTX"]
    assert complete("8.0+PTX;9.0") == ["8.0+PTX", "9.0"], "whoever names PTX has chosen"
    assert complete("8.0;9.0a") == ["8.0", "9.0a"], "PTX of an a variant would run on nothing newer"


def test_architectures_in_cmakes_words(driver):
    assert [each.for_cmake() for each in driver.parse_architectures("8.0;9.0a;12.0+PTX")] == [
        "80-real",
        "90a-real",
        "120",
    ]


def test_nvcc_comes_from_cudacxx_first(driver, refused, tmp_path):
    chosen, other = fake_nvcc(tmp_path / "a"), fake_nvcc(tmp_path / "b")
    environment = {"CUDACXX": str(chosen), "CUDA_HOME": str(other.parent.parent)}
    assert driver.find_nvcc(environment)[0] == str(chosen)
    with pytest.raises(refused, match=r"^CUDACXX: expected the path of nvcc, found '/no/nvcc'"):
        driver.find_nvcc({"CUDACXX": "/no/nvcc"})


def test_cuda_home_is_the_only_place_looked_at(driver, tmp_path, monkeypatch):
    on_path = fake_nvcc(tmp_path / "a")
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=os.pathsep)
    assert driver.find_nvcc({})[0] == str(on_path)
    path, reason = driver.find_nvcc({"CUDA_HOME": "/no/cuda"})
    assert path is None
    assert reason == "CUDA_HOME is /no/cuda, and there is no bin/nvcc in it."


def test_nvcc_is_asked_what_it_can_do(driver, tmp_path):
    nvcc = driver.probe_nvcc(str(fake_nvcc(tmp_path, "12.4", "sm_80 sm_90 sm_90a")), {})
    assert nvcc.version == (12, 4)
    assert nvcc.supported >= {"80", "90"}


@pytest.mark.parametrize(
    "codes, expected",
    [("sm_80 sm_90", ["8.0", "9.0+PTX"]), ("sm_80 sm_90 sm_100 sm_120 sm_121", ["8.0", "9.0", "10.0", "12.0+PTX"])],
)
def test_default_architectures_are_those_that_nvcc_knows(driver, tmp_path, codes, expected):
    nvcc = driver.probe_nvcc(str(fake_nvcc(tmp_path, codes=codes)), {})
    assert [str(each) for each in nvcc.architectures({})] == expected


def test_architecture_that_nvcc_does_not_know(driver, refused, tmp_path):
    nvcc = driver.probe_nvcc(str(fake_nvcc(tmp_path)), {})
    with pytest.raises(refused, match=r"^TORCH_CUDA_ARCH_LIST: .*cannot compile for 5\.0; it knows 80, 90$"):
        nvcc.architectures({"TORCH_CUDA_ARCH_LIST": "5.0"})


def test_nvcc_that_cannot_compile(driver, refused, tmp_path):
    path = fake_nvcc(tmp_path, refusal="unsupported GNU version! gcc versions later than 12 are not supported!")
    with pytest.raises(
        refused, match=r"cannot compile a three-line file\. Set CUDAHOSTCXX(.|\n)*unsupported GNU version"
    ):
        driver.probe_nvcc(str(path), {})


def test_nvcc_that_is_no_program(driver, refused, tmp_path):
    path = fake_nvcc(tmp_path)
    path.write_text("no program\n")
    with pytest.raises(refused, match=r"cannot be started|cannot compile"):
        driver.probe_nvcc(str(path), {})


def test_old_nvcc(driver, refused, tmp_path):
    with pytest.raises(refused, match=r"is of CUDA 11\.8; 12\.0 or later is needed"):
        driver.probe_nvcc(str(fake_nvcc(tmp_path, "11.8")), {})


def test_choice_of_nvcc(driver, refused, tmp_path, capsys):
    home = str(fake_nvcc(tmp_path).parent.parent)
    assert driver.choose_nvcc({"CUDA_HOME": home}).path == f"{home}/bin/nvcc"
    assert capsys.readouterr().err == ""
    assert driver.choose_nvcc({"CUDA_HOME": home, "SIGNMAML_NO_CUDA": "1"}) is None
    assert "building WITHOUT CUDA" in capsys.readouterr().err
    assert driver.choose_nvcc({"CUDA_HOME": "/no/cuda"}) is None
    assert "CUDA_HOME is /no/cuda" in capsys.readouterr().err
    with pytest.raises(refused, match=r"^FORCE_CUDA is set, but: CUDA_HOME is /no/cuda"):
        driver.choose_nvcc({"CUDA_HOME": "/no/cuda", "FORCE_CUDA": "1"})
    with pytest.raises(refused, match=r"^FORCE_CUDA and SIGNMAML_NO_CUDA: expected at most one"):
        driver.choose_nvcc({"FORCE_CUDA": "1", "SIGNMAML_NO_CUDA": "1"})
    with pytest.raises(refused, match=r"^TORCH_CUDA_ARCH_LIST: expected numbers"):
        driver.choose_nvcc({"SIGNMAML_NO_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "banana"})


def test_emulated_module_is_kept_outside_of_the_packages(driver, refused, tmp_path):
    """It is kept in build/emulated of the source tree, where the tests look and no wheel takes files from."""
    from helpers.devices import emulated

    assert driver.EMULATED_FOLDER == emulated.BUILT_BY_SETUP == SETUP.parent / "build" / "emulated"
    built, target = tmp_path / "cmake", tmp_path / "emulated"
    built.mkdir()
    with pytest.raises(refused, match=r"^SIGNMAML_EMULATED is set: expected one _emulated module in .*, found 0$"):
        driver.keep_emulated(built, target)
    target.mkdir()
    (target / "_emulated.old.so").write_text("of an earlier Python")
    (built / "_emulated.new.so").write_text("new")
    assert driver.keep_emulated(built, target) == target / "_emulated.new.so"
    assert [path.name for path in target.iterdir()] == ["_emulated.new.so"]


def test_what_was_compiled_outlives_what_cmake_noted(driver, tmp_path):
    """The second of two installs from one folder compiles only what has changed."""
    noted = [tmp_path / "CMakeCache.txt", tmp_path / "CMakeFiles" / "4.1.0" / "CMakeCXXCompiler.cmake"]
    kept = [tmp_path / ".ninja_log", tmp_path / "CMakeFiles" / "_C.dir" / "module.cpp.o"]
    for path in (*noted, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    driver.forget_configuration(tmp_path)
    assert [path.exists() for path in (*noted, *kept)] == [False, False, True, True]
    driver.forget_configuration(tmp_path / "not there yet")


def test_emulated_switch_reaches_cmake(driver, monkeypatch):
    from setuptools import Distribution

    command = driver.BuildWithCMake(Distribution({"name": "signmaml_ext", "version": "0"}))
    monkeypatch.setenv("SIGNMAML_NO_CUDA", "1")
    for value, expected in (("1", "ON"), ("0", "OFF")):
        monkeypatch.setenv("SIGNMAML_EMULATED", value)
        assert f"-DSIGNMAML_EMULATED={expected}" in command._cache_variables(Path("/nowhere/_C.so"))
