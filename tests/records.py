"""Small records of every kind, shared by the tests of data."""

import json

from kl_rl.data import (
    ComparisonRecord,
    EpisodeRecord,
    LoggedRecord,
    PromptRecord,
    RankingRecord,
    load_records,
)


class Letters:
    """One id per character, 0 ends."""

    end_ids = (0,)

    def encode(self, text):
        return [ord(c) - ord("a") + 1 for c in text if c != "!"]

    def decode(self, ids):
        return "".join(chr(i + ord("a") - 1) for i in ids if i > 0)


LETTERS = Letters()


def write(path, *rows):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def load(tmp_path, kind, *rows, **options):
    return load_records(write(tmp_path / "d.jsonl", *rows), kind, **options).records


LOGGED = {
    "prompt": "ab",
    "completions": ["c", "de"],
    "rewards": [1, 0.5],
    "log_behaviour": [[-1, -2], [-1, -2, 0]],
}
RANKED = {"prompt": "ab", "completions": ["c", "d", "e"], "ranks": [2, 1, 2]}
COMPARED = {"prompt": "ab", "chosen": "c", "rejected": "de"}
EPISODE = {
    "prompt": "z",
    "steps": [
        {"return": 2, "observation": "ab", "action": "c", "log_behaviour": -0.5},
        {"return": 1, "observation": [9], "action": [4, 5], "log_behaviour": [-1, -2]},
    ],
    "return": 2,
}
GOOD = {PromptRecord: {"prompt": "ab"}, LoggedRecord: LOGGED, ComparisonRecord: COMPARED, RankingRecord: RANKED,
        EpisodeRecord: EPISODE}  # fmt: skip


def but(row, **changes):
    return {k: v for k, v in {**row, **changes}.items() if v != "absent"}


def step(**changes):
    return but(EPISODE, steps=[EPISODE["steps"][0], but(EPISODE["steps"][1], **changes)])
