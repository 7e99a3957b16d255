"""A model larger than memory: one block at a time gives the bytes that the whole model gives, in bounded memory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flatquant
from flatquant import recipes
from flatquant.api import call
from flatquant.calibrate.pipeline import calibrate
from flatquant.calibrate.state import RunState
from flatquant.errors import CalibrationError, FlatQuantError, ModelError, StreamingWarning
from flatquant.models import load_model, open_model
from flatquant.runtime.experts import open_experts
from flatquant.spec import DataSpec, EndToEndSpec, FitSpec, Recipe, SolverSpec
from flatquant.wiring.archs import arch_of
from tests.laws import CPU, blocks_of, quick, tokens_for
from tests.tiny_models import FAMILIES, tiny_family, tiny_llama, tiny_tokenizer

SMALL = dataclasses.replace(
    recipes.flatquant("w4a4kv4"), data=DataSpec(samples=2, seqlen=12), fit=FitSpec(epochs=1, batch_size=2)
)


def saved(model, folder: Path) -> Path:
    """A model as a folder of many small shards."""
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(dtype=torch.bfloat16, tied=False), tmp_path_factory.mktemp("model"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the report all but `timing`, and what the models wrote: a streamed one is never there to write."""
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    report = json.loads(found["flatquant_report.json"])
    report.pop("timing")
    report["verdict"].pop("texts")
    return {**found, "flatquant_report.json": json.dumps(report, sort_keys=True).encode()}


def both(folder: Path, recipe: Recipe, work: Path) -> list[dict[str, bytes]]:
    """What a plain run writes, and what a streamed one does."""
    for stream in (False, True):
        tokens = torch.randint(0, 120, (2, 12), generator=torch.Generator().manual_seed(0))
        given = tokens if recipe.needs_data else None
        flatquant.quantize(folder, recipe, given, output=work / str(stream), device="cpu", stream=stream)
    return [contents(work / str(stream)) for stream in (False, True)]


# ------------------------------------------------------------------------------------------------ the same bytes


# transformers renames what they hold on the way in, or their files hold experts in another layout.
CONVERTED = {
    "mixtral", "minimax_m2", "ernie4_5_moe", "granitemoe", "gpt_oss", "gpt_neox", "gpt_neox sequential", "nemotron_h",
    "granitemoehybrid", "axk1", "llama4_text", "hy_v3", "lfm2_moe", "exaone_moe", "flint", "olmo_hybrid",
    "gemma4_text experts", "granitemoe_swa", "granitemoeshared", "kolibri1", "laguna", "lara_mini", "lfm3", "phimoe",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONVERTED & FAMILIES.keys()))
def test_what_is_converted_on_the_way_in_is_read_whole(name: str, tmp_path: Path) -> None:
    folder = saved(tiny_family(name, dtype=torch.float16, tied=False), tmp_path / "model")
    with pytest.raises(ModelError, match=r"cannot be read tensor by tensor: .*--no-stream"):
        call._streamed(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in CONVERTED])
def test_every_family_is_read_as_transformers_reads_it(name: str, tied: bool, tmp_path: Path) -> None:
    folder = saved(tiny_family(name, tied=tied, dtype=torch.float16), tmp_path / "model")
    whole, _ = load_model(folder)
    open_experts(whole)
    streamed, _, checkpoint = call._streamed(folder)
    blocks = blocks_of(streamed)
    assert all(p.is_meta for p in blocks.parameters())
    for i, block in enumerate(blocks):
        checkpoint.fill(block, f"{arch_of(whole.config).blocks}.{i}.")
    want, got = whole.state_dict(), streamed.state_dict()
    assert want.keys() == got.keys()
    assert all(want[k].dtype == got[k].dtype and torch.equal(want[k], got[k]) for k in want)
    buffers = dict(streamed.named_buffers())
    assert all(torch.equal(b, buffers[k]) for k, b in whole.named_buffers())
    assert whole.config.to_dict() == streamed.config.to_dict()
    assert whole.generation_config.to_dict() == streamed.generation_config.to_dict()
    with torch.no_grad():
        ids = tokens_for(whole, 2, 9)
        assert torch.equal(whole(ids).logits, streamed(ids).logits)


