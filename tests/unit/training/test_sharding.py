import pytest

from mambatrain.errors import UserError
from mambatrain.training.sharding import num_shards


def test_words_and_numbers_say_how_many_ranks_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [num_shards(asked, 8) for asked in ("no", "node", "full", "2")] == [1, 4, 8, 2]


@pytest.mark.parametrize("asked", ["3", "0", "16", "all", "-1", "2.0"])
def test_what_does_not_divide_the_processes_is_refused(asked: str) -> None:
    with pytest.raises(UserError, match=f"--shard {asked}"):
        num_shards(asked, 8)
