"""Several workers do what one does; what they publish loads everywhere."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnisift.backbone import Backbone
from omnisift.checkpoint import (
    SELECTOR_PREFIX,
    CheckpointError,
    build_selector,
    load_backbone,
    load_tokenizer,
    read_selector,
)
from omnisift.compress import drop_shares
from omnisift.mini.tiny import write_tiny_model
from omnisift.training.curves import read_curves
from omnisift.training.loop import Schedule, train_by_gradients
from omnisift.training.pruned_loss import Example, PrunedLoss
from omnisift.training.publish import publish
from omnisift.training.sharding import gather_gradients, shard
from omnisift.training.state import states
from tests.omnisift.training import gradient_worker
from tests.omnisift.training.gradient_worker import BATCH, STEPS, example

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint without a selector, with a speech half that nobody trains."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    weights = load_file(folder / "model.safetensors")
    weights["talker.model.embed.weight"] = torch.ones(3, 2, dtype=torch.bfloat16)
    names = sorted(weights)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    return folder


def _start(workers: int, folder: Path, model: Path, *more: str) -> None:
    script = ["-m", "tests.omnisift.training.gradient_worker"]
    processes = [
        subprocess.Popen(
            [sys.executable, *script, str(rank), str(workers), str(folder), str(model), *more],
            cwd=ROOT,
        )
        for rank in range(workers)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * workers
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of the same training by one and by two workers."""
    parent = tmp_path_factory.mktemp("runs")
    for workers in (1, 2):
        _start(workers, parent / f"by-{workers}", model)
    return {workers: parent / f"by-{workers}" for workers in (1, 2)}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process, which computes as the workers do: on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def test_two_workers_lose_what_one_loses(runs: dict[int, Path]) -> None:
    one, two = (read_curves(runs[workers] / "curves.jsonl") for workers in (1, 2))
    assert len(one) == len(two) == STEPS
    for name in ("loss", "accuracy", "answer_tokens", "llm_tokens", "grad_norm"):
        values = [[line[name] for line in lines] for lines in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=2e-5), name
    assert one[-1]["loss"] < one[0]["loss"]


def test_sharded_training_is_plain_training(runs: dict[int, Path], model: Path) -> None:
    """Against torch's own optimiser and clipping on unsharded float32 weights."""
    backbone = load_backbone(model)
    selector = build_selector(read_selector(model), backbone.width, seed=1)
    loss = PrunedLoss(
        backbone, selector, load_tokenizer(model), drop_shares(0.25), system_prompt="See and hear."
    )
    schedule = Schedule(steps=STEPS, learning_rate=3e-3)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        found = [example(number) for number in range(step * BATCH, (step + 1) * BATCH)]
        sums = loss([loss.lay(one) for one in found if one is not None])
        mean = sums.loss / sums.num_answer
        mean.backward()
        losses.append(float(mean.detach()))
        nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 3e-3 * schedule.share(step)
        optimizer.step()
        optimizer.zero_grad()
    curve = read_curves(runs[1] / "curves.jsonl")
    assert [line["loss"] for line in curve] == pytest.approx(losses, rel=2e-5)


