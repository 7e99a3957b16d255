"""Folders: what is saved is what is loaded, and whatever is damaged is refused in one line."""

import errno
import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from flatquant import spec
from flatquant.errors import ArtifactError, ModelError
from flatquant.runtime.artifact import check_output, facing, inspect, keep_evaluation, load, save
from flatquant.runtime.folder import Folder, check_name, content_hash, plan_from_json, plan_to_json
from flatquant.runtime.kvcache import QuantizedCache
from flatquant.runtime.linear import FrozenLinear, PackedLinear
from flatquant.seams import CACHE
from tests.tiny_models import tiny_tokenizer

SCHEMES = [
    "w4a4kv4",
    "w3a16",
    "w4g2a8",
    "k4v4",
    "w16a4",
    "k3",
    "w4a4kv4,mlp_mid=w8a8,1.attn_in=w16a16",
    "w4a4kv4,0.k8,1.k16v3",
]
REPORT = {"seconds": {"fit": 1.5}, "blocks": [{"losses": [2.0, 1.0]}, {}]}


def save_it(q, output: Path, **kwargs) -> Path:
    save(q.model, q.plan, output, recipe=spec.to_dict(q.recipe), report=REPORT, **kwargs)
    return output


@pytest.fixture(scope="module")
def whole(quantised, tmp_path_factory) -> Path:
    """A folder in several shards, with a tokenizer."""
    path = tmp_path_factory.mktemp("whole") / "model"
    return save_it(quantised("w4a4kv4"), path, tokenizer=tiny_tokenizer(), max_shard_bytes=15_000)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(path: Path, match: str | None = None, **kwargs) -> None:
    with pytest.raises(ArtifactError, match=match) as caught:
        load(path, **kwargs)
    assert "\n" not in str(caught.value)


def forge(folder: Path, change: Callable[[dict], None]) -> None:
    """Edit config.json and make all hashes right again, as malice would."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    listed = config["quantization_config"].get("files")
    for name in listed if isinstance(listed, dict) else ():
        if (folder / name).is_file():
            listed[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    config["quantization_config"]["content_hash"] = content_hash(config)
    file.write_text(json.dumps(config))


# --------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_loaded_model_is_the_saved_one(quantised, tmp_path: Path, scheme: str, tied: bool) -> None:
    q = quantised(scheme, tied=tied, bias=not tied)
    want = q.model(q.tokens).logits
    before = {k: v.clone() for k, v in q.model.state_dict().items()}
    loaded = load(save_it(q, tmp_path / "model"))
    assert torch.equal(loaded(q.tokens).logits, want)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, module in q.model.named_modules():
        if isinstance(module, FrozenLinear):
            ours = loaded.get_submodule(name)
            assert isinstance(ours, PackedLinear)
            assert torch.equal(ours.qweight().values, module.qweight().values)
            assert torch.equal(ours.scale, module.scale)
    # Saving left the model in memory alone.
    after = q.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_what_is_written_is_read(
    quantised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A family may have buffers of any type in its state."""
    plain = LlamaMLP.__init__

    def with_a_buffer(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.register_buffer("steps", torch.arange(3).to(dtype))

    monkeypatch.setattr(LlamaMLP, "__init__", with_a_buffer)
    q = quantised("w4a4")
    for layer in q.model.model.layers:
        layer.mlp.register_buffer("steps", torch.tensor([3, 0, 1]).to(dtype))
    steps = load(save_it(q, tmp_path / "model")).model.layers[1].mlp.steps
    assert steps.dtype == dtype
    assert torch.equal(steps, torch.tensor([3, 0, 1]).to(dtype))
    assert inspect(tmp_path / "model").blocks == 2


def test_what_could_not_be_read_is_not_written(quantised, tmp_path: Path) -> None:
    q = quantised("w4a4")
    q.model.model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ArtifactError, match=r"model\.phase is torch\.complex64"):
        save_it(q, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_half_precision_and_generation(quantised, tmp_path: Path) -> None:
    q = quantised("w4a4kv4", dtype=torch.bfloat16, bias=True)
    loaded = load(save_it(q, tmp_path / "model"))
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(q.tokens).logits, q.model(q.tokens).logits)
    ours, memory = (m.generate(q.tokens[:, :5], max_new_tokens=6, do_sample=False) for m in (loaded, q.model))
    assert torch.equal(ours, memory)
    cached = loaded.generate(q.tokens[:, :5], max_new_tokens=6, do_sample=False, **{CACHE: QuantizedCache(loaded)})
    assert torch.equal(cached, memory)


