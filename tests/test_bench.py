"""The benchmark measures what it says, and gives no time to what is wrong. Times themselves are a GPU's business."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from flatquant import bench
from flatquant.bench import timing, whole
from flatquant.cli import app
from flatquant.errors import SpecError
from flatquant.ops import int4_linear, int8_linear, kron_quantize, kv_cache
from flatquant.runtime import fused
from flatquant.runtime.linear import PackedLinear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few runs, of one set of inputs."""
    monkeypatch.setattr(timing, "PAST_CACHE", 1)

    def in_turn(sides, device, *, seconds: float = 0.3) -> list[bench.Times]:
        return [bench.Times(timing.wall(calls), 0.0, 1.0) for calls in sides]

    replace_in_turn(monkeypatch, in_turn)


def replace_in_turn(monkeypatch: pytest.MonkeyPatch, function: Callable[..., list[bench.Times]]) -> None:
    for module in (timing, whole):
        monkeypatch.setattr(module, "in_turn", function)


def test_everything_tiny() -> None:
    rows, memory = bench.run(CPU, ("sites", "products", "models"), ("tiny",), tiny=True)
    assert all(row.correct and row.ms is not None and row.ms > 0 and row.ratio is not None for row in rows)
    assert [row.what for row in rows if "prefill" in row.what] == [f"tiny prefill, {t}" for t in bench.TRANSFORMS]
    assert [row.tokens for row in rows if "decode" in row.what] == [1] * 3 + [2] * 3
    assert {row.what for row in rows if row.what.startswith("product")} == {
        "product 128 x 64",
        "product 64 x 64",
        "product 192 x 64",
        "product 64 x 96",
    }
    # Two heads of 16 channels in two blocks: 8 bytes, a scale and a zero point, against 32 bytes.
    assert memory["tiny"]["cache"] == 2 * 2 * 2 * 16 * (8 + 4 + 1)
    assert memory["tiny"]["bf16_cache"] == 2 * 2 * 2 * 16 * 32


@pytest.mark.parametrize("shape", [name for name, shape in bench.SHAPES.items() if shape.tiny and name != "tiny"])
def test_other_shapes_tiny(shape: str) -> None:
    rows, memory = bench.models(shape, CPU, prompt=16, batches=(1,))
    assert len(rows) == 2 * len(bench.TRANSFORMS)
    assert all(row.correct and row.ratio is not None for row in rows)
    assert memory["weights"] < memory["bf16_weights"] / 2


def test_an_embedding_in_8_bits_is_counted() -> None:
    config = bench.config_of("tiny-ends8")
    models = [bench.packed_model(config, CPU, scheme=bench.shape_of(s).scheme) for s in ("tiny-head8", "tiny-ends8")]
    sizes = [sum(t.nbytes for t in model.state_dict().values()) for model in models]
    assert sizes[0] - sizes[1] == config.vocab_size * (config.hidden_size * (2 - 1) - 4)
    rows = models[1].get_input_embeddings()(torch.arange(config.vocab_size)).float()
    assert abs(float(rows.mean())) < 0.1 * float(rows.std())
    assert bench.kernels_error(bench.runtime_of(models[1])) <= 1


def test_an_output_layer_in_8_bits_is_checked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench.config_of("tiny-head8")
    plain, rounded = (bench.packed_model(config, CPU, scheme=bench.shape_of(s).scheme) for s in ("tiny", "tiny-head8"))
    sizes = [sum(t.nbytes for t in model.state_dict().values()) for model in (plain, rounded)]
    vocabulary, hidden = config.vocab_size, config.hidden_size
    assert sizes[0] - sizes[1] == vocabulary * hidden * (2 - 1) - 4 * vocabulary
    assert bench.kernels_error(bench.runtime_of(rounded)) <= 1
    right = int8_linear.int8_linear
    monkeypatch.setattr(int8_linear, "int8_linear", lambda *args: right(*args) * 1.02)
    assert bench.kernels_error(bench.runtime_of(rounded)) > 1
    assert bench.kernels_error(bench.runtime_of(plain)) <= 1


