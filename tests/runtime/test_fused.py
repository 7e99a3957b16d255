"""The fused runtime against the modules that transformers calls one by one: the same model, whatever is asked of it."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from flatquant.calibrate.pipeline import calibrate
from flatquant.errors import ModelError
from flatquant.recipes import recipe
from flatquant.runtime import fused
from flatquant.runtime.build import SITES_SLOT
from flatquant.runtime.kvcache import QuantizedCache
from flatquant.runtime.linear import FrozenLinear, PackedLinear
from flatquant.runtime.packedcache import PackedCache
from flatquant.seams import CACHE
from tests.tiny_models import randomised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "multi-head": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama3": LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2 windows": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=0),
    "some windows": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
}


def quantised(config, scheme: str = "w4a4kv4", method: str = "flatquant") -> PreTrainedModel:
    """A tiny model on its integers, packed."""
    model = randomised(config)
    tokens = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    made = recipe(method, scheme, "reference").tuned(samples=4, seqlen=16, epochs=1, batch_size=2)
    calibrate(model, made, tokens, device=torch.device("cpu"), dtype=torch.float32)
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, FrozenLinear):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, PackedLinear.of(module))
    return model.eval().to(DEVICE)


@pytest.fixture(scope="module", params=[*CONFIGS, "without transforms"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made = quantised(CONFIGS[request.param]) if request.param in CONFIGS else quantised(CONFIGS["llama"], method="rtn")
    fused.attach(made, (DEVICE,))
    assert fused.runtime(made) is not None
    return made


def plainly(model: PreTrainedModel, *args, **kwargs):
    """What transformers' own forward pass gives."""
    return type(model).forward(model, *args, **kwargs)


def texts(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same numbers, (rows, ..), in two rows of three at least.

    Two orders of a sum differ in the last bit; rarely, an activation lies so near the edge between two integers that
    this moves it, and what comes after it in its row is another text. An error moves every row.
    """
    assert got.shape == want.shape
    apart = (got - want).abs().flatten(1).amax(1)
    assert apart.isfinite().all()
    if DEVICE == "cuda":  # the matrix units' half precision moves more of them, and none by more than a step
        close(got, want)
    else:
        assert (apart <= 1e-4 * want.abs().max()).float().mean() >= 2 / 3, apart


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same function, but for single activations that were rounded the other way.  # (rows, T, V)

    Where a model of this size rounds one activation differently, its logits move by a tenth to a half of their size, as
    they do when its embedding is rounded to 11 bits, and now and then by more than all of it; where it reads another
    text, by nine tenths at the median. An error is one of a token's place, in all rows.
    """
    size = want.norm(dim=-1)
    apart = ((got - want).norm(dim=-1) / size).masked_fill(size == 0, torch.nan)  # of padding, zeros are compared
    assert apart.nanmedian() <= 0.4, apart
    assert apart.nanmedian(0).values.max() <= 0.6, apart


@torch.no_grad()
def test_logits_are_the_same(model: PreTrainedModel) -> None:
    ids = texts(6, 13)
    agree(model(ids).logits, plainly(model, ids).logits)
    agree(model(ids, logits_to_keep=3).logits, plainly(model, ids).logits[:, -3:])
    agree(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, plainly(model, ids).logits[:, [1, 4]])
    assert len(model(ids, return_dict=False, use_cache=False)) == 1


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model: PreTrainedModel) -> None:
    ids = texts(6, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = mask[3, :9] = 0
    got, want = (f(ids, attention_mask=mask).logits for f in (model, lambda *a, **k: plainly(model, *a, **k)))
    assert got.isfinite().all()
    agree(got * mask[..., None], want * mask[..., None])


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1, 1, 1, 10], [5, 1, 1, 4, 2], [13]])
def test_a_text_in_pieces_is_the_same_text(model: PreTrainedModel, pieces: list[int]) -> None:
    ids = texts(6, 13)
    runtime = fused.runtime(model)
    assert runtime is not None
    cache = runtime.new_cache(6, 13)
    got = [model(part, **{CACHE: cache}).logits for part in ids.split(pieces, dim=1)]
    assert cache.get_seq_length() == 13
    agree(torch.cat(got, 1), plainly(model, ids).logits)


@torch.no_grad()
def test_a_cache_that_is_full_grows(model: PreTrainedModel) -> None:
    ids = texts(6, 13)
    heads = model.config.num_key_value_heads
    cache = PackedCache(blocks=2, batch=6, heads=heads, places=4, head_dim=16, device=ids.device)
    got = [model(part, **{CACHE: cache}).logits for part in ids.split(1, dim=1)]
    assert cache.places >= 13
    agree(torch.cat(got, 1), plainly(model, ids).logits)


@pytest.mark.parametrize("sample", [False, True])
def test_generate_writes_the_same_text(model: PreTrainedModel, sample: bool) -> None:
    ids = texts(6, 9)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[4, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": sample, "pad_token_id": 0}
    written = []
    for cache in (None, QuantizedCache(model)):
        torch.manual_seed(0)
        written.append(model.generate(ids, **{CACHE: cache}, **options))
    same = (written[0] == written[1]).float()
    assert same.all(1).float().mean() >= 2 / 3 if DEVICE == "cpu" else same[:, :10].mean() > 0.9  # see `agree`


def test_a_cache_is_used_again_unless_the_caller_has_it(model: PreTrainedModel) -> None:
    runtime = fused.runtime(model)
    assert runtime is not None
    ids = texts(1, 5)
    first = model.generate(ids, max_new_tokens=4, do_sample=False)
    spare = runtime._spare
    kept = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)[CACHE]
    assert isinstance(kept, PackedCache)
    assert kept is not spare
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), first)
    assert runtime._spare is spare
    assert kept.get_seq_length() == 8


