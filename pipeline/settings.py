"""What each stage of a run is made with, derived once from the configuration."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import transformers

from omnisift.checkpoint import SelectorWeights, commit_of, identity
from omnisift.codec import CODECS, Codec
from omnisift.engines.vllm_engine import VllmOptions
from omnisift.prompts import Sampling
from pipeline import keys
from pipeline.boundary import roots_of
from pipeline.config import AnswerConfig, CaptionConfig
from pipeline.errors import StartupError
from pipeline.stages.answer import AnswerSettings
from pipeline.stages.compress import CompressSettings
from pipeline.storage import Storage, join

# Raised whenever the same video and settings give other kept tokens than before.
COMPRESSION_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """The constructor arguments of each stage, and the names a run writes under."""

    run_id: str
    storage: Storage
    output: str
    run_folder: str
    cache_folder: str
    ingredients: dict[str, keys.Ingredient]  # of the cache's fingerprint, readable
    answer_fingerprint: str
    decode: dict[str, Any]
    compress: dict[str, Any]
    write_cache: dict[str, Any]
    read_cache: dict[str, Any]
    answer: dict[str, Any]
    sink: dict[str, Any]
    videos_per_compression: int
    videos_per_cache_file: int
    videos_per_batch: int
    answer_calls: int  # of an answering actor, at a time
    videos_per_answer_file: int


def token_codec(config: CaptionConfig, *, uses_gpu: bool) -> Codec:
    """Return how tokens are kept: `auto` is the type the model computes in."""
    for codec in CODECS:
        if codec == config.cache.codec:
            return codec
    return "bfloat16" if uses_gpu else "float32"


def cache_ingredients(
    config: CaptionConfig, folder: Path, selector: SelectorWeights, *, uses_gpu: bool
) -> dict[str, keys.Ingredient]:
    """Return everything that changes kept tokens, by readable names."""
    return {
        "model": config.model,
        "checkpoint": identity(folder),
        # a download's is its commit, and that is its identity
        **({} if commit_of(folder) else {"revision": config.revision}),
        "selector": selector.sha256,
        "selector_seed": -1 if selector.trained else config.seed,
        "method": config.compression.method,
        "video_drop": config.compression.shares.video,
        "audio_drop": config.compression.shares.audio,
        "fps": config.media.fps,
        "max_frames": config.media.max_frames,
        "min_pixels": config.media.min_pixels,
        "max_pixels": config.media.max_pixels,
        "max_audio_s": config.media.max_audio_s,
        "timestamps": config.media.timestamps,
        "reader": config.media.reader,
        "compute_dtype": "bfloat16" if uses_gpu else "float32",
        "codec": token_codec(config, uses_gpu=uses_gpu),
        "transformers": transformers.__version__,
        "compression_version": COMPRESSION_VERSION,
        # where it is set, so that what was kept before it there still counts
        **({"window_s": config.media.window_s} if config.media.window_s else {}),
    }


def choose_engine(answer: AnswerConfig, *, uses_gpu: bool) -> Literal["transformers", "vllm"]:
    """Return the engine that answers; `auto` is vLLM on GPUs where it is installed.

    Raises StartupError for what the engine cannot do.
    """
    installed = find_spec("vllm") is not None
    if answer.engine == "vllm" and not installed:
        raise StartupError(
            "answer.engine=vllm: vLLM is not installed here, where the driver runs; in a fresh "
            "environment pip install '.[vllm]' from the repository's root, or use "
            "answer.engine=transformers"
        )
    if answer.engine == "vllm" or (answer.engine == "auto" and uses_gpu and installed):
        return "vllm"
    default = AnswerConfig()
    for name in ("json_schema", "quantization", "kv_cache_dtype", "tensor_parallel_size"):
        value = getattr(answer, name)
        if value != getattr(default, name):
            raise StartupError(
                f"answer.{name}={value} needs answer.engine=vllm; this run answers with "
                "transformers"
            )
    return "transformers"


def _answer_settings(
    config: CaptionConfig, revision: str, *, uses_gpu: bool, answer_gpus: float
) -> AnswerSettings:
    answer = config.answer
    return AnswerSettings(
        engine=choose_engine(answer, uses_gpu=uses_gpu),
        model=config.model,
        revision=revision,
        system_prompt=answer.system_prompt,
        max_new_tokens=answer.max_new_tokens,
        sampling=Sampling(
            temperature=answer.temperature,
            top_p=answer.top_p,
            stop=tuple(answer.stop),
            json_schema=answer.json_schema,
        ),
        seed=answer.seed,
        vllm=VllmOptions(
            gpu_memory_fraction=answer.gpu_memory_fraction or 0.9 * min(answer_gpus or 1.0, 1.0),
            tensor_parallel_size=answer.tensor_parallel_size,
            context_tokens=answer.context_tokens,
            quantization=answer.quantization,
            kv_cache_dtype=answer.kv_cache_dtype,
        ),
        device="cuda" if uses_gpu else "cpu",
    )


def make_settings(
    config: CaptionConfig,
    folder: Path,
    selector: SelectorWeights,
    *,
    uses_gpu: bool,
    answer_gpus: float = 0.0,
    answers: bool = True,
) -> Settings:
    """Derive the settings of a new run; `folder` is the resolved checkpoint."""
    storage = Storage(config.storage)
    run_id = keys.new_run_id()
    output = keys.plain(config.output)
    ingredients = cache_ingredients(config, folder, selector, uses_gpu=uses_gpu)
    fingerprint = keys.fingerprint(ingredients)
    answer_fingerprint = keys.answer_fingerprint(fingerprint, config.answer)
    cache_folder = join(keys.plain(config.cache_root), fingerprint)
    run_folder = join(output, run_id)
    device = "cuda" if uses_gpu else "cpu"
    # What actors load is what the driver saw, wherever a branch has moved since.
    revision = commit_of(folder) or config.revision
    compress = CompressSettings(
        model=config.model,
        revision=revision,
        selector=config.compression.selector,
        seed=config.seed,
        method=config.compression.method,
        shares=config.compression.shares,
        nominal_timestamps=config.media.timestamps == "nominal",
        memory_limit_bytes=config.compression.memory_limit_bytes,
        codec=token_codec(config, uses_gpu=uses_gpu),
        device=device,
    )
    answer = _answer_settings(config, revision, uses_gpu=uses_gpu, answer_gpus=answer_gpus)
    return Settings(
        run_id=run_id,
        storage=storage,
        output=output,
        run_folder=run_folder,
        cache_folder=cache_folder,
        ingredients=ingredients,
        answer_fingerprint=answer_fingerprint,
        decode={
            "media": config.media,
            "decode": config.decode,
            "storage": config.storage,
            "roots": roots_of(config),
        },
        compress={"settings": compress},
        write_cache={
            "storage": storage,
            "folder": cache_folder,
            "run_id": run_id,
            "hand_on": answers,
        },
        read_cache={"storage": storage},
        answer={"settings": answer},
        sink={
            "storage": storage,
            "folder": run_folder,
            "run_id": run_id,
            "model": config.model,
            "fingerprint": answer_fingerprint,
            "answered": answers,
        },
        videos_per_compression=config.compression.batch_videos,
        videos_per_cache_file=config.cache.videos_per_file,
        videos_per_batch=config.answer.batch_videos,
        answer_calls=config.answer.calls if answer.engine == "vllm" else 1,
        videos_per_answer_file=config.answer.videos_per_file,
    )
