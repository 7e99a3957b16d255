"""Quantised folders in transformers' own hands: from_pretrained, save_pretrained, pipelines, and life without us."""

import copy
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import flatquant
from flatquant import spec
from flatquant.errors import ArtifactError, FlatQuantError, ModelError
from flatquant.runtime.artifact import load, save
from flatquant.runtime.folder import content_hash
from flatquant.runtime.linear import PackedLinear
from tests.tiny_models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
SCHEMES = ["w4a4kv4", "w4g2a8", "k4v4", "w4a4kv4,mlp_mid=w8a8,1.attn_in=w16a16"]


def saved(q, output: Path, **kwargs) -> Path:
    report = {"model": {"name": "someone/tiny"}, "data": {"source": "tokens", "samples": 4, "seqlen": 16}}
    save(q.model, q.plan, output, recipe=spec.to_dict(q.recipe), report=report, tokenizer=tiny_tokenizer(), **kwargs)
    return output


@pytest.fixture(scope="module")
def whole(quantised, tmp_path_factory) -> Path:
    return saved(quantised("w4a4kv4"), tmp_path_factory.mktemp("hf") / "model", max_shard_bytes=15_000)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("scheme, dtype", [*((s, torch.float32) for s in SCHEMES), ("w4a4kv4", torch.bfloat16)])
