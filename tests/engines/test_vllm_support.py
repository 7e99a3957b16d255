"""What is refused before vLLM starts, and how `flatquant serve` starts it. None of this needs vLLM."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flatquant import cli, recipes
from flatquant.api import quantize
from flatquant.engines.vllm import support
from flatquant.errors import ArtifactError, ModelError
from flatquant.runtime.folder import Folder, content_hash, json_bytes
from tests.tiny_models import tiny_family

TOKENS = torch.randint(0, 120, (4, 16), generator=torch.Generator().manual_seed(0))


def quantised(output: Path, family: str = "llama", recipe=None, **sizes) -> Path:
    quantize(tiny_family(family, **sizes), recipe or recipes.rtn("w4a4kv4"), TOKENS, output=output, verdict=False)
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised(tmp_path_factory.mktemp("vllm") / "out")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(folder: Path, change) -> None:
    """Change config.json, hash and all."""
    config = json.loads((folder / "config.json").read_bytes())
    change(config)
    config["quantization_config"]["content_hash"] = content_hash(config)
    (folder / "config.json").write_bytes(json_bytes(config))


# --------------------------------------------------------------------------------------------- folders


def test_a_whole_folder_is_opened(folder: Path) -> None:
    assert support.open_folder(folder).plan == Folder.open(folder).plan


def test_a_name_on_a_hub_is_refused() -> None:
    with pytest.raises(ModelError, match="someone/model is no local folder; download it first: hf download"):
        support.open_folder("someone/model")


def test_a_damaged_file_is_refused(folder: Path) -> None:
    tensors = folder / "flatquant.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"flatquant.safetensors is damaged: its sha256"):
        support.open_folder(folder)


def test_another_format_version_is_refused(folder: Path) -> None:
    edit(folder, lambda config: config["quantization_config"].update(format_version=2))
    with pytest.raises(ArtifactError, match="has format version 2, this library reads 1"):
        support.open_folder(folder)


def test_an_unquantised_folder_is_refused(tmp_path: Path) -> None:
    tiny_family("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ArtifactError, match="is not quantised"):
        support.open_folder(tmp_path / "plain")


def test_a_plan_that_does_not_fit_is_refused(folder: Path) -> None:
    edit(folder, lambda config: config.update(intermediate_size=44))
    with pytest.raises(ArtifactError, match="the plan does not fit the model"):
        support.open_folder(folder)


def test_another_family_is_refused(tmp_path: Path) -> None:
    path = quantised(tmp_path / "out", "olmo2")
    with pytest.raises(ModelError, match="is a olmo2, which is not served by vLLM; served are llama, mistral"):
        support.open_folder(path)


def test_a_family_that_vllm_computes_otherwise_is_refused(tmp_path: Path) -> None:
    path = quantised(tmp_path / "out", "stablelm parallel")
    with pytest.raises(ModelError, match="with use_parallel_residual=True, which vLLM does not compute"):
        support.open_folder(path)


# --------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize("version", ["0.22.1", "0.24.0", "0.31.2", "0.33.0", "1.0", "0.3.2"])
def test_another_release_is_refused(version: str) -> None:
    with pytest.raises(ModelError, match=rf"vLLM {version} is installed, 0.23 and 0.32 were tested: pip install"):
        support.check_version(version)


@pytest.mark.parametrize("version", ["0.23.0", "0.32.0", "0.32.7+cpu"])
def test_a_tested_release_is_taken(version: str) -> None:
    support.check_version(version)


def test_no_vllm_is_refused() -> None:
    with pytest.raises(ModelError, match="vLLM is not installed: pip install"):
        support.check_version(None)


def test_a_list_of_plugins_without_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in ("flatquant", "other,flatquant"):
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
        support.check_plugins()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ModelError, match="VLLM_PLUGINS=other leaves our plugin out"):
        support.check_plugins()


def test_ranks(folder: Path) -> None:
    found = support.open_folder(folder)  # 4 heads of queries, 2 of keys, sizes 24 and 40
    for ranks in (1, 2, 4):
        support.check_cut(found, ranks)
    for ranks in (3, 8):
        with pytest.raises(ModelError, match=f"has 4 heads of queries and 2 of keys: not for {ranks} ranks"):
            support.check_cut(found, ranks)


def test_ranks_that_experts_do_not_divide_over(tmp_path: Path) -> None:
    path = quantised(tmp_path / "out", "mixtral")
    support.check_cut(support.open_folder(path), 1)
    with pytest.raises(ModelError, match="mlp_in cannot be cut for 2 ranks: it has a mixture of experts"):
        support.check_cut(support.open_folder(path), 2)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4kv8", "w4a4k4v2"])
def test_what_no_cache_of_4_bits_holds_is_refused(scheme: str, tmp_path: Path) -> None:
    found = support.open_folder(quantised(tmp_path / "out", recipe=recipes.rtn(scheme)))
    name = "values" if "k4" in scheme else "keys"
    with pytest.raises(ModelError, match=f"the {name} of block 0 are no 4-bit integers with a zero point"):
        support.check_packed(found)


def test_what_takes_a_newer_release_is_refused(folder: Path, tmp_path: Path) -> None:
    found, experts = (support.open_folder(path) for path in (folder, quantised(tmp_path / "out", "mixtral")))
    for version, cache in (("0.32.0", support.PACKED), ("0.23.0", "auto")):
        support.check_older(found, version, cache)
    support.check_older(experts, "0.32.0", "auto")
    with pytest.raises(ModelError, match=r"vLLM 0.23.0 has no cache of int4_per_token_head; leave out"):
        support.check_older(found, "0.23.0", support.PACKED)
    with pytest.raises(ModelError, match=r"has experts, which were not tested with vLLM 0.23.0: pip install"):
        support.check_older(experts, "0.23.0", "auto")


# --------------------------------------------------------------------------------------------- the command


class Started(Exception):
    """Stands for the server that takes the place of this process."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command line that was to be run."""
    found: list[list[str]] = []

    def execv(program: str, arguments: list[str]) -> None:
        assert program == sys.executable
        found.append(arguments)
        raise Started

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(support, "installed", lambda: "0.32.0")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return found


