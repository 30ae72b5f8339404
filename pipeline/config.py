"""The configuration: frozen dataclasses are the schema, and refuse nonsense when made."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from omnisift.codec import CODECS
from omnisift.compress import drop_shares
from omnisift.compression_plan import DropShares
from omnisift.methods import METHODS, TRAINED_METHODS, find_method
from pipeline.redaction import holds_secret

CHUNK_S = 2.0  # of the model's interleaving: what windows are multiples of


def _key(default: Any, text: str) -> Any:
    """Declare one key: its default and the line that `--help` and the README print."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _require_no_secret(name: str, value: str) -> None:
    if holds_secret(value):
        raise ValueError(f"{name} holds credentials; leave them to the environment")


@dataclass(frozen=True)
class ListingConfig:
    """Which objects are the corpus."""

    extensions: list[str] = _key(
        [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".wmv", ".flv"],
        "file endings taken from a prefix; a manifest names its videos itself",
    )
    hash_content: bool = _key(False, "key local files by their content instead of size and mtime")
    roots: list[str] = _key(
        [], "prefixes that videos must lie under; empty: the source's own folder, and any bucket"
    )

    def __post_init__(self) -> None:
        """Refuse a root that no place is under."""
        for root in self.roots:
            _require_no_secret("listing.roots", root)
            _require(bool(root.strip()), "listing.roots", "prefixes that are not empty", root)


@dataclass(frozen=True)
class MediaConfig:
    """What is sampled from a video."""

    fps: float = _key(2.0, "frames sampled a second")
    max_frames: int = _key(256, "frames a video at most; a longer one is sampled more sparsely")
    min_pixels: int = _key(128 * 28 * 28, "a frame is enlarged to at least this many pixels")
    max_pixels: int = _key(256 * 28 * 28, "a frame is shrunk to at most this many pixels")
    max_audio_s: float = _key(300.0, "seconds of sound used; the published processor takes 300")
    window_s: float = _key(
        0.0, "longer videos are cut into windows of so many seconds, a row each; 0: they are whole"
    )
    timestamps: str = _key(
        "seconds", "seconds: as they are; nominal: the reference's fixed 2 frames a second"
    )
    reader: str = _key(
        "pyav", "pyav, or decord: slower, and wrong pictures from MPEG-TS and sparse long files"
    )

    def __post_init__(self) -> None:
        """Refuse values no video could be sampled with."""
        _require(self.fps > 0, "media.fps", "positive", self.fps)
        _require(
            self.max_frames >= 2 and self.max_frames % 2 == 0,
            "media.max_frames",
            "an even number, at least 2",
            self.max_frames,
        )
        _require(self.min_pixels >= 28 * 28, "media.min_pixels", "at least 784", self.min_pixels)
        _require(
            self.max_pixels >= self.min_pixels,
            "media.max_pixels",
            f"at least media.min_pixels ({self.min_pixels})",
            self.max_pixels,
        )
        _require(0 < self.max_audio_s <= 300, "media.max_audio_s", "in (0, 300]", self.max_audio_s)
        _require(
            self.window_s == 0
            or (
                self.window_s % CHUNK_S == 0
                and (self.window_s * self.fps) % 2 == 0
                and CHUNK_S <= self.window_s <= self.max_audio_s - CHUNK_S
            ),
            "media.window_s",
            f"0, or a multiple of {CHUNK_S:g} s (a chunk) with an even number of frames at "
            f"media.fps, at most {CHUNK_S:g} s below media.max_audio_s",
            self.window_s,
        )
        _require(
            self.timestamps in ("seconds", "nominal"),
            "media.timestamps",
            "'seconds' or 'nominal'",
            self.timestamps,
        )
        _require(
            self.reader in ("pyav", "decord"), "media.reader", "'pyav' or 'decord'", self.reader
        )


