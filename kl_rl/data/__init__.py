"""Data files: prompts, logged trajectories, comparisons, rankings and episodes; and batches that can be resumed.

    records, skipped = load_records("logged.jsonl", LoggedRecord)
    batch = encode_logged(records, Encoder(tokenizer, Limits(context=512)))
    loader = Loader(ArrayRows(batch), 32, seed=0)

Files are checked as they are read; every complaint names file, line and field.
"""

from kl_rl.data.encode import (
    encode_comparisons,
    encode_episodes,
    encode_logged,
    encode_prompts,
    encode_rankings,
)
from kl_rl.data.encoder import Encoder, Tokenizer
from kl_rl.data.episodes import EpisodeRecord, Step
from kl_rl.data.errors import DataError, Skipped
from kl_rl.data.load import Loaded, load_records
from kl_rl.data.loader import ArrayRows, Loader
from kl_rl.data.packing import Packed, pack
from kl_rl.data.padding import Limits
from kl_rl.data.readers import read_datasets, read_jsonl, read_parquet, read_rows
from kl_rl.data.records import (
    ComparisonRecord,
    LoggedRecord,
    PromptRecord,
    RankingRecord,
    grouped,
    ranking_pairs,
)
from kl_rl.data.row import Content, Message
from kl_rl.data.windows import TextWindows

__all__ = [
    "ArrayRows",
    "ComparisonRecord",
    "Content",
    "DataError",
    "Encoder",
    "EpisodeRecord",
    "Limits",
    "Loaded",
    "Loader",
    "LoggedRecord",
    "Message",
    "Packed",
    "PromptRecord",
    "RankingRecord",
    "Skipped",
    "Step",
    "TextWindows",
    "Tokenizer",
    "encode_comparisons",
    "encode_episodes",
    "encode_logged",
    "encode_prompts",
    "encode_rankings",
    "grouped",
    "load_records",
    "pack",
    "ranking_pairs",
    "read_datasets",
    "read_jsonl",
    "read_parquet",
    "read_rows",
]