@pytest.mark.parametrize(
    "recipe",
    [
        SMALL,
        dataclasses.replace(SMALL, solver=SolverSpec(kind="gptq")),
        dataclasses.replace(recipes.autoround("w3", "quick"), data=SMALL.data),
        recipes.rtn("w4a4kv4"),
        dataclasses.replace(recipes.quarot("w4a4kv4"), data=SMALL.data),  # rotates the ends too
        dataclasses.replace(recipes.vptq("w3"), data=SMALL.data),  # codebooks
        dataclasses.replace(recipes.svdquant("w4a4"), data=SMALL.data),  # branches
        dataclasses.replace(SMALL, scheme=recipes.flatquant("w4a4,mlp_mid=w16a16").scheme),
    ],
    ids=lambda recipe: f"{recipe.name}-{recipe.scheme}-{recipe.solver.kind}",
)
def test_a_streamed_run_writes_the_bytes_of_a_plain_one(folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    plain, streamed = both(folder, recipe, tmp_path)
    assert plain.keys() == streamed.keys()
    assert not [name for name in plain if plain[name] != streamed[name]]


@pytest.mark.skipif("falcon_h1" not in FAMILIES, reason="not in this release of transformers")
def test_a_buffer_of_a_block_that_no_file_holds_is_kept(tmp_path: Path) -> None:
    folder = saved(tiny_family("falcon_h1", tied=False, dtype=torch.bfloat16), tmp_path / "model")
    plain, streamed = both(folder, recipes.rtn("w4a4"), tmp_path)
    assert not [name for name in plain if plain[name] != streamed[name]]


def test_shards_are_those_of_save_file(tmp_path: Path) -> None:
    from flatquant.runtime.artifact.write import _Pending, _write_shard

    kinds = (
        torch.float32,
        torch.bfloat16,
        torch.uint8,
        torch.int8,
        torch.float16,
        torch.int32,
        torch.int64,
        torch.float64,
    )
    kinds = (*kinds, torch.bool, torch.int16)
    tensors = {f"{i}.{'xyz'[i % 3]}": torch.arange(3 + i).to(kind)[:, None] for i, kind in enumerate(kinds)}
    tensors |= {f"b{i}": torch.ones(i, 2, dtype=kinds[i % 3]) for i in range(8)} | {"scalar": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    _write_shard({n: _Pending(t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()}, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_streamed_run_may_be_killed_and_go_on_plain(folder: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("solve", 1):
            raise Killed

    tokens = torch.randint(0, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(SMALL, solver=SolverSpec(kind="gptq"))
    options = {"device": "cpu", "output": tmp_path / "out"}
    flatquant.quantize(folder, recipe, tokens, device="cpu", output=tmp_path / "whole", stream=False)
    for first, then in ((True, True), (True, False), (False, True)):
        with pytest.raises(Killed):
            flatquant.quantize(folder, recipe, tokens, stream=first, progress=kill, **options)
        flatquant.quantize(folder, recipe, tokens, stream=then, resume=True, **options)
        found = contents(tmp_path / "out")
        assert found == contents(tmp_path / "whole")
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def test_the_model_of_a_streamed_run_is_read_when_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    result = flatquant.quantize(folder, recipes.rtn("w4"), output=tmp_path / "out", device="cpu", stream=True)
    assert "model" not in vars(result)
    ids = torch.arange(9)[None]
    assert torch.equal(result.model(ids).logits, flatquant.load(tmp_path / "out")(ids).logits)


# ------------------------------------------------------------------------------------------------ what cannot be


def refused(match: str, *args, error: type[FlatQuantError] = CalibrationError, **options) -> None:
    with pytest.raises(error, match=match) as caught:
        flatquant.quantize(*args, device="cpu", stream=True, **options)
    assert "\n" not in str(caught.value)


def test_what_needs_the_whole_model_is_not_streamed(folder: Path, tmp_path: Path) -> None:
    output = {"output": tmp_path / "out"}
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    end = dataclasses.replace(SMALL, end_to_end=EndToEndSpec(steps=1))
    refused("end-to-end fit runs through all blocks at once.*--no-stream", folder, end, tokens, **output)
    adaptive = dataclasses.replace(SMALL, solver=SolverSpec(kind="gptq", hessian="output_adaptive"))
    refused("gradient through all blocks.*--no-stream", folder, adaptive, tokens, **output)
    for text in ("self", "wikitext2:3,self"):
        refused("writes its own calibration text.*--no-stream", folder, SMALL, text, **output)
    refused("no output folder is given.*--no-stream", folder, SMALL, tokens)
    refused("in memory cannot be streamed", tiny_llama(), SMALL, tokens, error=ModelError, **output)
    refused("only a local folder can be streamed", "some/model", SMALL, tokens, error=ModelError, **output)
    assert not (tmp_path / "out.partial").exists()
    options = {"checkpoint": open_model(folder)[2], "state": RunState(tmp_path / "state", {}, resume=False)}
    recipe = quick("w4", end_to_end=EndToEndSpec(steps=1))
    with pytest.raises(CalibrationError, match="cannot be streamed"):
        calibrate(tiny_llama(), recipe, tokens, device=CPU, dtype=torch.float32, **options)


def altered(folder: Path, work: Path, change) -> Path:
    """A copy of a model in one file, with other tensors."""
    work.mkdir()
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (work / file).write_bytes((folder / file).read_bytes())
    save_file(change(tensors), work / "model.safetensors", metadata={"format": "pt"})
    return work


def test_names_that_transformers_would_change_are_loaded_whole(folder: Path, tmp_path: Path) -> None:
    # Without its prefix, a model is found all the same by transformers.
    bare = altered(folder, tmp_path / "bare", lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    with pytest.raises(
        ModelError, match=r"tensor by tensor: .* is not both in its files and in the model.*--no-stream"
    ):
        open_model(bare)
    more = altered(folder, tmp_path / "more", lambda t: t | {"model.layers.0.rotary.inv_freq": torch.ones(2)})
    with pytest.raises(ModelError, match="inv_freq is not both"):
        open_model(more)
    short = altered(folder, tmp_path / "short", lambda t: t | {"model.norm.weight": torch.ones(5)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight has another shape"):
        open_model(short)
    # Left to itself, a run of a model that does not fit into memory loads it whole.
    limit = 1 << 40
    with pytest.warns(StreamingWarning, match="larger than the memory, and loaded whole: .* tensor by tensor"):
        result = call._open(bare, recipes.rtn("w4"), None, call.Place.of(tmp_path / "o"), call.Limits(host=1), None)
    assert result[2] is None
    assert call._open(folder, recipes.rtn("w4"), None, call.Place.of(tmp_path / "o"), call.Limits(host=1), None)[2]
    assert call._open(folder, recipes.rtn("w4"), None, None, call.Limits(host=1), None)[2] is None
    assert (
        call._open(folder, recipes.rtn("w4"), None, call.Place.of(tmp_path / "o"), call.Limits(host=limit), None)[2]
        is None
    )


def test_broken_weights_are_found_before_any_work(folder: Path, tmp_path: Path) -> None:
    def damage(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
        return tensors

    broken = altered(folder, tmp_path / "broken", damage)
    refused("^block 1: mlp.up_proj.weight holds NaN", broken, recipes.rtn("w4"), output=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_file_that_goes_away_is_an_error_in_one_line(folder: Path, tmp_path: Path) -> None:
    gone = altered(folder, tmp_path / "gone", lambda t: t)
    model, _, checkpoint = open_model(gone)
    (gone / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"cannot read model\.norm\.weight from .*; fetch the model again"):
        checkpoint.read("model.norm.weight")
    assert isinstance(model, nn.Module)


# ------------------------------------------------------------------------------------------------ memory

PEAK = """
import dataclasses, sys
from pathlib import Path
import torch
from flatquant import quantize, recipes
from flatquant.spec import DataSpec, FitSpec
recipe = dataclasses.replace(
    recipes.flatquant("w4a4kv4"), data=DataSpec(samples=2, seqlen=16), fit=FitSpec(epochs=1, batch_size=2)
)
folder, output, stream = sys.argv[1:]
tokens = torch.zeros(2, 16, dtype=torch.int64)
quantize(folder, recipe, tokens, output=output, device="cpu", stream=stream == "stream")
status = Path("/proc/self/status").read_text()
print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
def test_the_peak_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    def peak(layers: int, how: str) -> int:
        folder = tmp_path / f"model-{layers}"
        if not folder.exists():
            model = tiny_llama(hidden=512, intermediate=1408, layers=layers, tied=False)
            model.save_pretrained(folder, max_shard_size="30MB")
            tiny_tokenizer().save_pretrained(folder)
        command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / f"{layers}-{how}"), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    block = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1408)  # bytes
    few, many = peak(3, "stream"), peak(19, "stream")
    assert many - few < 1.5 * block  # of 16 blocks more
    assert peak(19, "whole") - many > 12 * block  # or this test sees nothing