def serve(*arguments: object):
    return CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])


def test_serve_starts_the_server(folder: Path, started: list) -> None:
    done = serve(folder, "--port", "8123", "--max-model-len", "256", "--enforce-eager")
    assert isinstance(done.exception, Started)
    (line,) = started
    assert line[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    options = dict(zip(line[3:-3:2], line[4:-3:2], strict=True))
    assert options == {
        "--model": str(folder),
        "--served-model-name": "model",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--dtype": "auto",
        "--tensor-parallel-size": "1",
        "--kv-cache-dtype": "auto",
    }
    assert line[-3:] == ["--max-model-len", "256", "--enforce-eager"]


@pytest.mark.parametrize("given", [["--served-model-name", "mine"], ["--served-model-name=mine"]])
def test_an_option_of_vllm_wins(folder: Path, started: list, given: list[str]) -> None:
    serve(folder, *given)
    assert sum("--served-model-name" in part for part in started[0]) == 1
    assert started[0][-len(given) :] == given


def test_serve_refuses_in_one_line(folder: Path, started: list) -> None:
    done = serve(folder, "--tensor-parallel-size", "3")
    assert done.exit_code == 1
    assert "not for 3 ranks" in done.stderr
    assert done.stderr.count("\n") == 1
    assert started == []


def test_serve_refuses_a_cache_that_holds_other_numbers(folder: Path, started: list, tmp_path: Path) -> None:
    option = ("--kv-cache-dtype", support.PACKED)
    assert isinstance(serve(folder, *option).exception, Started)
    done = serve(quantised(tmp_path / "wide", recipe=recipes.rtn("w4a4")), *option)
    assert done.exit_code == 1
    assert "leave out --kv-cache-dtype" in done.stderr
    assert len(started) == 1


def test_serve_refuses_a_destroyed_model(folder: Path, started: list) -> None:
    report = json.loads((folder / "flatquant_report.json").read_bytes())
    (folder / "flatquant_report.json").write_text(json.dumps({**report, "verdict": {"word": "destroyed"}}))
    done = serve(folder)
    assert done.exit_code == 1
    assert "has the verdict destroyed" in done.stderr
    assert started == []
    assert isinstance(serve(folder, "--accept").exception, Started)


def test_serve_refuses_before_vllm_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "installed", lambda: None)
    done = serve(folder)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: vLLM is not installed: pip install")
