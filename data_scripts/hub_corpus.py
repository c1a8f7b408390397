"""What the scripts for corpora of the Hugging Face hub share: arguments, reading, errors."""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from corpus_writer import About, Row, run_script, write_corpus

from mambatrain.data.sources import missing_file
from mambatrain.errors import UserError, nearest
from mambatrain.files import sha256_of

_WORDS = {str: "text", list: "a list", dict: "an object"}
_BUILDER_OF_ENDING = {".parquet": "parquet", ".jsonl": "json"}


@dataclass(frozen=True)
class Groups:
    """What --only chooses among.

    Attributes:
        key: of a document, whose value is its group.
        what: the groups in words, for --help.
        names: all there are; empty where any may be named.
        default: those that are taken unless --only names others; empty: all.
    """

    key: str
    what: str
    names: tuple[str, ...] = ()
    default: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubCorpus:
    """A data set of the hub.

    Attributes:
        config: the one that is read unless --config names another of `configs`.
        documents: of each split of `config`, for the time that is left.
        kept: columns that go into the corpus beside `needed`, where they are.
        configs: that --config may name; empty where there is no choice.
        needed: columns that must be there, and what they hold.
        groups: what --only chooses among; None: there is no choice.
    """

    about: About
    dataset: str
    config: str | None
    documents: dict[str, int]
    kept: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    needed: dict[str, type] = field(default_factory=lambda: {"text": str})
    groups: Groups | None = None


def write_hub_corpus(
    corpus: HubCorpus, description: str, into_documents: Callable[[Iterable[Row]], Iterator[Row]] = iter
) -> None:
    """The whole of a script: parses the command line and writes the corpus.

    Args:
        description: shown by --help.
        into_documents: makes documents of the data set's rows.
    """
    run_script(lambda: _write(corpus, _parse_arguments(corpus, description), into_documents))


def _parse_arguments(corpus: HubCorpus, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where the documents go")
    splits = list(corpus.documents)
    parser.add_argument("--split", choices=splits, default=splits[0], help="default: %(default)s")
    parser.set_defaults(config=corpus.config)
    if corpus.configs:
        parser.add_argument("--config", choices=corpus.configs, help=f"default: {corpus.config}")
    if groups := corpus.groups:
        which = f"{groups.what}; default: {', '.join(groups.default) or 'all'}"
        parser.add_argument("--only", nargs="+", metavar="NAME", choices=groups.names or None, help=which)
    parser.add_argument("--limit-documents", type=int, metavar="N", help="stop after N documents; default: all")
    local = "read these .parquet or .jsonl files of the same columns instead of the hub"
    parser.add_argument("--data-files", type=Path, nargs="+", metavar="FILE", help=local)
    parser.add_argument("--revision", default="main", help="of the data set on the hub; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="write anew what was made otherwise")
    return parser.parse_args()


def _write(
    corpus: HubCorpus, arguments: argparse.Namespace, into_documents: Callable[[Iterable[Row]], Iterator[Row]]
) -> None:
    limit = arguments.limit_documents
    if limit is not None and limit < 1:
        raise UserError(f"--limit-documents {limit} leaves no document", "for example --limit-documents 1000")
    options: Row = {"split": arguments.split, "limit_documents": limit}
    if arguments.data_files:
        _check_data_files(arguments.data_files)
        options["data_files"] = {str(file): sha256_of(file) for file in arguments.data_files}
        expected = limit
    else:
        options |= {"revision": arguments.revision, "config": arguments.config}
        known = corpus.documents[arguments.split] if arguments.config == corpus.config else limit
        expected = min(known, limit or known) if known else None

    only: list[str] = []
    if groups := corpus.groups:
        only = sorted(set(arguments.only or groups.default))
        options["only"] = only
        if only:  # how many there are of some groups is not known
            expected = limit

    def documents() -> Iterator[Row]:
        found = into_documents(_read_rows(corpus, arguments))
        if groups is not None and only:
            found = (document for document in found if document[groups.key] in only)
        return itertools.islice(found, limit)

    write_corpus(arguments.out, corpus.about, options, documents, expected, arguments.overwrite)


def _check_data_files(files: list[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise missing_file(file, "name .parquet or .jsonl files")
        if file.suffix not in _BUILDER_OF_ENDING:
            raise UserError(
                f"--data-files {file} is neither a .parquet nor a .jsonl file", "its ending says how it is read"
            )
    if len({file.suffix for file in files}) > 1:
        raise UserError("--data-files names files of two kinds", "give .parquet files or .jsonl files")


def _read_rows(corpus: HubCorpus, arguments: argparse.Namespace) -> Iterator[Row]:
    """The data set's rows in order, the columns that are needed and kept, streamed: nothing stays in a cache."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        if arguments.data_files:
            files = [str(file) for file in arguments.data_files]
            builder = _BUILDER_OF_ENDING[arguments.data_files[0].suffix]
            rows = load_dataset(builder, data_files=files, split="train", streaming=True)
        else:
            rows = load_dataset(
                corpus.dataset, arguments.config, split=arguments.split, streaming=True, revision=arguments.revision
            )
        opened = iter(rows)
        try:
            for row in opened:
                yield _chosen_columns(corpus, row)
        finally:
            # A stream left before its end (--limit-documents) has threads of Arrow's that abort the interpreter when it
            # ends, github.com/apache/arrow/issues/45214; they end here, once nothing holds the stream any more.
            opened.close()
            del opened, rows
            gc.collect()
    except (OSError, ValueError, DatasetsError) as error:  # OSError: the network too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = "--data-files" if arguments.data_files else f"the hub's {corpus.dataset}"
        hint = None if arguments.data_files else "--data-files FILE... reads files that were downloaded otherwise"
        raise UserError(f"{where} cannot be read: {reason}", hint) from error


def _chosen_columns(corpus: HubCorpus, row: Row) -> Row:
    for name, kind in corpus.needed.items():
        if not isinstance(row.get(name), kind):
            close = nearest(name, [column for column in row if column != name])
            hint = f"did you mean the column `{close}`?" if close else f"its columns are {', '.join(row)}"
            raise UserError(f"the data set has no column `{name}` that holds {_WORDS[kind]}", hint)
    return {name: row[name] for name in (*corpus.needed, *corpus.kept) if name in row}
