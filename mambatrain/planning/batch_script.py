"""The script that SLURM runs: one task a node, saved and queued again before the time is over."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

# --signal=B: the batch shell alone is told, so that it, and not the tasks, decides what happens. A job that a person
# cancels stops and saves like any other, but is not queued again.
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ nodes }}
#SBATCH --ntasks-per-node=1
{% if gpus %}#SBATCH --gpus-per-node={{ gpus }}
{% else %}#SBATCH --cpus-per-task={{ processes }}
{% endif %}#SBATCH --time={{ time }}
#SBATCH --signal=B:USR1@{{ seconds_to_save }}
#SBATCH --requeue
#SBATCH --open-mode=append
{% for option in options %}#SBATCH {{ option }}
{% endfor %}
# Submit it where `mambatrain` is on the PATH and where the run folder can be written by every node.
run={{ run }}
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# {{ seconds_to_save }} seconds before the end of its time the job is told; the run saves and leaves RUN/stopped.
time_is_over=
stop_and_save() { time_is_over=1; kill -TERM "$step"; }
trap stop_and_save USR1

srun --kill-on-bad-exit=1 {{ command }}{% if nodes > 1 %} --nodes {{ nodes }} --rendezvous "$host:$port"{% endif %} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a trapped signal ends a wait

if [ -n "$time_is_over" ] && [ -e "$run/stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class BatchJob:
    """What a job asks SLURM for, and what it runs."""

    recipe: str
    run: Path
    nodes: int
    gpus: int | None
    """Of a node; None: processes on its CPU."""
    processes: int
    """Of a node, without GPUs."""
    time: str
    """As `sbatch --time` takes it."""
    seconds_to_save: int
    """How long before the end of its time a job is told."""
    overrides: tuple[str, ...]
    shard: str
    sequence: int
    options: tuple[str, ...]
    """More lines for sbatch, such as `--partition=gpu`."""


def write_batch_script(job: BatchJob) -> str:
    """The script's text."""
    import jinja2

    devices = ["--gpus", str(job.gpus)] if job.gpus else ["--processes", str(job.processes)]
    changes = [word for change in job.overrides for word in ("--set", change)]
    shard = [] if job.shard == "no" else ["--shard", job.shard]
    sequence = [] if job.sequence == 1 else ["--sequence", str(job.sequence)]
    words = ["mambatrain", "pretrain", job.recipe, "--run", str(job.run), *devices, *shard, *sequence, *changes]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_SCRIPT).render(
        name="mambatrain-" + re.sub(r"[^\w.-]+", "-", Path(job.recipe).stem),  # sbatch would end it at a space
        nodes=job.nodes,
        gpus=job.gpus,
        processes=job.processes,
        time=job.time,
        seconds_to_save=job.seconds_to_save,
        options=job.options,
        run=shlex.quote(str(job.run)),
        command=shlex.join(words),
    )