def test_a_dtype_of_integers_is_refused(whole: Path) -> None:
    with pytest.raises(ModelError, match=r"dtype is torch\.int8; give one of floating point"):
        load(whole, dtype=torch.int8)


def test_another_dtype_leaves_grids_and_transforms_alone(whole: Path) -> None:
    model = load(whole, dtype=torch.bfloat16)
    assert model.dtype == model.config.dtype == torch.bfloat16
    block = model.model.layers[0]
    assert block.self_attn.q_proj.scale.dtype == block.flatquant["attn_in"].left.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_the_same_model_gives_the_same_bytes(quantised, whole: Path, tmp_path: Path) -> None:
    again = save_it(quantised("w4a4kv4"), tmp_path / "again", tokenizer=tiny_tokenizer(), max_shard_bytes=15_000)
    names = sorted(p.name for p in whole.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert all((whole / n).read_bytes() == (again / n).read_bytes() for n in names)


def test_a_loaded_model_saves_to_the_same_bytes(quantised, whole: Path, tmp_path: Path) -> None:
    q = quantised("w4a4kv4")._replace(model=load(whole))
    again = save_it(q, tmp_path / "again", tokenizer=tiny_tokenizer(), max_shard_bytes=15_000)
    assert (whole / "config.json").read_bytes() == (again / "config.json").read_bytes()


def test_shards_are_as_large_as_allowed(quantised, tmp_path: Path) -> None:
    limit = 5_000
    path = save_it(quantised("w4a4kv4"), tmp_path / "model", max_shard_bytes=limit)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    assert not (path / "flatquant.safetensors").exists()
    weight_map = json.loads((path / "flatquant.safetensors.index.json").read_text())["weight_map"]
    for shard in shards:
        tensors = safetensors.torch.load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        assert all(weight_map[name] == shard.name for name in tensors)
    assert not any("lm_head" in name for name in weight_map)  # tied


def test_the_tokenizer_comes_along(whole: Path) -> None:
    assert AutoTokenizer.from_pretrained(whole)("abc")["input_ids"] == tiny_tokenizer()("abc")["input_ids"]


def test_plans_round_trip_and_equal_blocks_are_written_once(quantised) -> None:
    plan = quantised("w4a4kv4,mlp_mid=w8a8").plan
    data = json.loads(json.dumps(plan_to_json(plan)))
    assert plan_from_json(data) == plan
    assert len(data["kinds"]) == 1
    assert data["blocks"] == [0, 0]


# --------------------------------------------------------------------------------------------- writing


def test_output_in_the_way(quantised, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(ArtifactError, match="choose another"):
            check_output(tmp_path / name)
        with pytest.raises(ArtifactError, match="choose another"):
            save_it(quantised("w3a16"), tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"
    for name in ("empty", "new", "deep/er"):
        check_output(tmp_path / name)
        load(save_it(quantised("w3a16"), tmp_path / name))


@pytest.mark.parametrize("place", ["_write_shard", "json_bytes", "store.sync"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), safetensors.SafetensorError("I/O error: No space left")],
    ids=["os", "safetensors"],
)
def test_a_full_disk_leaves_nothing(
    quantised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(f"flatquant.runtime.artifact.write.{place}", fail)
    with pytest.raises(ArtifactError, match="No space left") as caught:
        save_it(quantised("w3a16"), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(quantised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flatquant.store.sync", fail)
    with pytest.raises(KeyboardInterrupt):
        save_it(quantised("w3a16"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_file_size_limit_of_the_system(whole: Path, tmp_path: Path) -> None:
    """The real thing: the system refuses the bytes, below any library."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from flatquant.errors import ArtifactError\n"
        "from flatquant.runtime.artifact import load, save\n"
        "from flatquant.runtime.folder import Folder\n"
        "folder = Folder.open(Path(sys.argv[1])); model = load(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, {resource.RLIM_INFINITY}))\n"
        "try: save(model, folder.plan, Path(sys.argv[2]), recipe=folder.recipe, report={})\n"
        "except ArtifactError as error: print(error); sys.exit(7)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(whole), str(tmp_path / "model")],
        env={"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 7, done.stderr
    assert "cannot write" in done.stdout
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- damage


def hashed(folder: Path) -> list[Path]:
    """Every file that serving reads."""
    return sorted(p for p in folder.iterdir() if p.name not in ("flatquant_report.json", "README.md"))


def test_any_flipped_bit_is_noticed(folder: Path) -> None:
    rng = random.Random(0)
    for file in hashed(folder):
        good = file.read_bytes()
        for _ in range(12):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            refused(folder)
        file.write_bytes(good)
    load(folder)


def test_any_truncation_is_noticed(folder: Path) -> None:
    for file in hashed(folder):
        good = file.read_bytes()
        for keep in (0, 1, 7, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:keep])
            if file.name == "config.json" and good[keep:].isspace():
                load(folder)  # the last line feed says nothing
            else:
                refused(folder)
                if file.suffix == ".safetensors":
                    refused(folder, verify=False)  # the header already tells
        file.write_bytes(good)


def test_any_missing_file_is_noticed(folder: Path) -> None:
    for file in hashed(folder):
        good = file.read_bytes()
        file.unlink()
        refused(folder, file.name)
        file.write_bytes(good)
    (folder / "flatquant_report.json").unlink()
    load(folder)  # serving does not read the report
    (folder / "flatquant_report.json").write_text('{"verdict": ')
    load(folder)


def test_not_a_folder_of_ours(tmp_path: Path, quantised) -> None:
    refused(tmp_path / "nothing", "not a folder")
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("[1, 2]")
    refused(tmp_path, "not quantised")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, "not quantised")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    refused(tmp_path, "quantised by gptq")
    (tmp_path / "config.json").write_text("[" * 200_000)
    refused(tmp_path, "not JSON")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "not JSON")


@pytest.mark.parametrize("version", [2, 0, "1", None, True, 1.0])
def test_another_format_version(folder: Path, version: object) -> None:
    forge(folder, lambda c: c["quantization_config"].update(format_version=version))
    refused(folder, "this library reads 1")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "..", "", ".", "a//b", "a/", "..\\x", "C:\\x", "x\n", ".hidden"]
)
def test_names_stay_in_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="not a file of the folder"):
        check_name(name)
    forge(folder, lambda c: c["quantization_config"]["files"].update({name: "0" * 64}))
    refused(folder, "not a file of the folder")


def test_index_that_points_elsewhere(folder: Path) -> None:
    file = folder / "flatquant.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(iter(index["weight_map"]))
    shutil.copy(folder / index["weight_map"][name], folder.parent / "x")
    index["weight_map"][name] = "../x"
    file.write_text(json.dumps(index))
    refused(folder, "sha256")
    forge(folder, lambda c: None)
    refused(folder, "does not match the shards")


def change_shard(folder: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a shard, index and hashes, consistently."""
    file = sorted(folder.glob("flatquant-*.safetensors"))[1]  # the first holds nothing but the embedding
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    index = json.loads((folder / "flatquant.safetensors.index.json").read_text())
    kept = {k: v for k, v in index["weight_map"].items() if v != file.name}
    index["weight_map"] = {**kept, **dict.fromkeys(tensors, file.name)}
    (folder / "flatquant.safetensors.index.json").write_text(json.dumps(index))
    forge(folder, lambda c: None)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update(extra=torch.zeros(2)), "surplus tensor extra"),
        (lambda t: t.pop(sorted(t)[0]), "lacks tensor"),
        (lambda t: t.update({sorted(t)[0]: torch.zeros(1)}), "the plan says"),
        (lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]].to(torch.uint8)}), "the plan says"),
        (lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]].to(torch.int64)}), "is torch.int64, the plan says"),
        (lambda t: t.update({k: v.half() for k, v in t.items() if v.dtype == torch.float32}), "the plan says"),
    ],
    ids=["extra", "missing", "shape", "integers", "wide integers", "half-precision scales"],
)
def test_tensors_that_the_plan_does_not_know(folder: Path, change, match: str) -> None:
    change_shard(folder, change)
    refused(folder, match)


