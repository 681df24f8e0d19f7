"""Batches: deterministic orders, positions that can be resumed, hosts, windows of text, packing."""

import json
import subprocess
import sys

import numpy as np
import pytest

from kl_rl.core.trajectories import Trajectories
from kl_rl.data import (
    ArrayRows,
    Loader,
    TextWindows,
    pack,
)


def logged_batch(size):
    tokens = np.arange(size * 2 * 3, dtype=np.int32).reshape(size, 2, 3)
    ones = np.ones_like(tokens, np.float32)
    return Trajectories(np.arange(size, dtype=np.int32)[:, None], tokens, ones, ones, -ones, ones[..., 0])


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_resuming_at_every_position_equals_not_stopping(drop_remainder):
    make = lambda: Loader(ArrayRows(logged_batch(10)), 4, seed=3, drop_remainder=drop_remainder)
    uninterrupted = make()
    batches = [next(uninterrupted) for _ in range(12)]
    for stop in range(12):
        first = make()
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state()))
        second = make()
        second.restore(state)
        assert second.step == stop
        for expected in batches[stop:]:
            for a, b in zip(next(second), expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_comes_once_an_epoch_in_full_batches(shuffle):
    loader = Loader(ArrayRows(np.arange(100)), 30, seed=0, shuffle=shuffle)
    stream = np.concatenate([next(loader) for _ in range(10)])
    epochs = stream.reshape(3, 100)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(100), (3, 1)))
    assert loader.epoch == 3.0
    distinct = {tuple(epoch) for epoch in epochs.tolist()} | {tuple(range(100))}
    assert len(distinct) == (4 if shuffle else 1)
    dropped = Loader(ArrayRows(np.arange(100)), 30, seed=0, shuffle=shuffle, drop_remainder=True)
    epochs = np.concatenate([next(dropped) for _ in range(6)]).reshape(2, 90)
    assert all(len(set(epoch)) == 90 for epoch in epochs.tolist()) and dropped.epoch == 2.0