def test_a_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right, product = kron_quantize.plain, int4_linear.int4_linear

    def wrong(x, site, form):
        values, scale = right(x, site, form)
        return (255 - values if form == "packed" else values), scale

    monkeypatch.setattr(kron_quantize, "plain", wrong)
    monkeypatch.setattr(int4_linear, "int4_linear", lambda *args, **kwargs: product(*args, **kwargs) * 1.1)
    rows, _ = bench.run(CPU, ("sites", "products"), ("tiny",), tiny=True)
    assert not any(row.correct for row in rows)
    assert all(row.ms is None and row.ratio is None for row in rows)
    done = CliRunner().invoke(app, ["bench", "sites", "--shapes", "tiny", "--device", "cpu"])
    assert done.exit_code == 1
    assert "failed their check" in done.stderr
    assert "wrong" in done.stdout


def test_a_wrong_block_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = kron_quantize.norm
    monkeypatch.setattr(kron_quantize, "norm", lambda x, gain, eps, *rest: norm(x.flip(-1), gain, eps, *rest))
    rows, _ = bench.models("tiny", CPU, prompt=16, batches=(1,))
    assert not any(row.correct for row in rows)


@pytest.mark.parametrize("kernel", ["norm", "gate", "plain", "merge"])
def test_a_slightly_wrong_kernel_of_a_block_has_no_time(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kron_quantize, kernel)

    def wrong(*args):
        values, scale = right(*args)
        return values, scale * 1.02

    monkeypatch.setattr(kron_quantize, kernel, wrong)
    rows, _ = bench.models("tiny", CPU, prompt=16, batches=(1,))
    assert not any(row.correct for row in rows)


def test_wrong_attention_over_the_cache_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = kv_cache.attend
    monkeypatch.setattr(kv_cache, "attend", lambda q, k, v, last, *rest: attend(q, k, v, last - 1, *rest))
    rows, _ = bench.models("tiny", CPU, prompt=16, batches=(1,))
    assert not any(row.correct for row in rows)