def kind(config: dict) -> dict:
    return config["quantization_config"]["plan"]["kinds"][0]


HUGE = 10**15


@pytest.mark.parametrize(
    "change",
    [
        lambda c: kind(c)["sites"]["attn_in"].update(shape=[HUGE, HUGE]),
        lambda c: kind(c)["sites"]["attn_in"].update(shape=[-6, -6]),
        lambda c: kind(c)["sites"]["attn_in"].update(shape=[1, 36]),
        lambda c: kind(c)["sites"]["attn_in"].update(readers=[""]),
        lambda c: kind(c)["sites"]["attn_in"].update(readers=["self_attn.q_proj"] * 2),
        lambda c: kind(c)["sites"]["attn_in"]["weights"].update(bits=10**30),
        lambda c: kind(c)["sites"]["attn_in"]["weights"].update(bits=3),
        lambda c: kind(c)["sites"]["attn_in"]["weights"].update(group_size=HUGE),
        lambda c: kind(c)["sites"]["attn_in"]["weights"].update(group_size=5),
        lambda c: kind(c)["sites"].update({"a.b": kind(c)["sites"]["attn_in"]}),
        lambda c: kind(c)["sites"].update(surprise={}),
        lambda c: kind(c).update(head_dim=HUGE),
        lambda c: kind(c).update(head_dim=-1),
        lambda c: kind(c).update(head_dim=0),
        lambda c: kind(c).update(qk=False),
        lambda c: c["quantization_config"]["plan"].update(blocks=[0] * 100_000),
        lambda c: c["quantization_config"]["plan"].update(blocks=[0, 7]),
        lambda c: c["quantization_config"]["plan"].update(blocks=[0, True]),
        lambda c: c["quantization_config"]["plan"].update(blocks_path="model"),
        lambda c: c["quantization_config"]["plan"].update(blocks_path="os.system"),
        lambda c: c["quantization_config"]["plan"].update(attention="mlp"),
        lambda c: c["quantization_config"].update(plan=None),
        lambda c: c["quantization_config"].update(files={}),
        lambda c: c["quantization_config"].update(files=[]),
        lambda c: c["quantization_config"].update(scheme=4),
        lambda c: c.update(model_type="no-such-model"),
        lambda c: c.update(model_type=["llama"]),
        lambda c: c.update(num_hidden_layers=10**9),
        lambda c: c.update(hidden_size=HUGE),
        lambda c: c.update(head_dim=10**12),
        lambda c: c.update(num_attention_heads=0),
        lambda c: c.update(vocab_size=10**12),
        lambda c: c.update(intermediate_size="many"),
        lambda c: c.update(rope_parameters={"rope_type": "surprise"}),
    ],
)
def test_absurd_numbers_cost_nothing(folder: Path, change) -> None:
    forge(folder, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_no_remote_code(folder: Path) -> None:
    forge(
        folder,
        lambda c: c.update(
            auto_map={"AutoModelForCausalLM": "evil/repo--modeling.Evil"}, _attn_implementation="evil/kernel"
        ),
    )
    assert type(load(folder)).__module__.startswith("transformers.models.llama")


# --------------------------------------------------------------------------------------------- inspect


def test_inspection_counts(quantised, whole: Path) -> None:
    q = quantised("w4a4kv4")
    found = inspect(whole)
    state = q.model.state_dict()
    values = {k: v for k, v in state.items() if k.endswith("_proj.values")}
    dense = {k: v for k, v in state.items() if k.endswith(("embed_tokens.weight", "norm.weight"))}
    weights = sum(v.numel() for v in values.values())
    assert found.quantised_parameters == weights
    assert found.parameters == weights + sum(v.numel() for v in dense.values())
    assert found.bytes_by_kind["packed"] == weights // 2
    assert found.bytes_by_kind["grids"] == sum(4 * v.shape[0] for v in values.values())
    assert found.bytes_by_kind["dense"] == sum(v.nbytes for v in dense.values())
    assert sum(found.bytes_by_kind.values()) <= sum(v for k, v in found.files.items() if k.endswith(".safetensors"))
    assert found.bits_per_quantised_weight is not None
    assert 4 < found.bits_per_quantised_weight < 16
    assert found.compression == pytest.approx(16 / found.bits_per_parameter)
    cache = QuantizedCache(q.model)
    q.model(q.tokens, **{CACHE: cache})
    assert found.kv_bytes_per_token * q.tokens.numel() == cache.nbytes()
    assert found.kv_bytes_per_token_16bit == 2 * 2 * 2 * 10 * 2
    assert found.scheme == "w4a4kv4"
    assert found.recipe == "flatquant"
    assert found.architecture == "LlamaForCausalLM"
    assert found.damaged == ()
    assert found.report == {"seconds": {"fit": 1.5}, "blocks": 2}
    json.dumps(spec.to_dict(found))


def test_inspection_of_an_unquantised_scheme(quantised, tmp_path: Path) -> None:
    found = inspect(save_it(quantised("k4v4"), tmp_path / "model"))
    assert found.quantised_parameters == 0
    assert found.bits_per_quantised_weight is None


def test_inspection_names_damaged_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    shard = sorted(folder.glob("flatquant-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert inspect(folder).damaged == (shard.name, "tokenizer.json")
    assert inspect(folder, verify=False).damaged == ("tokenizer.json",)
    for damage in (lambda: shard.write_bytes(b""), shard.unlink):
        damage()
        assert inspect(folder).damaged == (shard.name, "tokenizer.json")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    found = inspect(folder)
    assert set(found.damaged) == {name for name in Folder.open(folder).files if not (folder / name).exists()}
    assert (found.blocks, sum(found.bytes_by_kind.values())) == (2, 0)


# --------------------------------------------------------------------------------------------- evaluations


SCORED = {"perplexity": {"wikitext2": {"value": 5.0, "windows": 3}}}


def kept(folder: Path) -> dict:
    return json.loads((folder / "flatquant_evaluation.json").read_text())


@pytest.mark.slow
def test_evaluations_of_many_processes_are_all_kept(folder: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from flatquant.runtime.artifact import keep_evaluation\n"
        "for i in range(8):\n"
        " found = {'perplexity': {f'{sys.argv[2]}-{i}': {'value': i, 'windows': 1}}}\n"
        " assert keep_evaluation(Path(sys.argv[1]), found)\n"
    )
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), name],
            env={"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        for name in "ab"
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    names = {f"{name}-{i}" for name in "ab" for i in range(8)}
    assert set(kept(folder)["perplexity"]) == names
    assert all(f"| perplexity, {name} |" in (folder / "README.md").read_text() for name in names)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_kill_while_saving_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    keep_evaluation(folder, SCORED)
    card = (folder / "README.md").read_bytes()
    for function in ("sync", "write"):  # before the rename; before anything
        with monkeypatch.context() as patch:
            patch.setattr(f"flatquant.store.{function}", kill)
            with pytest.raises(Killed):
                keep_evaluation(folder, {"divergence": {"kl": 1.0, "top1": 0.5}})
        assert kept(folder) == SCORED
        assert (folder / "README.md").read_bytes() == card
    load(folder)


def test_a_damaged_evaluation_is_not_overwritten(folder: Path) -> None:
    for text in ("{", "[1]"):
        (folder / "flatquant_evaluation.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"flatquant_evaluation\.json is damaged"):
            keep_evaluation(folder, SCORED)
        assert (folder / "flatquant_evaluation.json").read_text() == text


def test_results_against_another_original_are_kept_apart(folder: Path) -> None:
    def against(name: str, value: float) -> dict:
        tasks = {"tasks": {"piqa": {"value": value}}}
        return {"divergence": {"kl": value, "top1": value}, "original": {"sha256": name, **tasks}}

    keep_evaluation(folder, {**SCORED, "divergence": {"kl": 9.0, "top1": 0.9}})  # written before originals had names
    keep_evaluation(folder, against("a", 1.0))
    keep_evaluation(folder, against("b", 2.0))
    assert kept(folder) == {
        **SCORED,
        **against("b", 2.0),
        "others": {"a": against("a", 1.0), "unknown": {"divergence": {"kl": 9.0, "top1": 0.9}}},
    }
    keep_evaluation(folder, {"original": {"sha256": "a", "tasks": {"arc": {"value": 3.0}}}})
    found = kept(folder)
    assert found["divergence"]["kl"] == 1.0
    assert set(found["original"]["tasks"]) == {"piqa", "arc"}
    assert found["others"]["b"] == against("b", 2.0)
    assert facing(found, "new") == {
        **SCORED,
        "others": {**found["others"], "a": against("a", 1.0) | {"original": found["original"]}},
    }
    assert facing(found, None) == found


# --------------------------------------------------------------------------------------------- the card


def test_the_card_s_owner_keeps_what_they_wrote(folder: Path, tmp_path: Path) -> None:
    file = folder / "README.md"
    ours = file.read_bytes().decode()
    file.write_bytes(
        ("Before.\r\n" + ours.replace("tags:", "license: mit\ntags:") + "After. \\1\r\n").encode() + b"\xff"
    )
    for value in (5.0, 6.0):
        assert keep_evaluation(folder, {"perplexity": {"wikitext2": {"value": value, "windows": 3}}})
    card = file.read_bytes()
    assert card.startswith(b"Before.\r\n---\n")
    assert card.endswith(b"After. \\1\r\n\xff")
    assert b"license: mit" in card
    assert card.count(b"| perplexity, wikitext2 | 6.000 (3 windows) |") == card.count(b"## Quality") == 1
    load(folder).save_pretrained(tmp_path / "copy", max_shard_size=15_000)
    assert (tmp_path / "copy" / "README.md").read_bytes() == card


def test_a_card_without_our_marks_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("Mine.")
    assert not keep_evaluation(folder, SCORED)
    assert kept(folder) == SCORED
    model = load(folder)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "README.md").write_text("Theirs.")
    for target, text in (("new", "Mine."), ("there", "Theirs.")):
        model.save_pretrained(tmp_path / target)
        assert (tmp_path / target / "README.md").read_text() == text
    (folder / "README.md").unlink()
    assert keep_evaluation(folder, {})
    assert "| perplexity, wikitext2 |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inspect_counts_the_angles_of_keys_with_an_offset(quantised, tmp_path: Path, dtype: torch.dtype) -> None:
    q = quantised("kv4", bias=True, dtype=dtype)
    save(q.model, q.plan, tmp_path / "model", recipe=spec.to_dict(q.recipe), report={})
    cache = QuantizedCache(q.model)
    q.model(q.tokens, **{CACHE: cache})
    assert inspect(tmp_path / "model").kv_bytes_per_token * q.tokens.numel() == cache.nbytes()
    assert cache.nbytes() == q.tokens.numel() * (2 * 2 * 2 * (5 + 4 + 1) + 10 * dtype.itemsize)