def test_what_it_cannot_do_goes_the_other_way(model: PreTrainedModel) -> None:
    ids = texts(2, 9)
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, **beams)
    assert torch.equal(model.generate(ids, **beams), want)
    right = torch.ones_like(ids)
    right[0, -3:] = 0
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert model(ids, attention_mask=right).logits.equal(plainly(model, ids, attention_mask=right).logits)
        assert model(inputs_embeds=embeds).logits.equal(plainly(model, inputs_embeds=embeds).logits)
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3
    assert model(ids, labels=ids).loss.isfinite()
    runtime = fused.runtime(model)
    assert runtime is not None
    with pytest.raises(ModelError, match="padding on the left"):
        model(ids, attention_mask=right, **{CACHE: runtime.new_cache(2, 20)})
    with pytest.raises(ModelError, match="made for 3 sequences, not 2"):
        model(ids, **{CACHE: runtime.new_cache(3, 20)})


def test_nothing_is_held_twice(model: PreTrainedModel) -> None:
    runtime = fused.runtime(model)
    assert runtime is not None
    joined = {p.packed.untyped_storage().data_ptr() for b in runtime.blocks for p in b.products.values()}
    held = {m.packed.untyped_storage().data_ptr() for m in model.modules() if isinstance(m, PackedLinear)}
    assert joined == held


@pytest.mark.parametrize(
    ("scheme", "method", "reason"),
    [
        ("w4a4", "flatquant", "keys and values of block 0 are not both quantised"),
        ("w8a4kv4", "flatquant", "not symmetric 4-bit integers"),
        ("w4a16kv4", "rtn", "not on a symmetric grid"),
        ("w16a4kv4", "rtn", "not packed integers"),
        ("w4g32a4kv4", "rtn", "one scale a row"),
        ("w4a4k8v4", "rtn", "asymmetric 4-bit grids"),
        ("w4a4kv4", "svdquant", "BranchedLinear"),
    ],
)
def test_a_model_without_kernels_runs_and_says_why_once(scheme: str, method: str, reason: str) -> None:
    model = quantised(CONFIGS["llama"], scheme, method)
    fused.attach(model, (DEVICE,))
    ids = texts(1, 5)
    with pytest.warns(UserWarning, match=f"without fused kernels, since .*{reason}"):
        got = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(ids).logits.equal(got)
        model.generate(ids, max_new_tokens=2)
    assert getattr(model.model.layers[0], SITES_SLOT) is not None


@pytest.mark.skipif(DEVICE == "cuda", reason="there, all other tests run the kernels")
@pytest.mark.parametrize(
    ("name", "method"), [("llama", "flatquant"), ("biases", "flatquant"), ("mistral", "flatquant"), ("llama", "rtn")]
)
def test_kernels_serve_a_model(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: a prompt with padding, then token by token."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from flatquant.ops import int4_linear, kron_quantize, kv_cache
    from flatquant.ops.int4_linear import triton as products
    from flatquant.ops.kv_cache import triton as caching

    used = set()

    def attend(*args, parts: int):
        used.add("attend")
        return caching.attend(*args, parts=2, block=16)

    def product(x: torch.Tensor, *args):
        used.add("vector" if len(x) == 1 else "few")
        return (products.vector if len(x) == 1 else products.few)(x, *args)

    model = quantised(CONFIGS[name], method=method)
    ids = texts(1, 8)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        want = plainly(model, ids, attention_mask=mask).logits
    monkeypatch.setattr(kron_quantize.Site, "_fused", lambda self, x: self.unsupported() is None)
    monkeypatch.setattr(int4_linear, "int4_linear", product)
    monkeypatch.setattr(kv_cache, "append", caching.append)
    monkeypatch.setattr(kv_cache, "attend", lambda *args: attend(*args[:-1], parts=args[-1]))
    fused.attach(model, ("cpu",))
    runtime = fused.runtime(model)
    assert runtime is not None
    cache = runtime.new_cache(1, 8)
    got = [model(ids[:, :6], attention_mask=mask[:, :6], **{CACHE: cache}).logits]
    got += [model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], **{CACHE: cache}).logits for i in (6, 7)]
    close(torch.cat(got, 1)[:, 2:], want[:, 2:])
    assert used == {"attend", "vector", "few"}


@given(n=st.integers(1, 2048))
def test_without_factors_rows_have_an_even_number_of_columns(n: int) -> None:
    channels = 32 * n
    rows = fused._rows(channels)
    assert channels % (2 * rows) == 0
    assert rows <= channels // rows


def test_other_devices_are_left_alone() -> None:
    model = quantised(CONFIGS["llama"]).cpu()
    fused.attach(model)
    ids = texts(1, 5).cpu()
    with torch.no_grad():
        assert model(ids).logits.equal(plainly(model, ids).logits)
    assert model not in fused._made
