"""Tokenizes in as many lives as it takes: `python tokenize_lives.py SOURCE TOKENIZER OUT SEED KILLS`.

Each life is a fork of this process, which has imported everything and started no thread, with another number of
threads. It is killed with SIGKILL at a random moment behind the first sign of its work: of every three lives one when
it begins to write the shards, the others while documents are encoded, where an entry in the journal follows every
batch. Where a life comes to its end all the same, what it made is removed and the next begins anew. The last one is
left alone. Prints a JSON list of what each killed life left: documents in the journal, and the names beside OUT.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy.lib.format  # noqa: F401
import pydantic  # noqa: F401

from mambatrain.data import token_spool
from mambatrain.data.manifest import CleaningOptions, TokenizeOptions
from mambatrain.data.tokenize_corpus import HowToRead, tokenize_corpus

OPTIONS = TokenizeOptions(held_out=0.1, skip_bad=True, cleaning=CleaningOptions(deduplicate=True, normalize="NFC"))
SECONDS = 0.06


def live(source: str, tokenizer: str, out: Path, num_workers: int) -> None:
    token_spool.JOURNAL_SECONDS = 0.0
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    how = HowToRead(num_workers=num_workers, batch_characters=3000)
    tokenize_corpus([source], tokenizer, out, OPTIONS, how=how)
    os._exit(0)


def journaled(out: Path) -> int:
    try:
        journal = json.loads((out.parent / f".{out.name}.work" / "journal.json").read_bytes())
    except (OSError, ValueError):
        return 0
    return int(journal["num_documents"])


def wait_for(out: Path, child: int, in_shards: bool) -> None:
    """Until the life begins to write shards or has written to its journal, or has ended."""
    before = journaled(out)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if in_shards and (out.parent / f".{out.name}.partial" / "train.bin").exists():
            return
        if not in_shards and journaled(out) != before:
            return
        time.sleep(0.0005)


def main() -> None:
    source, tokenizer, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    rng, kills = random.Random(int(sys.argv[4])), int(sys.argv[5])
    lives: list[dict[str, object]] = []
    while len(lives) <= kills:
        child = os.fork()
        if child == 0:
            live(source, tokenizer, out, rng.choice((1, 2, 4)))
        last = len(lives) == kills
        if not last:
            in_shards = len(lives) % 3 == 2
            wait_for(out, child, in_shards)
            time.sleep(rng.uniform(0.0, SECONDS / 10 if in_shards else SECONDS))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        if killed or last:
            names = sorted(path.name for path in out.parent.iterdir() if path.name.lstrip(".").startswith(out.name))
            lives.append({"killed": killed, "status": status, "documents": journaled(out), "names": names})
        else:
            shutil.rmtree(out)
    print(json.dumps(lives))


main()
