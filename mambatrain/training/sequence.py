"""Which rows a rank works on and which part of them: `--sequence N` lets N neighbouring ranks share each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mambatrain.errors import UserError
from mambatrain.models.sequence_parallel import RowNeighbours

if TYPE_CHECKING:
    from mambatrain.models.language_model import LanguageModel
    from mambatrain.recipe import Recipe


@dataclass(frozen=True)
class RowShare:
    """One rank's place among all: groups of ranks have rows of their own, the ranks of a group parts of each row."""

    group: int = 0
    num_groups: int = 1
    part: int = 0
    num_parts: int = 1

    @property
    def all_ranks(self) -> str:
        """How they are arranged, in words."""
        if self.num_parts == 1:
            return f"{self.num_groups} processes"
        return f"{self.num_groups} groups of {self.num_parts} processes that share rows"


def share_of_rank(num_parts: int, rank: int, num_processes: int) -> RowShare:
    """
    Args:
        num_parts: ranks that share a row; 1: each has its own.
        rank, num_processes: this one's, of how many.

    Raises:
        UserError: the processes do not divide into groups of so many.
    """
    if num_processes % num_parts:
        raise UserError(
            f"--sequence {num_parts}: {num_processes} process(es) do not divide into groups of {num_parts}",
            "give a divisor of the number of processes, which --gpus or --processes says",
        )
    return RowShare(rank // num_parts, num_processes // num_parts, rank % num_parts, num_parts)


def refuse_with_sequence(recipe: Recipe, num_parts: int, shards: int, kernels: str) -> None:
    """
    Raises:
        UserError: the run is asked for something that does not go with ranks that share rows.
    """
    if shards > 1:
        # Ranks that share a row are a layer apart each; those that share a matrix gather it at the same moment.
        raise UserError(
            f"--sequence {num_parts} does not go with --shard: ranks would wait for each other at every layer",
            "leave one of them out; training.activation_checkpointing saves memory with either",
        )
    if recipe.trains_state:
        raise UserError(
            f"--sequence {num_parts} does not go with adapter.kind state, whose rows begin with a trained state",
            "leave --sequence out",
        )
    if kernels == "mamba-ssm" and recipe.model.block == "mamba1":
        raise UserError(
            f"--sequence {num_parts} does not go with --kernels mamba-ssm, whose scan of Mamba-1 takes no state",
            "take --kernels native or torch",
        )
    long = {"data.carry_state": recipe.data.carry_state, "training.segment_tokens": recipe.training.segment_tokens}
    if named := [setting for setting, given in long.items() if given]:
        raise UserError(
            f"--sequence {num_parts} does not go with {named[0]}, which takes whole rows one part after the other",
            "leave one of them out",
        )
    if recipe.preferences is not None:
        raise UserError(f"--sequence {num_parts} does not go with preferences: a row holds two answers", "leave it out")
    shortest = min(stage.row_tokens for stage in recipe.stages)
    if shortest < num_parts:
        raise UserError(
            f"--sequence {num_parts}: rows of {shortest} tokens do not have a token for each process",
            "lower --sequence, or raise data.row_tokens",
        )


def join_neighbours(model: LanguageModel, rank: int, num_parts: int) -> None:
    """Lets a model pass its states between ranks; each rank of the run calls this, once.

    Args:
        model: gets `neighbours`.
        rank: of this process.
        num_parts: ranks that share a row; 1 changes nothing.
    """
    if num_parts > 1:
        from torch.distributed import new_group

        model.neighbours = RowNeighbours(new_group(), rank, num_parts)