@dataclass(frozen=True)
class DecodeConfig:
    """The child process that decodes: its limits, where it lays files, and what it decodes on."""

    deadline_s: float = _key(
        600.0, "seconds a video, or a window, may take; then error_type decode_timeout"
    )
    probe_s: float = _key(60.0, "seconds until a file is understood; then error_type probe_timeout")
    memory_limit_bytes: int = _key(4 << 30, "address space of the child beyond its start")
    max_size_bytes: int = _key(16 << 30, "larger objects are refused as too_large")
    max_source_pixels: int = _key(8192 * 4608, "larger frames are refused as too_large")
    max_duration_s: float = _key(86_400.0, "longer videos are refused as too_long")
    max_streams: int = _key(128, "files of more streams are refused as too_many_streams")
    temp_dir: str = _key("", "where downloads lie while they are decoded; empty: the system's")
    nvdec: bool = _key(False, "8-bit H.264, HEVC and VP9 are decoded by GPUs, where a node has any")

    def __post_init__(self) -> None:
        """Refuse limits that let nothing through."""
        for limit in fields(self):
            if limit.name not in ("temp_dir", "nvdec"):
                value = getattr(self, limit.name)
                _require(value > 0, f"decode.{limit.name}", "positive", value)


@dataclass(frozen=True)
class CompressionConfig:
    """How the audio-video prompt is shortened, and to how much."""

    method: str = _key("omnisift", f"what chooses the kept tokens: {', '.join(METHODS)}")
    retain: float = _key(0.25, "share of the audio and video tokens kept, in (0, 1]")
    video_drop: float | None = _key(None, "share of the video tokens removed; overrides retain")
    audio_drop: float | None = _key(None, "share of the audio tokens removed; overrides retain")
    selector: str = _key("", "safetensors file of selector weights; empty: the model's own")
    require_selector: bool = _key(False, "refuse to run when the model has no trained selector")
    batch_videos: int = _key(4, "videos compressed together, as far as their memory allows")
    memory_limit_bytes: int = _key(
        6 << 30, "memory a batch may take beyond the weights; one that takes more is split"
    )

    def __post_init__(self) -> None:
        """Refuse a method there is not and shares outside their range."""
        _require(
            self.method in METHODS,
            "compression.method",
            f"one of {', '.join(METHODS)}",
            self.method,
        )
        _require(0 < self.retain <= 1, "compression.retain", "in (0, 1]", self.retain)
        _require(
            self.batch_videos >= 1, "compression.batch_videos", "at least 1", self.batch_videos
        )
        _require(
            self.memory_limit_bytes >= 512 << 20,
            "compression.memory_limit_bytes",
            "at least 536870912 (half a GiB)",
            self.memory_limit_bytes,
        )
        for name in ("video_drop", "audio_drop"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value <= 1, f"compression.{name}", "in [0, 1] or null", value
            )

    @property
    def shares(self) -> DropShares:
        """Return the drop shares in force."""
        if self.method == "none":
            return DropShares(video=0.0, audio=0.0)
        nominal = drop_shares(self.retain)
        return DropShares(
            video=nominal.video if self.video_drop is None else self.video_drop,
            audio=nominal.audio if self.audio_drop is None else self.audio_drop,
        )


@dataclass(frozen=True)
class CacheConfig:
    """Where the kept tokens lie."""

    path: str = _key("", "prefix of the token cache; empty: <output>/cache")
    codec: str = _key(
        "auto", "float32, bfloat16, int8 (half of bfloat16) or auto: as the model computes"
    )
    videos_per_file: int = _key(4, "videos written in one file, so lost work when a job is killed")

    def __post_init__(self) -> None:
        """Refuse codecs that do not exist."""
        _require_no_secret("cache.path", self.path)
        _require(
            self.codec in ("auto", *CODECS),
            "cache.codec",
            f"auto, {', '.join(CODECS)}",
            self.codec,
        )
        _require(
            self.videos_per_file >= 1, "cache.videos_per_file", "at least 1", self.videos_per_file
        )


