"""Drives CMake for the native module `signmaml_ext._C`; everything else is in pyproject.toml.

Turns the environment switches into CMake cache variables. The sources are listed in CMakeLists.txt, and only there.

    FORCE_CUDA=1            no usable nvcc is an error instead of a build without CUDA
    SIGNMAML_NO_CUDA=1      build without CUDA even where there is an nvcc
    TORCH_CUDA_ARCH_LIST    architectures in torch's grammar: "8.0;9.0+PTX", "Hopper", "9.0a", "native"
    MAX_JOBS                how many compilers may run at once
    CUDACXX, CUDA_HOME      which nvcc to use; without them the one on PATH, then /usr/local/cuda
    CUDAHOSTCXX             which C++ compiler nvcc uses
    SIGNMAML_DEBUG=1        debug symbols and assertions, little optimisation
    SIGNMAML_EMULATED=1     build the CUDA kernels for the emulated GPU as well, into build/emulated, for the tests
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
OLDEST_NVCC = (12, 0)
# Where SIGNMAML_EMULATED=1 leaves its module: outside of the packages, so that no wheel can contain it.
EMULATED_FOLDER = ROOT / "build" / "emulated"

# One per generation in use. SASS also runs on later members of its generation (8.0 on 8.6 and 8.9), and the PTX of the
# newest on all later GPUs, so more entries would cost build time and change no result.
DEFAULT_ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0"]

# torch's names for generations (torch.utils.cpp_extension).
NAMED_ARCHITECTURES = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}

NO_CUDA_BANNER = """
********************************************************************************
**  signmaml_ext: building WITHOUT CUDA
**  {reason}
**  The package will work on the CPU; its CUDA kernels will be missing.
**  For CUDA: install the CUDA toolkit, set CUDA_HOME or CUDACXX, and reinstall.
**  FORCE_CUDA=1 turns this notice into an error.
********************************************************************************
"""


def read_flag(environment: Mapping[str, str], name: str) -> bool:
    """The value of an on/off switch; unset and empty mean off."""
    value = environment.get(name, "").strip().lower()
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("", "0", "off", "false", "no"):
        return False
    raise SetupError(f"{name}: expected 1 or 0, found {value!r}")


def read_jobs(environment: Mapping[str, str]) -> int | None:
    """MAX_JOBS, or None where it is unset."""
    value = environment.get("MAX_JOBS", "").strip()
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise SetupError(f"MAX_JOBS: expected a whole number of at least 1, found {value!r}")
    return int(value)


@dataclass(frozen=True)
class Architecture:
    """One entry of an architecture list: `9.0a+PTX` is (9, 0, "a", True)."""

    major: int
    minor: int
    suffix: str
    ptx: bool

    @property
    def number(self) -> str:
        return f"{self.major}{self.minor}"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}" + ("+PTX" if self.ptx else "")

    def for_cmake(self) -> str:
        return self.number + self.suffix + ("" if self.ptx else "-real")


def parse_architectures(text: str) -> list[Architecture]:
    """Reads torch's grammar: numbers and names, separated by semicolons, spaces or commas."""
    entries = []
    for word in re.split(r"[;,\s]+", text.strip(";, ")):
        entries += NAMED_ARCHITECTURES.get(word, word).split(";")
    architectures: dict[tuple[int, int, str], Architecture] = {}
    for entry in entries:
        match = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SetupError(
                "TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0+PTX', 'native', or names out of "
                f"{', '.join(NAMED_ARCHITECTURES)}; found {entry!r}"
            )
        key = (int(match[1]), int(match[2]), match[3])
        ptx = bool(match[4]) or (key in architectures and architectures[key].ptx)
        architectures[key] = Architecture(*key, ptx)
    return [architectures[key] for key in sorted(architectures)]


def with_ptx_for_newest(architectures: list[Architecture]) -> list[Architecture]:
    """Adds PTX for the newest architecture, so that GPUs not yet made can run the module.

    PTX of an `a` or `f` variant runs on nothing newer, so such an entry is left as it is.
    """
    newest = architectures[-1]
    if newest.suffix or any(architecture.ptx for architecture in architectures):
        return architectures
    return [*architectures[:-1], Architecture(newest.major, newest.minor, "", ptx=True)]