def test_from_pretrained_is_load(quantised, tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    q = quantised(scheme, dtype=dtype, tied=dtype == torch.float32, bias=dtype == torch.bfloat16)
    path = saved(q, tmp_path / "model")
    ours, theirs = load(path), AutoModelForCausalLM.from_pretrained(path)
    assert theirs.dtype == dtype
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert theirs.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(theirs.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(theirs(q.tokens).logits, ours(q.tokens).logits)
    assert not any(p.requires_grad for p in theirs.parameters())
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == (dtype == torch.float32)


def test_shards_device_maps_and_dtypes(whole: Path, quantised) -> None:
    tokens = quantised("w4a4kv4").tokens
    with torch.no_grad():
        want = load(whole)(tokens).logits
        for device_map in ("auto", {"": "cpu"}):
            pytest.importorskip("accelerate")
            model = AutoModelForCausalLM.from_pretrained(whole, device_map=device_map)
            assert torch.equal(model(tokens).logits, want)
        half = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
        assert torch.equal(half(tokens).logits, load(whole, dtype=torch.bfloat16)(tokens).logits)
    block = half.model.layers[0]
    assert half.dtype == torch.bfloat16
    assert isinstance(block.mlp.up_proj, PackedLinear)
    assert block.mlp.up_proj.scale.dtype == block.flatquant["mlp_in"].left.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("loader", [load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
@pytest.mark.parametrize(
    ("cast", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)]
)
def test_casts_are_loading_in_that_dtype(whole: Path, quantised, loader, cast: str, dtype: torch.dtype) -> None:
    """`.half()` as `.to(float16)` as `load(dtype=float16)`: the same tensors, and RoPE's frequencies as they are."""
    tokens = quantised("w4a4kv4").tokens
    want = load(whole, dtype=dtype)
    for model in (
        getattr(loader(whole), cast)(),
        loader(whole).to(dtype),
        getattr(copy.deepcopy(loader(whole)), cast)(),
    ):
        assert model.dtype == dtype
        for (name, tensor), expected in zip(model.named_buffers(), want.buffers(), strict=True):
            assert tensor.dtype == expected.dtype, name
            assert torch.equal(tensor, expected), name
        assert torch.equal(model(tokens).logits, want(tokens).logits)


def test_a_cast_copy_leaves_the_model_alone(whole: Path) -> None:
    model = load(whole)
    assert copy.deepcopy(model).half().dtype == torch.float16
    assert model.dtype == torch.float32


def test_pipeline_and_generate(whole: Path) -> None:
    written = pipeline("text-generation", model=str(whole))("abc", max_new_tokens=5, do_sample=False)
    model, tokenizer = load(whole), AutoTokenizer.from_pretrained(whole)
    ids = model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert written[0]["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_offloading_is_refused(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    with pytest.raises(ModelError, match="cannot be offloaded"):
        AutoModelForCausalLM.from_pretrained(
            whole, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path
        )


def test_the_class_itself_loads_too(whole: Path) -> None:
    assert isinstance(LlamaForCausalLM.from_pretrained(whole).model.layers[1].mlp.down_proj, PackedLinear)


# --------------------------------------------------------------------------------------------- refusing


def test_without_the_import_nothing_is_loaded(whole: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "for kind in (AutoModelForCausalLM, LlamaForCausalLM):\n"
        "    try: kind.from_pretrained(sys.argv[1])\n"
        "    except OSError as error: assert 'model.safetensors' in str(error), error\n"
        "    else: raise SystemExit('loaded')\n"
        "assert 'flatquant' not in sys.modules\n"
        "import flatquant  # late is early enough\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]); print('fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(whole)],
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("fine\n"), done.stderr
    assert "Unknown quantization type, got flatquant" in done.stderr


def test_quantising_on_the_way_is_explained(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"needs calibration text.*flatquant\.quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=flatquant.FlatQuantConfig("w4a16"))


@pytest.mark.parametrize("name", ["flash_attention_2", "eager", "flex_attention"])
def test_other_attention_is_refused(whole: Path, name: str) -> None:
    with pytest.raises(FlatQuantError, match="attention"):
        AutoModelForCausalLM.from_pretrained(whole, attn_implementation=name)


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    config["quantization_config"]["content_hash"] = content_hash(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(num_hidden_layers=3),
        lambda c: c.update(num_hidden_layers=10**9),
        lambda c: c["quantization_config"].update(surprise=1),
        lambda c: c["quantization_config"].update(plan=None),
        lambda c: c["quantization_config"].update(format_version=7),
        lambda c: c["quantization_config"]["files"].update({"../x": "0" * 64}),
        lambda c: c.update(intermediate_size=c["intermediate_size"] + 6),
        lambda c: c["quantization_config"]["plan"].update(blocks_path="model"),
    ],
)
def test_damaged_configs_are_refused(folder: Path, change) -> None:
    edit(folder, change)
    with pytest.raises(ArtifactError):
        AutoModelForCausalLM.from_pretrained(folder)


def test_damaged_tensors_are_refused_and_a_replaced_tokenizer_is_not(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ArtifactError, match="verify=False"):
        load(folder)
    load(folder, verify=False)
    shard = sorted(folder.glob("flatquant-*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match="sha256"):
        AutoModelForCausalLM.from_pretrained(folder)


# --------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("how", [load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
def test_save_pretrained_writes_the_same_bytes(whole: Path, tmp_path: Path, how) -> None:
    how(whole).save_pretrained(tmp_path / "again", max_shard_size=15_000)
    assert contents(tmp_path / "again") == contents(whole)
    how(tmp_path / "again").save_pretrained(tmp_path / "third")  # in one file
    assert torch.equal(load(tmp_path / "third").model.norm.weight, load(whole).model.norm.weight)
    assert (tmp_path / "third" / "flatquant.safetensors").is_file()


def test_a_deleted_shard_is_noticed(whole: Path, tmp_path: Path) -> None:
    shards = sorted(path.name for path in whole.glob("flatquant-*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        shutil.copytree(whole, tmp_path / shard)
        (tmp_path / shard / shard).unlink()
        for verify in (True, False):
            with pytest.raises(ArtifactError, match=f"{shard} is missing"):
                load(tmp_path / shard, verify=verify)
        with pytest.raises((ArtifactError, OSError), match=shard):
            AutoModelForCausalLM.from_pretrained(tmp_path / shard)


def test_save_pretrained_into_a_folder_in_use(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    tiny_tokenizer().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(whole)
    for size in ("15KB", "1GB", "15KB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        load(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "flatquant.safetensors").exists()
    with pytest.raises(ModelError, match="max_shard_size"):
        model.save_pretrained(tmp_path, max_shard_size="much")


def test_a_model_in_memory_saves_itself(tmp_path: Path) -> None:
    tokens = torch.randint(0, 120, (2, 8), generator=torch.Generator().manual_seed(0))
    result = flatquant.quantize(tiny_llama(), flatquant.recipes.rtn("w4a4"), device="cpu")
    result.model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, result.model(tokens).logits)


def test_push_to_hub_uploads_what_save_pretrained_writes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def __init__(self, **_: object) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: object) -> str:
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return "done"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert model.push_to_hub("me/tiny", max_shard_size="15KB") == "done"
    assert contents(tmp_path / "hub/me/tiny") == contents(whole)


def test_the_card_says_how_to_load(whole: Path) -> None:
    card = (whole / "README.md").read_text()
    for text in ("import flatquant", "w4a4kv4", "base_model: someone/tiny", "4 windows of 16 tokens", "library_name"):
        assert text in card


# --------------------------------------------------------------------------------------------- configs


def test_config_round_trip(whole: Path) -> None:
    config = AutoConfig.from_pretrained(whole)
    again = flatquant.FlatQuantConfig.from_dict(config.quantization_config)
    assert again.to_dict() == config.quantization_config
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoModelForCausalLM.from_pretrained(whole, quantization_config=flatquant.FlatQuantConfig())
    assert "from the model will be used" in str(caught[0].message)
