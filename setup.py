"""Compiles `kernels/cpu` into small shared libraries, one per level of the instruction set.

They are plain C++ that links neither Python nor torch, so building needs a C++17 compiler and nothing that is not there
already, and one wheel serves every Python. Without a compiler mambatrain is installed without them: why is written to
`lib/not_built.txt`, and `--kernels native` repeats it.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

SOURCES = Path("kernels", "cpu")
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    # inf and NaN keep their meaning (no -ffast-math); floating point raises no signal and sets no errno
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
]
X86_64_V2 = ["-msse4.2", "-mpopcnt", "-mcx16"]
X86_64_V3 = [*X86_64_V2, "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe"]
X86_64_V4 = [*X86_64_V3, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]
# spelled out, since -march=x86-64-v4 asks for a compiler of 2021
X86_64 = {"x86-64-v2": X86_64_V2, "x86-64-v3": X86_64_V3, "x86-64-v4": X86_64_V4}
LEVELS = {"x86_64": X86_64, "amd64": X86_64, "aarch64": {"neon": []}, "arm64": {"neon": []}}


class BuildKernels(Command):
    """A step of `build`, under the names that setuptools expects of one."""

    description = "compile the C++ kernels"
    user_options: ClassVar = [
        ("editable-mode", "i", "put them into the source tree, where an editable installation finds them")
    ]
    boolean_options: ClassVar = ["editable-mode"]

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "not_built.txt"
        problem = compile_kernels(folder)
        if problem is None:
            note.unlink(missing_ok=True)
        else:
            for old in folder.glob("*.so"):
                old.unlink()
            note.write_text(problem + "\n")
            print(f"mambatrain is installed without its native kernels: {problem}", file=sys.stderr)

    def get_outputs(self):
        return [str(path) for path in self._folder().glob("*")]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(path) for path in sorted(SOURCES.iterdir())]

    def _folder(self):
        return Path("kernels", "lib") if self.editable_mode else Path(self.build_lib, "mambatrain", "_kernels", "lib")


class PlatformDistribution(Distribution):
    """Not for every platform, although it has no extension module."""

    def has_ext_modules(self):
        return True


class PlatformWheel(bdist_wheel):
    """Any Python 3, this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def compile_kernels(folder):
    """Fills `folder` with libraries, or with nothing and says why not."""
    levels = LEVELS.get(platform.machine().lower())
    if sys.platform != "linux" or levels is None:
        return f"they are built on Linux for x86-64 and aarch64, and this is {platform.system()} {platform.machine()}"
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found at installation (looked for $CXX, c++, g++, clang++)"
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = {
            Path(scratch, f"{source.stem}-{level}.o"): [*flags, "-c", str(source)]
            for level, flags in levels.items()
            for source in sorted(SOURCES.glob("*.cpp"))
        }
        calls = [[*compiler, *FLAGS, *arguments, "-o", str(to)] for to, arguments in objects.items()]
        problem = next(filter(None, pool.map(call_compiler, calls)), None)
        if problem:
            return problem
        for level in levels:
            parts = [str(path) for path in objects if path.stem.endswith(f"-{level}")]
            library = Path(scratch, f"mambatrain-{level}.so")
            problem = call_compiler([*compiler, "-shared", "-s", "-Wl,--as-needed", *parts, "-o", str(library)])
            if problem:
                return problem
            new = Path(shutil.copy(library, folder / f"{library.name}.new"))
            new.replace(folder / library.name)  # a process that has the old one loaded keeps it
    return None


def find_compiler():
    """The command that compiles C++, as a list, or None."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def call_compiler(command):
    """None, or the first line of what the compiler objects to."""
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    print(result.stderr, file=sys.stderr)
    lines = result.stderr.splitlines() or ["without a message"]
    return f"{command[0]} failed at installation: {next((line for line in lines if 'error' in line), lines[0])}"


build.sub_commands = [*build.sub_commands, ("build_kernels", None)]
setup(
    distclass=PlatformDistribution,
    cmdclass={"build_kernels": BuildKernels, "bdist_wheel": PlatformWheel},
)