@dataclass(frozen=True)
class AnswerConfig:
    """The question asked of each video, and how it is answered."""

    prompt: str = _key(
        "Describe the video in detail, including what is seen and what is heard.",
        "the question, where the manifest has no prompt of its own",
    )
    system_prompt: str = _key(
        "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of "
        "perceiving auditory and visual inputs, as well as generating text and speech.",
        "the system turn before the video",
    )
    max_new_tokens: int = _key(128, "tokens an answer may have")
    temperature: float = _key(0.0, "0: the likeliest token; above: sampled, the wilder the higher")
    top_p: float = _key(1.0, "sample among the likeliest tokens of this total probability")
    seed: int = _key(0, "seed of what is sampled; each question has its own stream")
    stop: list[str] = _key([], "the answer ends in front of any of these texts")
    json_schema: str = _key("", "JSON schema that the answer must follow; vllm alone can")
    engine: str = _key("auto", "transformers, vllm or auto: vllm on GPUs where it is installed")
    tensor_parallel_size: int = _key(1, "GPUs that share one model; vllm alone can")
    gpu_memory_fraction: float = _key(
        0.0,
        "share of a GPU's memory that vllm takes; 0: nine tenths of pools.answer_gpus (-1: .49)",
    )
    context_tokens: int = _key(0, "tokens of a prompt and its answer; 0: the model's positions")
    quantization: str = _key("", "how vllm computes the weights, such as fp8; empty: as they are")
    kv_cache_dtype: str = _key("auto", "how vllm keeps keys and values, such as fp8")
    calls: int = _key(16, "batches that a vllm actor works on at a time, so that it never drains")
    batch_videos: int = _key(4, "videos answered together")
    videos_per_file: int = _key(64, "videos whose answers are written in one file")

    def __post_init__(self) -> None:
        """Refuse an empty question and batches of none."""
        _require(bool(self.prompt.strip()), "answer.prompt", "not empty", self.prompt)
        _require(
            self.max_new_tokens >= 1, "answer.max_new_tokens", "at least 1", self.max_new_tokens
        )
        _require(self.temperature >= 0, "answer.temperature", "0 or more", self.temperature)
        _require(0 < self.top_p <= 1, "answer.top_p", "in (0, 1]", self.top_p)
        _require(all(self.stop), "answer.stop", "texts that are not empty", self.stop)
        _require(
            self.engine in ("auto", "transformers", "vllm"),
            "answer.engine",
            "auto, transformers or vllm",
            self.engine,
        )
        _require(
            0 <= self.gpu_memory_fraction < 1,
            "answer.gpu_memory_fraction",
            "in [0, 1)",
            self.gpu_memory_fraction,
        )
        _require(
            self.context_tokens >= 0, "answer.context_tokens", "0 or more", self.context_tokens
        )
        _require(
            _is_json_object(self.json_schema),
            "answer.json_schema",
            "a JSON object",
            self.json_schema,
        )
        for name in ("tensor_parallel_size", "calls"):
            _require(getattr(self, name) >= 1, f"answer.{name}", "at least 1", getattr(self, name))
        _require(self.batch_videos >= 1, "answer.batch_videos", "at least 1", self.batch_videos)
        _require(
            self.videos_per_file >= 1, "answer.videos_per_file", "at least 1", self.videos_per_file
        )


def _is_json_object(text: str) -> bool:
    try:
        return not text or isinstance(json.loads(text), dict)
    except ValueError:
        return False


@dataclass(frozen=True)
class PoolsConfig:
    """Actors of each stage and what one of them takes; 0 actors: as many as the cluster holds."""

    decode_actors: int = _key(0, "decoding actors; 0: the CPUs the other stages leave")
    decode_cpus: float = _key(1.0, "CPUs of a decoding actor")
    compress_actors: int = _key(0, "compressing actors; 0: one a GPU, or one without GPUs")
    compress_cpus: float = _key(0.25, "CPUs of a compressing actor")
    compress_gpus: float = _key(
        -1.0, "GPUs of a compressing actor; -1: one, with an answering actor half; 0: CPU"
    )
    answer_actors: int = _key(0, "answering actors; 0: one a GPU, or one without GPUs")
    answer_cpus: float = _key(0.25, "CPUs of an answering actor")
    answer_gpus: float = _key(
        -1.0, "GPUs of an answering actor; -1: one, with a compressing actor half; 0: CPU"
    )
    cache_actors: int = _key(0, "cache actors; 0: one a compressor, two where it has a GPU")
    cache_cpus: float = _key(0.1, "CPUs of a cache actor")

    def __post_init__(self) -> None:
        """Refuse pools that could never start."""
        for stage in ("decode", "compress", "answer", "cache"):
            actors = getattr(self, f"{stage}_actors")
            cpus = getattr(self, f"{stage}_cpus")
            _require(actors >= 0, f"pools.{stage}_actors", "0 or more", actors)
            _require(cpus > 0, f"pools.{stage}_cpus", "positive", cpus)
        for stage in ("compress", "answer"):
            gpus = getattr(self, f"{stage}_gpus")
            known = gpus == -1 or 0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)
            _require(known, f"pools.{stage}_gpus", "-1, 0 to 1, or a whole number", gpus)


