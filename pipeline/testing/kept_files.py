"""Kept tokens of one's own as files of the token cache: what answers can be measured on."""

from collections.abc import Sequence

import pyarrow as pa

from omnisift.codec import Codec, encode
from omnisift.compressor import KeptTokens
from pipeline import rows, token_cache
from pipeline.config import StorageConfig
from pipeline.parquet import open_parquet
from pipeline.stages.answer import kept_tokens
from pipeline.storage import Storage


def write_kept(folder: str, kept: Sequence[KeptTokens], codec: Codec) -> str:
    """Write kept tokens as one file of the cache, a row each and in their order; return its uri."""
    table = rows.build(
        [
            {
                "video_key": f"{number:064x}",
                "uri": f"s3://bucket/{number}.mp4",
                "prompts": [],
                "duration_s": 1.0,
                "fps": 2.0,
                "has_audio": True,
                "tokens": encode(tokens.embeds, codec),
                "token_dtype": codec,
                "token_shape": list(tokens.embeds.shape),
                "positions": tokens.positions.tolist(),
                "modality": tokens.modality.tolist(),
                "next_position": tokens.next_position,
                "kept_index": tokens.kept_index.tolist(),
                "num_video_tokens": tokens.num_video_tokens,
                "num_audio_tokens": tokens.num_audio_tokens,
                "kept_video_tokens": tokens.kept_video_tokens,
                "kept_audio_tokens": tokens.kept_audio_tokens,
            }
            for number, tokens in enumerate(kept)
        ],
        rows.KEPT,
    )
    return token_cache.write_part(Storage(StorageConfig()), folder, "written", table)


def read_kept(uri: str, number: int) -> KeptTokens:
    """Return the kept tokens of row `number`, verified and dequantised; it counts in circles."""
    with open_parquet(Storage(StorageConfig()), uri) as part:
        table: pa.Table = token_cache.read_row(part, number % part.metadata.num_rows)
    [row] = rows.iterate(table)
    return kept_tokens(row)


def count_kept(uri: str) -> int:
    """Return the number of rows of a file."""
    with open_parquet(Storage(StorageConfig()), uri) as part:
        num_rows: int = part.metadata.num_rows
    return num_rows