@pytest.mark.usefixtures("alone")
def test_a_sharded_run_resumes_exactly(model: Path, runs: dict[int, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        gradient_worker.run(0, 1, folder, model, stop_at=3)
    assert [path.name for path in states(folder)] == ["state-2"]
    gradient_worker.run(0, 1, folder, model)
    for file in ("model-compressor.safetensors", "model-00001-of-00002.safetensors"):
        expected, got = (load_file(at / "model" / file) for at in (runs[1], folder))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.usefixtures("alone")
def test_bfloat16_computes_and_float32_learns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: updates far below a bfloat16 weight's last bit are not lost, nor is sound."""
    heard: list[torch.Tensor] = []
    encode_audio = Backbone.encode_audio

    def listen(self: Backbone, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        heard.extend(waveforms)
        return encode_audio(self, waveforms)

    monkeypatch.setattr(Backbone, "encode_audio", listen)
    backbone = load_backbone(model)
    backbone = Backbone(backbone.model.to(torch.bfloat16))
    selector = build_selector(read_selector(model), backbone.width, seed=1)
    loss = PrunedLoss(
        backbone, selector, load_tokenizer(model), drop_shares(0.25), system_prompt="See and hear."
    )
    shard(loss)
    computed: list[torch.dtype] = []
    layer = loss.language_model.layers[0]
    layer.mlp.register_forward_hook(lambda *args: computed.append(args[2].dtype))
    one = example(2)
    assert one is not None
    laid = [loss.lay(one)]
    before = {name: p.full_tensor().clone() for name, p in _sharded(loss).items()}
    train_by_gradients(
        lambda _: gather_gradients(loss, [laid]),
        loss.trained(),
        Schedule(steps=3, learning_rate=1e-7),
        folder=tmp_path / "run",
        seed=0,
        checkpoint_every=3,
    )
    assert set(computed) == {torch.bfloat16}
    assert len(heard) == 3
    assert all(torch.equal(waveform, one.clip.audio) for waveform in heard)
    assert {p.dtype for p in loss.trained().values()} == {torch.float32}
    name = "thinker.model.layers.0.mlp.up_proj.weight"
    old, new = before[name].detach(), _sharded(loss)[name].full_tensor().detach()
    assert (new != old).float().mean() > 0.9
    assert (new.bfloat16() == old.bfloat16()).float().mean() > 0.99
    [full] = read_curves(tmp_path / "run" / "curves.jsonl")
    with torch.no_grad():
        exact = _float32_loss(model, one)
    assert full["loss"] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("workers", [1, 2])
def test_two_selections_pull_the_selector_alone_and_training_goes_on(
    model: Path, runs: dict[int, Path], tmp_path: Path, workers: int
) -> None:
    """Each worker has the joint pull, and what is trained then is what is trained without it."""
    folder = tmp_path / "run"
    _start(workers, folder, model, "select")
    for name in ("before", "behind"):
        pulls = [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(workers)]
        assert all(part == "loss" or part.startswith("selector.") for part in pulls[0])
        assert any(pulls[0][part].abs().max() > 0 for part in pulls[0] if part != "loss")
        for part, value in pulls[0].items():
            assert all(torch.equal(value, other[part]) for other in pulls)
    curves = (read_curves(at / "curves.jsonl") for at in (folder, runs[workers]))
    here, plain = ([line["loss"] for line in lines] for lines in curves)
    assert here == plain
    load_backbone(folder / "model")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_loses_what_the_cpu_loses(model: Path, runs: dict[int, Path], tmp_path: Path) -> None:
    """In bfloat16 through NCCL, and it resumes."""
    meet = f"file://{tmp_path}/meet"
    dist.init_process_group("nccl", init_method=meet, rank=0, world_size=1)
    try:
        with pytest.raises(KeyboardInterrupt):
            gradient_worker.run(0, 1, tmp_path / "run", model, stop_at=3, device="cuda")
        gradient_worker.run(0, 1, tmp_path / "run", model, device="cuda")
    finally:
        dist.destroy_process_group()
    losses = [
        [line["loss"] for line in read_curves(folder / "curves.jsonl")]
        for folder in (tmp_path / "run", runs[1])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    load_backbone(tmp_path / "run" / "model")


def _sharded(loss: PrunedLoss) -> dict[str, DTensor]:
    return {name: p for name, p in loss.trained().items() if isinstance(p, DTensor)}


def _float32_loss(model: Path, one: Example) -> float:
    backbone = load_backbone(model)
    selector = build_selector(read_selector(model), backbone.width, seed=1)
    loss = PrunedLoss(
        backbone, selector, load_tokenizer(model), drop_shares(0.25), system_prompt="See and hear."
    )
    sums = loss([loss.lay(one)])
    mean: float = sums.loss.item() / sums.num_answer
    return mean


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_published_loads_here_and_in_transformers(
    runs: dict[int, Path], model: Path, workers: int
) -> None:
    published = runs[workers] / "model"
    before, after = load_backbone(model).model, load_backbone(published).model
    changed = {
        name
        for name, value in before.state_dict().items()
        if not torch.equal(value, after.state_dict()[name])
    }
    towers = ("visual.", "audio_tower.")
    assert changed
    assert not any(part in name for name in changed for part in towers)
    assert any("layers.0.self_attn.q_proj" in name for name in changed)
    stock = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        published, dtype=torch.float32
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, after(ids).logits)
    weights = read_selector(published)
    assert weights.trained
    build_selector(weights, after.config.text_config.hidden_size)
    load_tokenizer(published)
    index = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
    assert sum(name.startswith(SELECTOR_PREFIX) for name in index) == 18
    for name, file in index.items():
        assert name in load_file(published / file), name
    speech = index["talker.model.embed.weight"]
    assert torch.equal(
        load_file(published / speech)["talker.model.embed.weight"],
        torch.ones(3, 2, dtype=torch.bfloat16),
    )


def test_a_checkpoint_in_one_file_stays_in_one(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", selector=True)
    name = "thinker.compressor.v_proj.bias"
    old = load_file(source / "model.safetensors")
    publish(source, tmp_path / "target", {name: torch.full_like(old[name], 2, dtype=torch.float32)})
    new = load_file(tmp_path / "target" / "model.safetensors")
    assert new.keys() == old.keys()
    assert torch.equal(new[name], torch.full_like(old[name], 2))
    assert all(torch.equal(new[key], old[key]) for key in old if key != name)
    assert len(list((tmp_path / "target").glob("*.safetensors"))) == 1


def test_a_tensor_without_a_place_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    target = tmp_path / "target"
    with pytest.raises(
        CheckpointError, match=r"no tensor thinker\.model\.layers\.9\.x to exchange"
    ):
        publish(source, target, {"thinker.model.layers.9.x": torch.ones(1)})
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: tensor thinker.lm_head.weight: trained as \[2\]"
    ):
        publish(source, target, {"thinker.lm_head.weight": torch.ones(2)})
    assert not target.exists()
