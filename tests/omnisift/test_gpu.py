"""What only a GPU can show: the fast paths there against the slow ones, in bfloat16."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omnisift.audio_selection import AudioSelector
from omnisift.backbone import Backbone
from omnisift.compress import compress_batch, drop_shares
from omnisift.compression_plan import DropShares
from omnisift.compressor import Clip, VideoCompressor
from omnisift.float32_product import linear_float32
from omnisift.layout import ModelLayout, place_block
from omnisift.media import FACTOR, SAMPLE_RATE
from omnisift.mini.tiny import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())


def _model(dtype: torch.dtype) -> Any:
    """Return a small model with the published head sizes (80 and 64) and an unaligned MLP."""
    config: Any = tiny_config()
    config.vision_config.depth = 4
    config.vision_config.fullatt_block_indexes = [1, 3]
    config.vision_config.hidden_size = 320
    config.vision_config.intermediate_size = 500
    config.audio_config.d_model = 256
    torch.manual_seed(0)
    model: Any = Qwen2_5OmniThinkerForConditionalGeneration(config)
    model.eval()
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.05)
    # The same weights in every type: those that bfloat16 holds.
    return model.to(torch.bfloat16).to(dtype).cuda()


def _frames(num_frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames + height * width)
    size = (num_frames, height * FACTOR, width * FACTOR, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the relative error over all tokens."""
    wanted = torch.cat(expected).double()
    return float((torch.cat(actual).double() - wanted).norm() / wanted.norm())


CLIPS = [(8, 16, 16), (6, 5, 9), (2, 1, 1), (12, 8, 3)]
SAMPLES = [SAMPLE_RATE * 9, 70_001, 9_000, 100]


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_packed_towers_are_as_near_to_float32_as_the_stock_ones(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By default cuDNN rounds float32 convolutions, and the stock patch embedding is one.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if kind == "video":
        media = [_frames(*shape) for shape in CLIPS]
    else:
        generator = torch.Generator().manual_seed(0)
        media = [torch.randn(num, generator=generator) * 0.1 for num in SAMPLES]
    outputs = {}
    for name, dtype, towers in (
        ("exact", torch.float32, "stock"),
        ("stock", torch.bfloat16, "stock"),
        ("packed", torch.bfloat16, "packed"),
        ("float32", torch.float32, "packed"),
    ):
        backbone = Backbone(_model(dtype), towers=towers)  # type: ignore[arg-type]
        outputs[name] = getattr(backbone, f"encode_{kind}")(media)
    rounding = _error(outputs["stock"], outputs["exact"])
    packed = _error(outputs["packed"], outputs["exact"])
    assert packed < 1.1 * rounding < 0.05
    assert _error(outputs["float32"], outputs["exact"]) < 1e-4


def test_videos_of_any_size_share_one_compiled_graph() -> None:
    backbone = Backbone(_model(torch.bfloat16))
    backbone.encode_video([_frames(8, 16, 16)])
    backbone.encode_audio([torch.randn(SAMPLE_RATE * 5)])
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in [(2, 7, 5), (40, 3, 9), (6, 16, 16), (4, 20, 12)]:
            backbone.encode_video([_frames(*shape)])
        for seconds in (3, 17, 60):
            backbone.encode_audio([torch.randn(SAMPLE_RATE * seconds)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_compression_equals_the_reference(case: dict[str, Any]) -> None:
    vectors = load_file(GOLDEN / f"{case['name']}.safetensors")
    selector = AudioSelector(case["d_model"], case["hidden_dim"], case["num_heads"])
    selector.load_state_dict(
        {k.removeprefix("selector."): v for k, v in vectors.items() if k.startswith("selector.")}
    )
    with torch.inference_mode():
        [result] = compress_batch(
            [
                (
                    vectors["inputs_embeds"][0].cuda(),
                    vectors["input_ids"][0],
                    vectors["position_ids"][:, 0],
                )
            ],
            DropShares(case["drop_share_video"], case["drop_share_audio"]),
            ModelLayout(
                video_token_id=case["video_token_id"], audio_token_id=case["audio_token_id"]
            ),
            selector=selector.cuda(),
        )
    assert torch.equal(result.keep_mask.cpu(), vectors["keep_mask"].bool().flatten())


@pytest.mark.parametrize("published", [True, False])
def test_a_gpu_keeps_what_a_cpu_keeps(published: bool) -> None:
    layout = ModelLayout()
    block = place_block(
        layout, grids=31, height=9, width=16, seconds_per_grid=1.0, audio_tokens=790
    )
    torch.manual_seed(0)
    embeds = torch.randn(len(block.ids), 3584).bfloat16()
    selector = AudioSelector(3584).requires_grad_(False)
    if published:  # in the checkpoint the selector is bfloat16
        selector = selector.bfloat16().float()
    masks = []
    for device in ("cpu", "cuda"):
        with torch.inference_mode():
            [result] = compress_batch(
                [
                    (
                        embeds.to(device),
                        torch.from_numpy(block.ids),
                        torch.from_numpy(block.positions),
                    )
                ],
                DropShares(0.77, 0.5),
                layout,
                selector=selector.to(device),
            )
        masks.append(result.keep_mask.cpu())
    different = int((masks[0] != masks[1]).sum())
    # A near tie of other weights, split within 2^-17, may fall the other way.
    assert different <= (0 if published else len(block.ids) // 1000)


def test_compression_never_waits_for_the_gpu() -> None:
    layout = ModelLayout()
    block = place_block(layout, grids=9, height=4, width=5, seconds_per_grid=1.0, audio_tokens=225)
    embeds = torch.randn(len(block.ids), 64, device="cuda", dtype=torch.bfloat16)
    selector = AudioSelector(64, 32).cuda().requires_grad_(False)

    def run() -> None:
        compress_batch(
            [(embeds, torch.from_numpy(block.ids), torch.from_numpy(block.positions))],
            DropShares(0.77, 0.5),
            layout,
            selector=selector,
        )

    with torch.inference_mode():
        run()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_batch_is_queued_without_waiting_for_the_gpu() -> None:
    backbone = Backbone(_model(torch.bfloat16))
    selector = AudioSelector(backbone.width, 32).requires_grad_(False)
    compressor = VideoCompressor(backbone, selector, drop_shares(0.25))
    clips = [
        Clip(_frames(*shape), torch.randn(num), 2.0)
        for shape, num in zip(CLIPS, SAMPLES, strict=True)
    ]
    alone = [compressor([clip])[0] for clip in clips]
    compressor(clips)
    torch.cuda.set_sync_debug_mode("error")
    try:
        # While the last is copied back, the next one's frames are on their way.
        pending = [compressor.start(clips) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch in pending:
        for kept, expected in zip(batch.result(), alone, strict=True):
            # Other batches round otherwise: a near tie may fall the other way.
            common, here, there = np.intersect1d(
                kept.kept_index, expected.kept_index, return_indices=True
            )
            assert len(common) >= 0.99 * len(expected.kept_index)
            assert _error([kept.embeds[here]], [expected.embeds[there]]) < 0.02
        assert batch.busy_s() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_products_of_terms_are_float32_products(dtype: torch.dtype, compiled: bool) -> None:
    x = torch.randn(300, 512, device="cuda").to(dtype)
    weight, bias = torch.randn(256, 512, device="cuda"), torch.randn(256, device="cuda")
    product = torch.compile(linear_float32) if compiled else linear_float32
    with torch.inference_mode():
        actual = product(x, weight, bias).double()
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    error = float((actual - expected).norm() / expected.norm())
    assert error < (2**-17 if dtype == torch.bfloat16 else 1e-6)