@dataclass(frozen=True)
class StorageConfig:
    """How the object store is reached. boto3 finds the credentials (environment, role, profile)."""

    endpoint_url: str = _key("", "S3 endpoint; empty: AWS_ENDPOINT_URL or Amazon's own")
    attempts: int = _key(6, "tries of one request before its video fails")
    timeout_s: float = _key(30.0, "seconds without a byte before a try is given up")

    def __post_init__(self) -> None:
        """Refuse to try never."""
        _require_no_secret("storage.endpoint_url", self.endpoint_url)
        _require(self.attempts >= 1, "storage.attempts", "at least 1", self.attempts)
        _require(self.timeout_s > 0, "storage.timeout_s", "positive", self.timeout_s)


@dataclass(frozen=True)
class RetryConfig:
    """What the next run tries again; pipeline/retry.py says which failure is of which kind."""

    max_attempts: int = _key(3, "runs that try a video that crashes, hangs or does not fit")
    failed: bool = _key(False, "try also what failed for good or too often")

    def __post_init__(self) -> None:
        """Refuse to try never."""
        _require(self.max_attempts >= 1, "retry.max_attempts", "at least 1", self.max_attempts)


@dataclass(frozen=True)
class SyncConfig:
    """What happens to the answers and tokens of videos whose objects are gone."""

    delete: bool = _key(False, "remove answers and tokens of videos that the prefix lost")
    max_share: float = _key(0.2, "share of the known videos that may go; more remove nothing")

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        _require(0 < self.max_share <= 1, "sync.max_share", "in (0, 1]", self.max_share)


@dataclass(frozen=True)
class LeaseConfig:
    """How runs keep out of each other's way: one at a time writes to an output."""

    expiry_s: float = _key(60.0, "seconds without renewal after which a run counts as dead")

    def __post_init__(self) -> None:
        """Refuse a lease that ends before it can be renewed."""
        _require(self.expiry_s >= 1, "lease.expiry_s", "at least 1", self.expiry_s)


def _require_pyav(media: MediaConfig, decode: DecodeConfig) -> None:
    pyav = not decode.nvdec or media.reader == "pyav"
    _require(pyav, "media.reader", "'pyav', as decode.nvdec=true", media.reader)


def _cache_root(cache: str, output: str) -> str:
    return (cache or f"{output.rstrip('/')}/cache").rstrip("/")