def visible_architectures() -> str:
    """The compute capabilities of the GPUs that nvidia-smi sees, for TORCH_CUDA_ARCH_LIST=native."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"TORCH_CUDA_ARCH_LIST=native: expected a visible GPU; nvidia-smi failed: {error}") from None
    return ";".join(sorted(set(found)))


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that has compiled a test file."""

    path: str
    version: tuple[int, int]
    supported: frozenset[str]  # architecture numbers: {"80", "90", ...}

    def architectures(self, environment: Mapping[str, str]) -> list[Architecture]:
        """What to compile for: TORCH_CUDA_ARCH_LIST, or those of the default list that this nvcc knows."""
        text = environment.get("TORCH_CUDA_ARCH_LIST", "").strip()
        if not text:
            known = [entry for entry in DEFAULT_ARCHITECTURES if entry.replace(".", "") in self.supported]
            return with_ptx_for_newest(parse_architectures(";".join(known)))
        wanted = parse_architectures(visible_architectures() if text == "native" else text)
        for architecture in wanted:
            if architecture.number not in self.supported:
                raise SetupError(
                    f"TORCH_CUDA_ARCH_LIST: {self.path} (CUDA {self.version[0]}.{self.version[1]}) cannot compile for "
                    f"{architecture}; it knows {', '.join(sorted(self.supported, key=int))}"
                )
        return with_ptx_for_newest(wanted)


def find_nvcc(environment: Mapping[str, str]) -> tuple[str | None, str]:
    """The path of nvcc and, if there is none, the reason. Whether a GPU is present does not matter.

    If CUDA_HOME is set, only that folder is searched: the user's explicit choice wins over other installations.
    """
    chosen = environment.get("CUDACXX", "").strip()
    if chosen:
        path = shutil.which(chosen)
        if path is None:
            raise SetupError(f"CUDACXX: expected the path of nvcc, found {chosen!r}, which is no program")
        return path, ""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = environment.get(variable, "").strip()
        if home:
            path = shutil.which("nvcc", path=str(Path(home) / "bin"))
            return path, f"{variable} is {home}, and there is no bin/nvcc in it."
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return path, "No nvcc was found on PATH or in /usr/local/cuda, and CUDA_HOME and CUDACXX are not set."


def probe_nvcc(path: str, environment: Mapping[str, str]) -> Nvcc:
    """Asks for nvcc's version and compiles three lines, to fail here with a message rather than in CMake's log."""
    advice = "Set CUDAHOSTCXX to a C++ compiler that it accepts, CUDACXX to another nvcc, or SIGNMAML_NO_CUDA=1."
    host = environment.get("CUDAHOSTCXX", "").strip()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cstdint>\n#include <vector>\n__global__ void probe(std::int64_t* x) { *x = 1; }\n")
        compile_probe = [path, *(["-ccbin", host] if host else []), "-std=c++17", "-c", str(source), "-o", os.devnull]
        try:
            version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
            listed = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
            subprocess.run(compile_probe, capture_output=True, text=True, check=True, cwd=folder)
        except OSError as error:
            raise SetupError(f"the nvcc found, {path}, cannot be started: {error}. {advice}") from None
        except subprocess.CalledProcessError as error:
            said = [line for line in (error.stdout + error.stderr).splitlines() if line.strip()]
            raise SetupError(
                f"the nvcc found, {path}, cannot compile a three-line file. {advice}\n  it said: "
                + "\n           ".join(said[:6])
            ) from None
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        raise SetupError(f"the nvcc found, {path}, gives no release number: {version.strip()!r}. {advice}")
    number = (int(release[1]), int(release[2]))
    if number < OLDEST_NVCC:
        raise SetupError(f"the nvcc found, {path}, is of CUDA {release[0][8:]}; 12.0 or later is needed. {advice}")
    return Nvcc(path, number, frozenset(re.findall(r"sm_(\d+)", listed)))


