"""`PackedCache` does what transformers' own cache does, and keeps 4-bit integers."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from flatquant.errors import ModelError
from flatquant.qtensor import QTensor
from flatquant.quantizers import Dynamic, NoClip
from flatquant.runtime.packedcache import PackedCache, Room
from flatquant.spec import QuantSpec

GRID = Dynamic(QuantSpec(bits=4, symmetric=False, clip="none"), NoClip())
BLOCKS, HEADS, HEAD_DIM = 2, 2, 8


def empty(batch: int = 3, places: int = 4) -> PackedCache:
    cpu = torch.device("cpu")
    return PackedCache(Room(blocks=BLOCKS, batch=batch, heads=HEADS, places=places, head_dim=HEAD_DIM, device=cpu))


def tokens(batch: int, count: int, seed: int) -> QTensor:
    g = torch.Generator().manual_seed(seed)
    return GRID.quantize(torch.randn(batch, HEADS, count, HEAD_DIM, generator=g))


def feed(ours: PackedCache, plain: DynamicCache, count: int, seed: int) -> None:
    """The same keys and values into both; what both then give to attention is the same."""
    for block in range(BLOCKS):
        k, v = (tokens(ours.room.batch, count, 10 * seed + 2 * block + i) for i in range(2))
        got = ours.append(k, v, block, torch.float32)
        want = plain.update(k.dequantize(), v.dequantize(), block)
        assert all(map(torch.equal, got, want))


def filled(count: int = 8, batch: int = 3) -> tuple[PackedCache, DynamicCache]:
    caches = empty(batch), DynamicCache()
    feed(*caches, count, seed=0)
    return caches


@pytest.mark.parametrize(("n", "left"), [(-1, 7), (-3, 5), (-8, 0), (-20, 0), (0, 8), (5, 5), (9, 8)])
def test_crop_counts_tokens_once_and_not_once_a_layer(n: int, left: int) -> None:
    cache, _ = filled()
    cache.crop(n)
    assert cache.get_seq_length() == left
    assert [layer.get_seq_length() for layer in cache.layers] == [left] * BLOCKS
    assert cache.room.used.item() == left


@given(st.data())
def test_any_sequence_of_changes_does_what_it_does_to_a_plain_cache(data: st.DataObject) -> None:
    ours, plain = filled(data.draw(st.integers(1, 6)))
    for seed in range(1, data.draw(st.integers(1, 6)) + 1):
        length, batch = ours.get_seq_length(), ours.room.batch
        match data.draw(st.sampled_from(("feed", "crop", "reorder", "select", "repeat", "copy"))):
            case "crop":
                n = data.draw(st.integers(0, length - 1))
                for cache in (ours, plain):
                    cache.crop(-n)
            case "reorder":
                index = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
                for cache in (ours, plain):
                    cache.reorder_cache(index)
            case "select":
                index = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)))
                for cache in (ours, plain):
                    cache.batch_select_indices(index)
            case "repeat":
                for cache in (ours, plain):
                    cache.batch_repeat_interleave(2)
            case "copy":
                before = ours
                ours = copy.deepcopy(ours) if seed % 2 else copy.copy(ours)
                before.reset()
        feed(ours, plain, data.draw(st.integers(1, 3)), seed)
        assert ours.get_seq_length() == plain.get_seq_length()
        assert ours.get_mask_sizes(2, 0) == plain.get_mask_sizes(2, 0)


def test_padding_goes_along_with_its_sequence() -> None:
    cache, _ = filled()
    cache.room.pad(torch.tensor([0, 2, 5]))
    cache.reorder_cache(torch.tensor([2, 2, 1]))
    assert cache.room.start.tolist() == [5, 5, 2]
    cache.batch_repeat_interleave(2)
    assert cache.room.start.tolist() == [5, 5, 5, 5, 2, 2]
    cache.reset()
    assert cache.room.start.tolist() == [0] * 6
    assert not cache.room.padded


def test_tokens_count_once_all_blocks_have_them() -> None:
    """A forward pass that ended in an exception leaves no trace."""
    cache, plain = filled(5)
    cache.append(tokens(3, 2, 0), tokens(3, 2, 1), 0, torch.float32)
    assert cache.get_seq_length() == 5
    feed(cache, plain, 3, seed=4)
    assert cache.get_seq_length() == 8


def test_addresses_change_when_they_have_to() -> None:
    """What a graph was recorded on stays, or `moved` says that it did not."""
    cache, _ = filled()
    room = cache.room

    def addresses() -> list[int]:
        return [t.data_ptr() for pair in room.stores for s in pair for t in s] + [room.start.data_ptr()]

    before, moved = addresses(), room.moved
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    cache.reset()
    assert (addresses(), room.moved) == (before, moved)
    feed(cache, DynamicCache(), 50, seed=1)
    assert room.moved == moved + 1
    cache.batch_select_indices(torch.tensor([0]))
    assert room.moved == moved + 2
    assert cache.nbytes() == BLOCKS * 2 * HEADS * 50 * (HEAD_DIM // 2 + 4 + 1)


def test_what_a_cache_is_not_for_is_said() -> None:
    cache, _ = filled()
    with pytest.raises(ModelError, match="made for 3 sequences, not 1"):
        cache.append(tokens(1, 2, 0), tokens(1, 2, 0), 0, torch.float32)
    with pytest.raises(ModelError, match="QuantizedCache"):
        cache.append(torch.zeros(3, HEADS, 1, HEAD_DIM), tokens(3, 1, 0), 0, torch.float32)
    with pytest.raises(ModelError, match="DynamicCache"):
        cache.update(torch.zeros(3, HEADS, 1, HEAD_DIM), torch.zeros(3, HEADS, 1, HEAD_DIM), 0)
    for method, argument in (("crop", -1), ("batch_repeat_interleave", 2)):
        with pytest.raises(ModelError, match=f"call {method}"):
            getattr(cache.layers[0], method)(argument)
