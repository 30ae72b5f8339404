"""Checkpoints: what loads equals what was saved, and what does not fit is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnisift.checkpoint import (
    CheckpointError,
    build_selector,
    commit_of,
    identity,
    load_backbone,
    load_tokenizer,
    published_name,
    read_selector,
    resolve,
)
from omnisift.measure.random_model import write_random_checkpoint
from omnisift.mini.tiny import tiny_config, write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny", selector=True)


def _rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, value in change.items():
        weights.pop(name, None)
        if value is not None:
            weights[name] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_tensor_arrives(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    loaded = load_backbone(folder).model.state_dict()
    assert {published_name(name) for name in loaded} == {
        name for name in saved if ".compressor." not in name
    }
    for name, value in loaded.items():
        assert torch.equal(value, saved[published_name(name)].float()), name


def test_sharded_and_whole_are_the_same(folder: Path) -> None:
    whole = load_backbone(folder).model.state_dict()
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    sharded = load_backbone(folder).model.state_dict()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert len(read_selector(folder).tensors) == 18


def test_parts_compute_what_the_whole_computes(folder: Path) -> None:
    whole = load_backbone(folder)
    towers = load_backbone(folder, part="towers")
    language = load_backbone(folder, part="language_model")
    frames = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8)
    assert torch.equal(towers.encode_video([frames])[0], whole.encode_video([frames])[0])
    audio = torch.randn(20_000) * 0.1
    assert torch.equal(towers.encode_audio([audio])[0], whole.encode_audio([audio])[0])
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(language.model(ids).logits, whole.model(ids).logits)
    sizes = [sum(p.numel() for p in part.model.parameters()) for part in (towers, language, whole)]
    assert max(sizes[:2]) < sizes[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"thinker.lm_head.weight": None},
            r"missing thinker\.lm_head\.weight \(in none of model\.safetensors\)",
        ),
        (
            {"thinker.visual.blocks.0.norm9.weight": torch.ones(4)},
            r"unexpected thinker\.visual\.blocks\.0\.norm9\.weight \(in model\.safetensors\)",
        ),
        (
            {"thinker.model.norm.weight": torch.ones(63)},
            r"thinker\.model\.norm\.weight \(in model\.safetensors\): expected \[64\], got \[63\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    folder: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    _rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_backbone(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thinker.compressor.v_norm.bias": None}, r"tiny: .*v_norm\.bias: expected .*got none"),
        (
            {"thinker.compressor.extra": torch.ones(2)},
            r"model\.safetensors: .*extra: expected none",
        ),
        (
            {"thinker.compressor.a_proj.weight": torch.ones(32, 7)},
            r"model\.safetensors: .*a_proj\.weight: .*\[32, 7\]",
        ),
    ],
)
def test_a_selector_tensor_that_does_not_fit_is_named(
    folder: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    _rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        build_selector(read_selector(folder), 64)


def test_selector_from_a_file_of_its_own(folder: Path, tmp_path: Path) -> None:
    weights = read_selector(folder)
    assert weights.trained
    alone = tmp_path / "selector.safetensors"
    save_file(weights.tensors, alone)
    again = read_selector(folder, str(alone))
    assert again.sha256 == weights.sha256
    changed = {**weights.tensors, "v_proj.bias": weights.tensors["v_proj.bias"] + 1}
    save_file(changed, alone)
    assert read_selector(folder, str(alone)).sha256 != weights.sha256


def test_without_a_selector_it_is_random_from_the_seed(tmp_path: Path) -> None:
    weights = read_selector(write_tiny_model(tmp_path / "bare"))
    assert not weights.trained
    assert weights.sha256 == "untrained"
    one, same, other = (build_selector(weights, 64, seed=seed).v_proj.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="expected model_type qwen2_5_omni, got bert"):
        load_backbone(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_sliding_window_is_refused(folder: Path) -> None:
    """Our masks know of no window: answers would be other than the model's."""
    config = json.loads((folder / "config.json").read_text())
    text = config["thinker_config"]["text_config"]
    text |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    text.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: an LLM that sees a sliding window"):
        load_backbone(folder)


def test_towers_load_where_a_benchmark_left_the_llm_out(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "towers", tiny_config())
    [tokens] = load_backbone(folder, part="towers").encode_video(
        [torch.zeros(2, 56, 56, 3, dtype=torch.uint8)]
    )
    assert tokens.isfinite().all()


def test_neither_folder_nor_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub id"):
        resolve("nowhere/nothing at all")


@pytest.mark.parametrize("shard", ["model-2.safetensors", None, "model.safetensors"])
def test_a_driver_downloads_the_selector_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str | None
) -> None:
    """Of a hub where the selector is in one shard of two, in none, or in the only file."""
    hub, here = tmp_path / "hub", tmp_path / "models--a--b" / "snapshots" / COMMIT
    write_tiny_model(hub, selector=shard is not None)
    if shard != "model.safetensors":
        weights = load_file(hub / "model.safetensors")
        names = {True: "model-2.safetensors", False: "model-1.safetensors"}
        of_shard: dict[str, dict[str, torch.Tensor]] = {file: {} for file in names.values()}
        for name, value in weights.items():
            of_shard[names[name.startswith("thinker.compressor.")]][name] = value
        for file, tensors in of_shard.items():
            save_file(tensors, hub / file, metadata={"format": "pt"})
        (hub / "model.safetensors").unlink()
        places = {name: file for file, tensors in of_shard.items() for name in tensors}
        (hub / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )

    def fetch(model: str, *, revision: str, allow_patterns: list[str]) -> str:
        assert (model, revision) in {("a/b", "main"), ("a/b", COMMIT)}
        here.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in hub.glob(pattern):
                shutil.copy(file, here)
        return str(here)

    monkeypatch.setattr("omnisift.checkpoint.snapshot_download", fetch)
    folder = resolve("a/b", weights=False)
    assert folder == here
    assert [file.name for file in here.glob("*.safetensors")] == ([shard] if shard else [])
    assert read_selector(folder).sha256 == read_selector(hub).sha256
    assert read_selector(folder).trained == (shard is not None)
    load_tokenizer(folder)
    if shard == "model-2.safetensors":  # what is there of a download that nobody can complete
        (hub / shard).rename(tmp_path / shard)
        (here / shard).unlink()
        for everything in (False, True):
            with pytest.raises(CheckpointError, match=rf"model=a/b: .* lacks {shard}"):
                resolve("a/b", weights=everything)
        (tmp_path / shard).rename(hub / shard)
    assert load_backbone(resolve("a/b")).width == load_backbone(hub).width


def test_a_download_is_known_by_its_commit(folder: Path, tmp_path: Path) -> None:
    """Two machines that downloaded the same commit at different times have the same model."""
    downloads = [
        shutil.copytree(folder, tmp_path / place / "models--a--b" / "snapshots" / COMMIT)
        for place in ("today", "tomorrow")
    ]
    for number, download in enumerate(downloads):
        for file in download.iterdir():
            os.utime(file, (1_000_000 + number, 1_000_000 + number))
    assert [identity(download) for download in downloads] == [COMMIT, COMMIT]
    assert commit_of(downloads[0]) == COMMIT
    for own in (folder, Path("runs/snapshots/latest"), Path("runs/snapshots") / COMMIT):
        assert commit_of(own) is None


def test_identity_changes_with_the_files(folder: Path) -> None:
    before = identity(folder)
    assert identity(folder) == before
    _rewrite(folder, {"thinker.model.norm.weight": torch.ones(64) * 2})
    assert identity(folder) != before
