"""Captured calls: blocks run on their own do what they do inside the model."""

import copy

import pytest
import torch

from flatquant import seams
from flatquant.calibrate.capture import Observer, capture, run_block
from flatquant.wiring.archs import LLAMA, arch_of
from tests.laws import DIAGONAL, bare, family, inputs_of, tokens_for, wrap
from tests.tiny_models import tiny_family


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_blocks_run_on_their_own_reproduce_the_model(kind: str) -> None:
    model = family(kind, dtype=torch.float64, layers=3)  # in float32, sums differ between batch sizes
    seams.use_attention(model, "self_attn")
    tokens = tokens_for(model, 5, 11)
    hidden, calls = capture(model, LLAMA, tokens)
    assert len(calls) == 3
    assert torch.equal(hidden, model.model.embed_tokens(tokens))
    with torch.no_grad(), inputs_of(model.model.norm) as last:
        states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    for block, call, want in zip(model.model.layers, calls, (*states[1:3], last[0]), strict=True):
        hidden = run_block(block, call, hidden, batch_size=2)  # 5 windows: the last batch is smaller
        torch.testing.assert_close(hidden, want, rtol=1e-9, atol=1e-9)
    assert not hidden.requires_grad


@torch.no_grad()
def test_what_blocks_lend_and_what_they_are_given_goes_with_the_windows() -> None:
    """Gemma 4 E2B: window by window, and some at a time, in any order."""
    model = tiny_family("gemma4_text small", dtype=torch.float64)
    seams.use_attention(model, "self_attn")
    tokens = tokens_for(model, 5, 11)
    hidden, calls = capture(model, arch_of(model.config), tokens)
    with inputs_of(model.model.norm) as last:
        model(tokens, use_cache=False)
    order = torch.tensor([3, 0, 4])
    some = hidden[order]
    for block, call in zip(model.model.layers, calls, strict=True):
        some, hidden = call.of(order)(block, some), run_block(block, call, hidden, batch_size=2)
    torch.testing.assert_close(calls[-1].states(hidden), last[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(calls[-1].states(some), last[0][order], rtol=1e-9, atol=1e-9)
    with pytest.raises(AssertionError, match="which windows"):
        calls[0](model.model.layers[0], some)


def test_capture_computes_no_block_and_restores_all() -> None:
    model = family("llama", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    entered = []
    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(lambda *_: entered.append(1))
    capture(model, LLAMA, tokens_for(model, 2, 5))
    assert not entered
    assert all("forward" not in vars(block) for block in model.model.layers)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model(tokens_for(model, 1, 5))
    assert len(entered) == 2


def test_blocks_are_restored_after_an_error() -> None:
    model = family("llama", dtype=torch.float32)
    with pytest.raises(IndexError):
        capture(model, LLAMA, torch.full((1, 5), 10_000))
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_sliding_windows_are_part_of_the_call() -> None:
    model = family("mistral", dtype=torch.float32)
    seams.use_attention(model, "self_attn")
    hidden, (call, _) = capture(model, LLAMA, tokens_for(model, 1, 11))
    block = model.model.layers[0]
    far = hidden.clone()
    far[:, 0] += 1  # the window is 5 tokens long
    with torch.no_grad():
        near, moved = call(block, hidden), call(block, far)
    assert not torch.allclose(near[:, 4], moved[:, 4])
    assert torch.equal(near[:, 5:], moved[:, 5:])


def test_statistics_are_those_of_what_the_readers_see() -> None:
    model = family("llama", dtype=torch.float32)
    seams.use_attention(model, "self_attn")
    hidden, calls = capture(model, LLAMA, tokens_for(model, 4, 6))
    block = model.model.layers[0]
    observer = Observer(block, LLAMA)
    with inputs_of(block.mlp.down_proj) as mid, inputs_of(block.self_attn.k_proj) as attn:
        run_block(block, calls[0], hidden, 3)
    statistics = observer.close()
    for site, seen in (("mlp_mid", mid), ("attn_in", attn)):
        x = torch.cat(seen).flatten(0, 1)
        assert x.shape[0] == 24
        torch.testing.assert_close(statistics[site].absmax, x.abs().amax(0))
        torch.testing.assert_close(statistics[site].square, x.square().mean(0))
    run_block(block, calls[0], 2 * hidden, 4)  # closed: nothing is counted any more
    torch.testing.assert_close(statistics["mlp_mid"].absmax, torch.cat(mid).flatten(0, 1).abs().amax(0))


def test_the_state_of_a_wrapped_block_comes_back() -> None:
    model = family("llama", dtype=torch.float32)
    _, fits = wrap(model, bare(DIAGONAL), noise=0.0, force=True)
    state = fits[0].state()
    assert sorted(state) == ["scale.0", "scale.1", "scale.2"]
    with torch.no_grad():
        for p in fits[0].parameters()["scale"]:
            p.add_(1.0)
    assert all((v == 0).all() for v in state.values())  # copies
    fits[0].load_state(state)
    assert all((p == 0).all() for p in fits[0].parameters()["scale"])
