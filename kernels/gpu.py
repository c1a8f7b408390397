"""Everything that only a machine with a GPU can show, in one go: `make gpu`.

    python kernels/gpu.py [--out gpu_report] [--mamba-ssm SDIST]

Parity tests, the check that runs before step 1, the same under compute-sanitizer, the benchmark. Needs PyTorch 2.11 or
newer with CUDA, pytest and this folder: no network, no installation. What a machine lacks (mamba-ssm, a sanitizer that
takes the device) is reported and no failure. SDIST is mamba-ssm's source distribution, built here where nvcc is found.
The report is OUT/report.md, for docs/benchmarks.md. Nobody has run this on a GPU yet; `--trial` goes through it on a
CPU, at small shapes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import sys, torch
from mambatrain.ops.backends import choose_backend
from mambatrain.ops.self_check import check_backend
device = torch.device(sys.argv[1])
for block in ("mamba1", "mamba2"):
    print(block, check_backend(choose_backend("auto", device), block, device))
"""
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def lay_out_package(folder: Path) -> None:
    """The package as an installation would have it, by links: `kernels/` and `recipes/` belong inside."""
    package = folder / "mambatrain"
    package.mkdir()
    for entry in (ROOT / "mambatrain").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("kernels", "recipes"):
        (package / f"_{name}").symlink_to(ROOT / name)


def build_mamba_ssm(sdist: Path, folder: Path) -> list[str]:
    """Built without its dependencies, into a folder of its own."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder)]
    return [sys.executable, "-m", "pip", "install", *options, str(sdist)]


def run(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """The exit code; what the command says goes to the screen and into the log."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
        return process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_report"))
    parser.add_argument("--mamba-ssm", type=Path, metavar="SDIST")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--trial", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.trial else "cuda"
    if not arguments.trial and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here (or PyTorch is built without CUDA); --trial goes through this on a CPU")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        lay_out_package(Path(scratch))
        search = [scratch, str(Path(scratch) / "mamba_ssm"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1"}
        python = [sys.executable, "-P"]
        check = [*python, "-c", CHECK, device]
        benchmark = [sys.executable, str(ROOT / "kernels" / "gpu_benchmark.py"), "--repeats", str(arguments.repeats)]
        benchmark += ["--device", device, *(["--tiny"] if arguments.trial else [])]
        steps = [  # name, command, whether the report fails with it
            ("parity", [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"], True),
            ("check", check, True),
            *((f"sanitizer {tool}", ["compute-sanitizer", "--tool", tool, *check], False) for tool in SANITIZER_TOOLS),
            ("benchmark", [*benchmark, "--json", str(out / "benchmark.json")], True),
        ]
        if arguments.mamba_ssm:
            build = build_mamba_ssm(arguments.mamba_ssm.resolve(), Path(scratch) / "mamba_ssm")
            steps.insert(0, ("building mamba-ssm", build, False))
        lines, failed = [f"# On a GPU, {date.today()}", ""], False
        for name, command, matters in steps:
            print(f"\n== {name}", flush=True)
            log, began = out / f"{name.replace(' ', '_')}.log", time.perf_counter()
            if shutil.which(command[0]) is None:
                lines.append(f"- {name}: left out, {command[0]} is not on this machine")
                continue
            code = run(command, log, environment)
            failed |= matters and code != 0
            seconds = time.perf_counter() - began
            lines.append(f"- {name}: {'done' if code == 0 else f'failed with {code}'} in {seconds:.0f} s, {log.name}")
    benchmark_log = out / "benchmark.log"
    if benchmark_log.exists():
        lines += ["", "```", benchmark_log.read_text(encoding="utf-8").strip(), "```"]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines[: len(steps) + 2]) + f"\n\n{out / 'report.md'}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
