"""What a run says of itself: a JSON line a step, a live line for a person, Weights & Biases when asked."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mambatrain.errors import UserError
from mambatrain.runs.folder import RunFolder, RunLog

_SECONDS_BETWEEN_PLAIN_LINES = 10.0  # where stderr is a file, not a terminal


class LiveLine:
    """Step, loss, tokens/s, memory and time left on stderr: redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self, total_steps: int, first_step: int, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._total_steps = total_steps
        self._plain = not self._console.is_terminal
        self._last_plain_line = 0.0
        self._held_out = ""
        self._started, self._first_step = time.monotonic(), first_step
        self._progress = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            refresh_per_second=4,
            disable=self._plain or quiet,
        )
        self._quiet = quiet
        self._task = self._progress.add_task("starting", total=total_steps, completed=first_step)
        self._progress.start()

    def show_step(
        self, step: int, loss: float | None, tokens_per_second: float, memory_bytes: int, margin: float | None = None
    ) -> None:
        shown = "skipped" if loss is None else f"loss {loss:.4f}"
        shown += "" if margin is None else f"  margin {margin:.3f}"
        text = f"{shown}  {self._held_out}{tokens_per_second:,.0f} tokens/s  {memory_bytes / 2**30:.1f} GiB"
        self._progress.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if self._plain and not self._quiet and now - self._last_plain_line >= _SECONDS_BETWEEN_PLAIN_LINES:
            self._last_plain_line = now
            done = max(1, step - self._first_step)
            left = (now - self._started) / done * (self._total_steps - step)
            self._console.print(f"step {step:,}/{self._total_steps:,}  {text}  {left:,.0f} s left", soft_wrap=True)

    def show_held_out(self, step: int, bits_per_byte: float | None, nats_per_token: float | None) -> None:
        if nats_per_token is None:
            self.say(f"step {step:,}: the held-out loss is not finite")
            return
        per_byte = "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits/byte"
        short = f"{nats_per_token:.3f} nats/token" if bits_per_byte is None else f"{bits_per_byte:.3f} bits/byte"
        self._held_out = f"held out {short}  "
        self.say(f"step {step:,}: held out {nats_per_token:.4f} nats/token{per_byte}")

    def show_preferences(self, step: int, loss: float | None, margin: float | None, accuracy: float | None) -> None:
        if loss is None or margin is None or accuracy is None:
            self.say(f"step {step:,}: the held-out loss is not finite")
            return
        self._held_out = f"held out margin {margin:.3f}  "
        self.say(f"step {step:,}: held out loss {loss:.4f}, reward margin {margin:.4f}, accuracy {accuracy:.1%}")

    def say(self, text: str) -> None:
        if not self._quiet:
            self._progress.console.print(text, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class WandbTracker:
    """The same lines in Weights & Biases; offline when no key is configured."""

    def __init__(self, folder: RunFolder, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--tracker wandb needs the package wandb", "pip install wandb") from None
        import os

        has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        self._run = wandb.init(
            project="mambatrain",
            name=folder.path.name,
            dir=str(folder.path),
            config=settings,
            mode=mode,  # type: ignore[arg-type]
            resume="allow",
            id=_wandb_id(folder.path),
            settings=wandb.Settings(silent=True),
        )
        self.where = self._run.url if mode == "online" else self._run.dir

    def write(self, line: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in line.items() if isinstance(value, int | float)}, step=line["draw"])

    def close(self) -> None:
        self._run.finish()


class RunReporter:
    """One rank's voice: rank 0 writes and shows, the others are silent."""

    def __init__(self, folder: RunFolder, live: LiveLine, tracker: WandbTracker | None, writes: bool) -> None:
        self._log = RunLog(folder.log_file) if writes else None
        self._live = live
        self._tracker = tracker

    def write_step(self, line: dict[str, Any], steps_shown: int) -> None:
        """A JSON line of an applied or skipped draw."""
        self._write(line)
        if line["step"] % steps_shown == 0:
            self._live.show_step(
                line["step"],
                line["loss"],
                line["tokens_per_second"],
                line["memory_bytes"],
                line.get("reward_margin"),
            )

    def write_held_out(self, line: dict[str, Any]) -> None:
        """A JSON line of a held-out evaluation."""
        self._write(line)
        if "held_out_reward_margin" in line:
            values = [line[f"held_out_{name}"] for name in ("loss", "reward_margin", "reward_accuracy")]
            self._live.show_preferences(line["step"], *values)
            return
        self._live.show_held_out(line["step"], line["held_out_bits_per_byte"], line["held_out_loss"])

    def write_event(self, line: dict[str, Any]) -> None:
        """A JSON line that the screen does not show."""
        self._write(line)

    def say(self, text: str) -> None:
        self._live.say(text)

    def close(self) -> None:
        self._live.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._log is not None:
            self._log.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(line)
        if self._tracker is not None:
            self._tracker.write(line)


def _wandb_id(run: Path) -> str:
    """The same for every resume of a run folder, so that its curves go on."""
    import hashlib

    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]


def print_fact(name: str, value: str) -> None:
    """`name   value` on stderr, before training starts."""
    print(f"{name:<12} {value}", file=sys.stderr)