def choose_nvcc(environment: Mapping[str, str]) -> Nvcc | None:
    """The nvcc to build with, or None, after printing a banner, for a build without CUDA."""
    forced = read_flag(environment, "FORCE_CUDA")
    refused = read_flag(environment, "SIGNMAML_NO_CUDA")
    if forced and refused:
        raise SetupError("FORCE_CUDA and SIGNMAML_NO_CUDA: expected at most one of them, found both set")
    text = environment.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if text and text != "native":
        parse_architectures(text)  # a bad list is an error even where nothing will be compiled for it
    path, reason = (None, "SIGNMAML_NO_CUDA is set.") if refused else find_nvcc(environment)
    if path is not None:
        return probe_nvcc(path, environment)
    if forced:
        raise SetupError(f"FORCE_CUDA is set, but: {reason}")
    print(NO_CUDA_BANNER.format(reason=reason), file=sys.stderr, flush=True)
    return None


def tool(name: str) -> str:
    """The cmake or ninja of the build requirements, which need not be on PATH, else the one on PATH."""
    spec = importlib.util.find_spec(name)
    if spec is not None:
        module = importlib.import_module(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
        path = shutil.which(name, path=folder) if folder else None
        if path is not None:
            return path
    path = shutil.which(name)
    if path is None:
        raise SetupError(f"{name}: expected it as a build requirement or on PATH, found neither")
    return path


def keep_emulated(built: Path, target: Path) -> Path:
    """Copies the emulated module from CMake's folder to where the tests look for it, in place of an older one."""
    modules = sorted(built.glob("_emulated*.so"))
    if len(modules) != 1:
        raise SetupError(f"SIGNMAML_EMULATED is set: expected one _emulated module in {built}, found {len(modules)}")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    return Path(shutil.copy(modules[0], target))


def forget_configuration(folder: Path) -> None:
    """Removes CMake's records of an earlier build: its cache, and what it found out about the compilers.

    An isolated build gets another cmake, ninja and pybind11 each time, and the switches may have changed. Object files
    stay (`cmake --fresh` would remove them): ninja recompiles those that are older than their sources or were compiled
    by another command.
    """
    folder.joinpath("CMakeCache.txt").unlink(missing_ok=True)
    for found_out in folder.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(found_out)


class BuildWithCMake(build_ext):
    """Builds the one extension module by configuring and building CMakeLists.txt."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        jobs = read_jobs(os.environ)
        output.parent.mkdir(parents=True, exist_ok=True)
        forget_configuration(folder)
        configure = [tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        build = [tool("cmake"), "--build", str(folder), *(["--parallel", str(jobs)] if jobs else [])]
        self._run([*configure, *self._cache_variables(output)], "configure")
        self._run(build, "build")
        if not output.is_file():
            raise SetupError(f"CMake built no {output}")
        if read_flag(os.environ, "SIGNMAML_EMULATED"):
            self._run([*build, "--target", "_emulated"], "build of the emulated module")
            keep_emulated(folder, EMULATED_FOLDER)

    def _cache_variables(self, output: Path) -> list[str]:
        import pybind11

        nvcc = choose_nvcc(os.environ)
        variables = {
            "CMAKE_BUILD_TYPE": "Debug" if read_flag(os.environ, "SIGNMAML_DEBUG") else "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SIGNMAML_VERSION": self.distribution.get_version(),
            "SIGNMAML_OUTPUT": str(output),
            "SIGNMAML_CUDA": "ON" if nvcc else "OFF",
            "SIGNMAML_EMULATED": "ON" if read_flag(os.environ, "SIGNMAML_EMULATED") else "OFF",
        }
        if nvcc:
            architectures = nvcc.architectures(os.environ)
            variables["CMAKE_CUDA_COMPILER"] = nvcc.path
            variables["CMAKE_CUDA_ARCHITECTURES"] = ";".join(each.for_cmake() for each in architectures)
            variables["SIGNMAML_CUDA_ARCHITECTURES"] = ";".join(str(each) for each in architectures)
        return [f"-D{name}={value}" for name, value in variables.items()]

    def _run(self, command: list[str], step: str) -> None:
        sys.stdout.flush()
        done = subprocess.run(command)
        if done.returncode != 0:
            raise SetupError(f"CMake's {step} step failed with exit status {done.returncode}; its messages are above")


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["signmaml_ext", "signmaml_ext.*"]), *find_packages("python")],
        ext_modules=[Extension("signmaml_ext._C", sources=[])],
        cmdclass={"build_ext": BuildWithCMake},
    )