@dataclass(frozen=True)
class CaptionConfig:
    """What the jobs that caption a corpus, answer questions about it or compress it are told."""

    source: str = _key("", "s3:// or local prefix of videos, or a .parquet, .csv, .jsonl manifest")
    output: str = _key("", "s3:// or local prefix for answers, report and (by default) the cache")
    model: str = _key("Qwen/Qwen2.5-Omni-7B", "folder or hub id of a Qwen2.5-Omni checkpoint")
    revision: str = _key("main", "revision of a hub id")
    seed: int = _key(0, "seed of an untrained selector (of sampled answers: answer.seed)")
    listing: ListingConfig = _key(ListingConfig(), "")
    media: MediaConfig = _key(MediaConfig(), "")
    decode: DecodeConfig = _key(DecodeConfig(), "")
    compression: CompressionConfig = _key(CompressionConfig(), "")
    cache: CacheConfig = _key(CacheConfig(), "")
    answer: AnswerConfig = _key(AnswerConfig(), "")
    pools: PoolsConfig = _key(PoolsConfig(), "")
    storage: StorageConfig = _key(StorageConfig(), "")
    retry: RetryConfig = _key(RetryConfig(), "")
    sync: SyncConfig = _key(SyncConfig(), "")
    lease: LeaseConfig = _key(LeaseConfig(), "")

    def __post_init__(self) -> None:
        """Refuse a job without a corpus or a place for its answers."""
        for name in ("source", "output", "model"):
            _require_no_secret(name, getattr(self, name))
        _require(bool(self.source), "source", "a prefix or a manifest", self.source)
        _require(bool(self.output), "output", "a prefix to write to", self.output)
        _require(bool(self.model), "model", "a folder or a hub id", self.model)
        _require_pyav(self.media, self.decode)
        shared = self.answer.tensor_parallel_size
        _require(
            shared == 1 or self.pools.answer_gpus == shared,
            "pools.answer_gpus",
            f"{shared}, as answer.tensor_parallel_size",
            self.pools.answer_gpus,
        )

    @property
    def cache_root(self) -> str:
        """Return the prefix of the token cache, without a slash at its end."""
        return _cache_root(self.cache.path, self.output)