def test_neighbouring_seeds_share_no_epoch():
    """Grain's own rule, seed + epoch, would give seed 1 the second epoch of seed 0."""
    orders = [
        tuple(Loader(ArrayRows(np.arange(50)), 50, seed=s).batch(e)) for s in range(3) for e in range(3)
    ]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_hosts_share_out_a_batch_that_does_not_depend_on_them(hosts):
    rows = ArrayRows(np.arange(20))
    whole = Loader(rows, 6, seed=1)
    loaders = [Loader(rows, 6, seed=1, shard_index=h, shard_count=hosts) for h in range(hosts)]
    for _ in range(7):
        parts = [next(loader) for loader in loaders]
        assert all(len(part) == 6 // hosts for part in parts)
        assert np.array_equal(np.concatenate(parts), next(whole))
    states = [loader.state() for loader in loaders]
    assert all(state == whole.state() for state in states)
    resumed = Loader(rows, 6, seed=1)
    resumed.restore(states[-1])
    assert np.array_equal(next(resumed), next(whole))


def test_a_position_of_something_else_is_refused():
    state = Loader(ArrayRows(np.arange(20)), 4, seed=1).state()
    others = {
        "rows": Loader(ArrayRows(np.arange(21)), 4, seed=1),
        "contents": Loader(ArrayRows(np.arange(20)[::-1]), 4, seed=1),
        "batch_size": Loader(ArrayRows(np.arange(20)), 5, seed=1),
        "seed": Loader(ArrayRows(np.arange(20)), 4, seed=2),
        "drop_remainder": Loader(ArrayRows(np.arange(20)), 4, seed=1, drop_remainder=True),
    }
    for name, loader in others.items():
        with pytest.raises(ValueError, match=f"data position: {name} was .* and is now"):
            loader.restore(state)
        assert loader.step == 0
    for bad in ({}, {**state, "step": -1}, {**state, "step": "3"}, {**state, "step": True}):
        with pytest.raises(ValueError, match="step must be a whole number"):
            Loader(ArrayRows(np.arange(20)), 4, seed=1).restore(bad)
    with pytest.raises(ValueError, match="another release .grain"):
        Loader(ArrayRows(np.arange(20)), 4, seed=1).restore({**state, "order": 0})


@pytest.mark.parametrize(
    "size, options, message",
    [
        (0, {}, "no rows to load"),
        (5, {"batch_size": 0}, "batch_size must be a positive multiple of 1 hosts; got 0"),
        (5, {"batch_size": 3, "shard_count": 2}, "batch_size must be a positive multiple of 2 hosts; got 3"),
        (
            5,
            {"shard_index": 2, "shard_count": 2},
            "shard_index must lie between 0 and shard_count - 1 = 1; got 2",
        ),
        (3, {"drop_remainder": True}, "3 rows do not fill one batch of 4"),
    ],
)
def test_bad_sizes_are_refused(size, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(ArrayRows(np.arange(size)), **{"batch_size": 4, "seed": 0, **options})
    with pytest.raises(ValueError, match="one leading axis of the same length"):
        ArrayRows((np.zeros(3), np.zeros(4)))


def test_grain_is_imported_when_a_loader_is_made():
    code = "import sys, kl_rl.data; sys.exit(any(m in sys.modules for m in ('grain', 'pyarrow', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_text_windows_are_a_function_of_seed_and_step():
    ids = np.arange(103, dtype=np.uint16)
    windows = TextWindows(ids, 10)
    assert len(windows) == 10 and windows.take(np.array([0, 9]))[:, 0].tolist() == [0, 90]
    drawn = windows.sample(5, 8, seed=1)
    assert drawn.shape == (8, 10) and drawn.dtype == np.int32 and np.all(np.diff(drawn) == 1)
    parts = [windows.sample(5, 8, seed=1, shard_index=h, shard_count=4) for h in range(4)]
    assert np.array_equal(np.concatenate(parts), drawn)
    others = [windows.sample(6, 8, seed=1), windows.sample(5, 8, seed=2), windows.sample(1, 8, seed=5)]
    assert not any(np.array_equal(drawn, other) for other in others)
    starts = np.concatenate([windows.sample(s, 64, seed=0)[:, 0] for s in range(64)])
    assert set(starts.tolist()) == set(range(94))  # the last window too
    loader = Loader(windows, 4, seed=0)
    seen = np.concatenate([next(loader) for _ in range(5)])
    assert np.array_equal(np.sort(seen[:10, 0]), np.arange(0, 100, 10))
    with pytest.raises(ValueError, match="contents was"):
        Loader(TextWindows(ids + 1, 10), 4, seed=0).restore(loader.state())


def test_random_orders_are_fixed_for_good():
    """A stored value: another release of NumPy must not move a resumed run to other data."""
    windows = TextWindows(np.arange(1000, dtype=np.int32), 4)
    assert windows.sample(7, 5, seed=3)[:, 0].tolist() == [933, 43, 973, 421, 681]
    assert Loader(ArrayRows(np.arange(7)), 7, seed=3).batch(2).tolist() == [2, 3, 6, 4, 1, 5, 0]


@pytest.mark.parametrize(
    "ids, window, message",
    [
        (np.zeros(3), 2, "ids must be integers"),
        (np.zeros((2, 2), int), 2, "ids must be integers"),
        (np.zeros(3, int), 4, "the text has 3 tokens, fewer than one window of 4"),
        (np.zeros(3, int), 0, "window must be at least 1"),
    ],
)
def test_bad_texts_are_refused(ids, window, message):
    with pytest.raises(ValueError, match=message):
        TextWindows(ids, window)


def test_packing_keeps_every_document_whole():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, size=rng.integers(1, 17)).tolist() for _ in range(200)]
    packed = pack(documents, 16)
    found = []
    for ids, segments in zip(packed.ids, packed.segments, strict=True):
        assert np.array_equal(ids >= 0, segments > 0)
        numbers = segments[segments > 0]
        assert np.all(np.diff(numbers) >= 0) and set(numbers) == set(range(1, numbers.max() + 1))
        assert np.all(segments[len(numbers) :] == 0)
        found += [ids[segments == n].tolist() for n in range(1, numbers.max() + 1)]
    assert sorted(found) == sorted(documents)
    assert len(packed.ids) <= 11 / 9 * np.ceil(sum(map(len, documents)) / 16) + 1 and packed.fill > 0.95
    assert all(np.array_equal(a, b) for a, b in zip(packed, pack(documents, 16), strict=True))


def test_long_documents_are_split_when_asked():
    with pytest.raises(ValueError, match="document 1 has 5 tokens for rows of 4"):
        pack([[1], [1, 2, 3, 4, 5]], 4)
    packed = pack([[9], [1, 2, 3, 4, 5]], 4, split=True)
    assert packed.ids.tolist() == [[1, 2, 3, 4], [9, 5, -1, -1]]
    assert packed.segments.tolist() == [[1, 1, 1, 1], [1, 2, 0, 0]]
    for bad, message in (([[]], "document 0 is empty"), ([], "no documents to pack")):
        with pytest.raises(ValueError, match=message):
            pack(bad, 4)