def test_the_baseline_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which PyTorch's fast kernels do not take; and none of the packed models' attention."""
    masks = []
    attention = whole._attention
    monkeypatch.setattr(whole, "_attention", lambda *args, **kw: masks.append(args[4]) or attention(*args, **kw))
    in_turn = whole.in_turn

    def measured(sides, device, *, seconds: float = 0.3) -> list[bench.Times]:
        before = len(masks)
        made = in_turn(sides, device, seconds=seconds)
        seen.append(len(masks) - before)
        return made

    seen: list[int] = []
    replace_in_turn(monkeypatch, measured)
    bench.models("tiny", CPU, prompt=16, batches=(1,))
    assert masks
    assert all(mask is None for mask in masks)
    decode, *_, prefill, ours = seen
    assert decode == 2  # blocks
    assert prefill == 2
    assert ours == 0


def test_where_memory_is_short_sides_are_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    in_turn, together = whole.in_turn, []

    def measured(sides, device, *, seconds: float = 0.3) -> list[bench.Times]:
        together.append(len(sides))
        if len(sides) > 1:
            raise torch.OutOfMemoryError
        return in_turn(sides, device, seconds=seconds)

    monkeypatch.setattr(whole, "_BACKENDS", {"flash": whole._BACKENDS["flash"]})
    monkeypatch.setattr(whole, "TRANSFORMS", ("kronecker",))
    monkeypatch.setattr(whole, "free_device", lambda device: 0)
    replace_in_turn(monkeypatch, measured)
    rows, _ = bench.models("tiny", CPU, prompt=16, batches=(1,))
    assert together == [1, 1, 1, 1]  # decoding and a prompt of the baseline, then of ours
    assert [row.correct and row.ratio is not None for row in rows] == [True, True]
    together.clear()
    sides = [lambda: lambda: None for _ in range(3)]
    assert len(whole._in_turn_or_alone(sides, CPU)) == 3
    assert together == [3, 1, 1, 1]


def test_a_model_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def models(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "models", models)
    done = CliRunner().invoke(app, ["bench", "models", "--shapes", "tiny", "--device", "cpu"])
    assert done.exit_code == 1
    assert done.stderr == "error: tiny needs more memory than cpu has; name another with --shapes\n"


def test_sides_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    order = []
    sides = [[lambda: order.append("a"), lambda: order.append("b")], [lambda: order.append("c")]]
    times = bench.in_turn(sides, CPU, seconds=0)
    assert len(times) == 2
    assert order == ["a", "b", "c"] * (len(order) // 3)
    assert len(order) >= 30
    assert bench.in_turn([], CPU) == []


def test_transforms_are_what_the_row_says() -> None:
    config = bench.config_of("tiny")
    factors = {}
    for transform in bench.TRANSFORMS:
        block = bench.packed_model(config, CPU, transform).model.layers[0].flatquant
        factors[transform] = {name: site.left for name, site in block.items()}
    assert all(left is None for left in factors["none"].values())
    assert all(left is not None for left in factors["kronecker"].values())
    assert {name for name, left in factors["hadamard"].items() if left is not None} == {"attn_out", "mlp_mid"}
    assert (factors["hadamard"]["attn_out"].abs() == 0.5).all()  # of four heads


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["bench", "sites", "--shapes", "tiny", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert {row["baseline"] for row in rows} == {"moving the bytes"}
    for arguments, message in (
        (["kernels"], "known: sites, products, models"),
        (["models", "--shapes", "gpt-5"], "unknown shape"),
        (["sites", "--device", "cpu"], "CUDA devices"),
    ):
        done = CliRunner().invoke(app, ["bench", *arguments])
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ")
        assert any(part in done.stderr for part in message.split("|"))
    with pytest.raises(SpecError, match="known: llama-2-7b"):
        bench.config_of("gpt-5")


def test_random_weights_have_a_mean_of_zero() -> None:
    """A mean of half a step would add up over a token's channels, and one token's error be half of all."""
    shape = bench.shape_of("tiny-head8")
    model = bench.packed_model(bench.config_of("tiny-head8"), CPU, scheme=shape.scheme)
    packed = [m.qweight() for m in model.modules() if isinstance(m, PackedLinear)]
    for bits, most in ((4, 7), (8, 127)):
        values = torch.cat([w.values.flatten() for w in packed if w.spec.bits == bits]).double()
        assert values.mean().abs() <= 4 * values.std() / len(values) ** 0.5
        assert (values.min(), values.max()) == (-most, most)


def _swapped(block: fused.Block) -> fused.Block:
    product = block.products["mlp_in"]  # gate and up change places
    return replace(block, products={**block.products, "mlp_in": replace(product, packed=product.packed.flip(0))})


def _louder(block: fused.Block) -> fused.Block:
    product = block.products["attn_out"]
    return replace(block, products={**block.products, "attn_out": replace(product, scale=1.4 * product.scale)})


def _transposed(block: fused.Block) -> fused.Block:
    site = block.sites["mlp_in"]
    return replace(block, sites={**block.sites, "mlp_in": replace(site, left=site.left.T.contiguous())})


@pytest.mark.parametrize("transform", bench.TRANSFORMS)
def test_the_whole_block_passes_where_it_is_right_and_fails_where_it_is_not(transform: str) -> None:
    torch.manual_seed(0)
    model = bench.packed_model(bench.config_of("tiny"), CPU, transform)
    runtime = bench.runtime_of(model)
    right = runtime.blocks[0]
    with torch.no_grad():
        for _ in range(3):
            assert bench.block_error(model, runtime) <= bench.BLOCK_ERROR
        for wrong in (_swapped, _louder, *([_transposed] if transform == "kronecker" else [])):
            runtime.blocks[0] = wrong(right)
            assert bench.block_error(model, runtime) > bench.BLOCK_ERROR, wrong.__name__