@dataclass(frozen=True)
class TrainConfig:
    """What `jobs/train.py` trains on, and how. The defaults are the paper's recipe."""

    data: str = _key("", "JSONL of video (a uri, or a path beside the file), prompt and answer")
    output: str = _key("", "folder for state, curves and model/; workers on all nodes must see it")
    model: str = _key("Qwen/Qwen2.5-Omni-7B", "folder or hub id of the checkpoint to begin with")
    revision: str = _key("main", "revision of a hub id")
    seed: int = _key(0, "seed of the order of the data, and of a selector the model lacks")
    workers: int = _key(1, "processes, one a GPU where there are any; above 1 through Ray Train")
    worker_cpus: float = _key(1.0, "CPUs of a worker")
    epochs: int = _key(1, "times the data is gone through")
    batch: int = _key(128, "examples of a step, of all workers together")
    micro_batch: int = _key(1, "examples a worker has in memory at once")
    learning_rate: float = _key(1e-5, "peak of the cosine")
    selector_rate: float = _key(1.0, "the selector's learning rate, as a multiple of the LLM's")
    exploration: float = _key(
        0.0, "noise on the selector's scores, whose gradient is then centred; 0: as published"
    )
    selector_steps: int = _key(
        0, "steps before all others, in which the selector learns alone by two selections"
    )
    selector_alone_rate: float = _key(3e-4, "peak of the cosine in these steps")
    warmup_share: float = _key(0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = _key(0.0, "AdamW's, of matrices")
    max_grad_norm: float = _key(1.0, "gradients are scaled down to this norm")
    max_tokens: int = _key(32_768, "tokens of an example, pruned; longer ones are skipped")
    gradient_checkpointing: bool = _key(True, "compute layers again in the backward pass")
    checkpoint_every: int = _key(50, "steps between two states to resume from")
    log_every: int = _key(1, "steps between two lines of curves.jsonl")
    max_skipped_share: float = _key(0.01, "share of lines that may be unusable before it stops")
    decoders: int = _key(2, "decoding processes of a worker")
    system_prompt: str = _key(AnswerConfig.system_prompt, "the system turn before the video")
    media: MediaConfig = _key(MediaConfig(), "")
    decode: DecodeConfig = _key(DecodeConfig(), "")
    compression: CompressionConfig = _key(CompressionConfig(), "")
    storage: StorageConfig = _key(StorageConfig(), "")

    def __post_init__(self) -> None:
        """Refuse what is not named and what cannot train."""
        for name in ("data", "output", "model"):
            _require_no_secret(name, getattr(self, name))
        _require_pyav(self.media, self.decode)
        _require(bool(self.data), "data", "a JSONL file", self.data)
        local = bool(self.output) and "://" not in self.output
        _require(local, "output", "a folder (states are written by all workers)", self.output)
        _require(bool(self.model), "model", "a folder or a hub id", self.model)
        for name in ("workers", "epochs", "batch", "micro_batch", "decoders"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("max_tokens", "checkpoint_every", "log_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        rates = ("learning_rate", "selector_rate", "selector_alone_rate")
        for name in (*rates, "worker_cpus", "max_grad_norm"):
            _require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        steps = self.selector_steps
        alone = steps == 0 or (steps > 0 and find_method(self.compression.method).selector)
        _require(alone, "selector_steps", "0, or more where the method has a selector", steps)
        noise = "positive where selector_steps is (0.1 is a beginning)"
        _require(not steps or self.exploration > 0, "exploration", noise, self.exploration)
        _require(0 <= self.warmup_share < 1, "warmup_share", "in [0, 1)", self.warmup_share)
        for name in ("weight_decay", "exploration"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        window_s = self.media.window_s
        _require(window_s == 0, "media.window_s", "0 (training reads whole clips)", window_s)
        share = self.max_skipped_share
        _require(0 <= share <= 1, "max_skipped_share", "in [0, 1]", share)
        _require(
            self.compression.method in TRAINED_METHODS,
            "compression.method",
            f"one of {', '.join(TRAINED_METHODS)} (the others have nothing to train)",
            self.compression.method,
        )


@dataclass(frozen=True)
class ShowConfig:
    """Which answers `jobs/show_answers.py` prints."""

    output: str = _key("", "s3:// or local prefix that a job wrote its answers to")
    status: str = _key("", "only these: ok or failed")
    run: str = _key("", "only those of this run id")
    prompt: str = _key("", "only those to this prompt")
    limit: int = _key(1000, "answers printed at most")
    storage: StorageConfig = _key(StorageConfig(), "")

    def __post_init__(self) -> None:
        """Refuse an output that is not named and a status there is not."""
        _require_no_secret("output", self.output)
        _require(bool(self.output), "output", "a prefix to read from", self.output)
        _require(self.status in ("", "ok", "failed"), "status", "ok or failed", self.status)
        _require(self.limit >= 1, "limit", "at least 1", self.limit)


@dataclass(frozen=True)
class CompactConfig:
    """What `jobs/compact.py` merges."""

    output: str = _key("", "s3:// or local prefix that a job wrote its answers to")
    cache: str = _key("", "prefix of the token cache; empty: <output>/cache")
    target_bytes: int = _key(256 << 20, "size of a merged file; files below a quarter are merged")
    grace_s: float = _key(86_400.0, "seconds a replaced file stays, for who began to read before")
    drop_unreadable: bool = _key(
        False, "give up answers and videos files that cannot be read, and ask again"
    )
    storage: StorageConfig = _key(StorageConfig(), "")
    lease: LeaseConfig = _key(LeaseConfig(), "")

    def __post_init__(self) -> None:
        """Refuse an output that is not named and sizes that merge nothing."""
        for name in ("output", "cache"):
            _require_no_secret(name, getattr(self, name))
        _require(bool(self.output), "output", "a prefix to compact", self.output)
        _require(self.target_bytes >= 1, "target_bytes", "at least 1", self.target_bytes)
        _require(self.grace_s >= 0, "grace_s", "0 or more", self.grace_s)

    @property
    def cache_root(self) -> str:
        """Return the prefix of the token cache, without a slash at its end."""
        return _cache_root(self.cache, self.output)


@dataclass(frozen=True)
class VerifyConfig:
    """What `jobs/verify.py` checks."""

    output: str = _key("", "s3:// or local prefix that a job wrote its answers to")
    cache: str = _key("", "prefix of the token cache; empty: <output>/cache")
    storage: StorageConfig = _key(StorageConfig(), "")

    def __post_init__(self) -> None:
        """Refuse an output that is not named."""
        for name in ("output", "cache"):
            _require_no_secret(name, getattr(self, name))
        _require(bool(self.output), "output", "a prefix to check", self.output)

    @property
    def cache_root(self) -> str:
        """Return the prefix of the token cache, without a slash at its end."""
        return _cache_root(self.cache, self.output)
