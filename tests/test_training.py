"""Runs in this process: bit-equal resume, one copy of the base, memories, bad rewards, return tokens, checkpoints."""

import dataclasses
import json
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_world import contents, knob_of, make_world, programs_kept

from kl_rl.core.rollouts import score
from kl_rl.core.trajectories import Trajectories
from kl_rl.huggingface import load_checkpoint
from kl_rl.huggingface.opened import model_folder
from kl_rl.methods import METHODS
from kl_rl.methods import memory as memories
from kl_rl.rewards.host import HostReward, load_reward, rewards_of
from kl_rl.rewards.values import one_by_one
from kl_rl.runs import (
    Diverged,
    Files,
    Learning,
    Pretraining,
    Saving,
    Settings,
    Sizes,
    Task,
    make_job,
    open_run,
    pretrain,
    take_step,
    train,
)
from kl_rl.runs.job import Job
from kl_rl.runs.pretrain import planned_steps, read_text
from kl_rl.runs.prompts import order_of, split_rows
from kl_rl.runs.returns import padded_edges
from kl_rl.runs.step import blank, decoded
from kl_rl.storage.checkpoint import Checkpoints
from kl_rl.storage.errors import BadRewardValue, RunError, Stopped
from kl_rl.storage.preemption import Preemption

TINY = Pretraining(steps=200, width=32, layers=1, heads=2, context=40, batch=16, learning_rate=5e-3)
SIZES = Sizes(steps=4, batch=2, num_samples=4, horizon=8, held_out=2, eval_every=2, eval_samples=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = make_world(tmp_path_factory.mktemp("training"))
    with programs_kept(made.cache):
        made.base.mkdir()
        result = pretrain(TINY, read_text(str(made.folder / "text.txt"), TINY.context), made.base)
        assert result["held_out_loss"] < result["unigram_entropy"] - 0.3
        yield made


def asked(world, method, *, lora=0, on_bad_reward="stop", reward=None, sizes=SIZES, **learning):
    task = Task(method, str(world.base), str(world.prompts), reward or str(world.reward), **knob_of(method))
    return Settings(
        task, sizes, Learning(1e-2, lora, **learning), Saving(save_every=2, on_bad_reward=on_bad_reward)
    )


def trained(settings, folder, *, change=lambda job: job, **told):
    """As the command trains: a signal stops it between two steps."""
    with Preemption() as preemption:
        return train(
            change(make_job(settings)), Files(folder, settings.saving.save_every), preemption, **told
        )


def stop_after(step):
    def progress(fraction, message):
        if message.startswith(f"step {step}:"):
            signal.raise_signal(signal.SIGTERM)

    return progress


def fresh_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_pretraining_resumes_bit_equal(world, tmp_path):
    plan = dataclasses.replace(TINY, steps=20)
    text = read_text(str(world.folder / "text.txt"), TINY.context)
    whole, part = fresh_folder(tmp_path, "whole"), fresh_folder(tmp_path, "part")
    result = pretrain(plan, text, whole)
    with pytest.raises(Stopped) as stopped:
        pretrain(plan, text, part, progress=lambda f, m: signal.raise_signal(signal.SIGTERM))
    assert stopped.value.code == 143 and stopped.value.step < plan.steps
    assert pretrain(plan, text, part) == result
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_pretraining_starts_return_tokens_at_the_begin_mark(world):
    table = load_checkpoint(world.base / "model").weights["embed"]["table"]
    np.testing.assert_array_equal(table[258:], np.broadcast_to(table[257], (8, table.shape[1])))


def test_planned_steps_grow_with_the_minutes_and_stop_at_forty_passes(world):
    config = load_checkpoint(world.base / "model").config
    plan = dataclasses.replace(TINY, steps=None, minutes=1.0)
    one, two = (planned_steps(dataclasses.replace(plan, minutes=m), config, 10**9) for m in (1.0, 2.0))
    assert abs(two - 2 * one) <= 1
    assert planned_steps(plan, config, 16 * 40) == 40


RESUMED = ["rlhf", "tb-replay"]
SELDOM = ("best-of-n", "dt-tilted", "ppo-lora", "rwr-logged")
RESUMED += [pytest.param(name, marks=pytest.mark.slow) for name in SELDOM]


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_resumes_bit_equal(name, world, tmp_path):
    """Weights and files of four steps in one go, and of three, a stop, and one more in fresh objects."""
    settings = asked(world, name.removesuffix("-lora"), lora=2 * name.endswith("-lora"))
    whole, part = fresh_folder(tmp_path, "whole"), fresh_folder(tmp_path, "part")
    trained(settings, whole)
    with pytest.raises(Stopped):
        trained(settings, part, progress=stop_after(3))
    assert trained(settings, part)["resumed"] == 3
    assert contents(part) == contents(whole)
    learned, base = (load_checkpoint(x / "model").weights for x in (whole, world.base))
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), learned["layers"], base["layers"])
    assert any(jax.tree.leaves(changed))


def test_rows_written_after_the_checkpoint_are_cut_back(world, tmp_path):
    """As after SIGKILL: files are ahead of the newest checkpoint, the last line in pieces."""
    settings = asked(world, "rlhf")
    whole, part = fresh_folder(tmp_path, "whole"), fresh_folder(tmp_path, "part")
    trained(settings, whole)
    with pytest.raises(Stopped):
        trained(settings, part, progress=stop_after(3))
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        with open(part / name, "a") as file:
            file.write('{"step": 4, "lo')
    trained(settings, part)
    assert contents(part) == contents(whole)


def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(world, tmp_path):
    settings, said = asked(world, "rlhf"), []
    whole, part = fresh_folder(tmp_path, "whole"), fresh_folder(tmp_path, "part")
    trained(settings, whole)
    with pytest.raises(Stopped):
        trained(settings, part, progress=stop_after(3))
    largest = max((part / "checkpoints" / "3").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert trained(settings, part, say=said.append)["resumed"] == 2
    assert len(said) == 1 and "checkpoint 3 is damaged" in said[0]
    assert (part / "checkpoints.damaged" / "3").is_dir()
    assert contents(part) == contents(whole)


@pytest.mark.parametrize("method", ["rloo", "tb-replay", "expert-iteration"])
def test_an_adapter_leaves_one_copy_of_the_base(method, world):
    """Nothing that is donated or saved is as large as the base, and the base is alive after steps."""
    job = make_job(asked(world, method, lora=2))
    run = open_run(job)
    largest = max(x.size for x in jax.tree.leaves(job.inputs.base.params))
    assert all(x.size < largest for x in jax.tree.leaves(run.state))
    before = jax.tree.map(np.array, job.inputs.base.params)
    for step in range(2):
        run, _ = take_step(job, run, step)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.array, job.inputs.base.params)))


@pytest.mark.parametrize("name", [m.name for m in METHODS])
def test_every_method_of_the_catalogue_traces_a_step_with_host_rewards(name, world):
    """The whole step in abstract: shapes of the run do not change, and the metrics are scalars."""
    settings = asked(world, name, sizes=SIZES)
    threshold = 0.5 if name == "filter" else None
    settings = dataclasses.replace(settings, task=dataclasses.replace(settings.task, threshold=threshold))
    job = make_job(settings)
    run = jax.eval_shape(lambda: blank_of(job))
    batch = abstract_batch(job)
    after, info = jax.eval_shape(
        job.programs.step, job.inputs.base, run, job.knobs, batch, jax.ShapeDtypeStruct((), jnp.int32)
    )
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, after, run)
    assert jax.tree.all(same)
    assert all(x.shape == () for x in info)


def blank_of(job):
    return blank(job)


def abstract_batch(job):
    shape = (job.sizes.batch, job.sizes.num_samples, job.sizes.horizon)
    leaf = lambda dtype, *size: jax.ShapeDtypeStruct(size or shape, dtype)
    prompt = leaf(jnp.int32, shape[0], job.inputs.train.ids.shape[1])
    return Trajectories(
        prompt, leaf(jnp.int32), *(leaf(jnp.float32) for _ in range(3)), leaf(jnp.float32, *shape[:2])
    )


def test_the_replay_ring_keeps_what_was_drawn_and_its_probabilities():
    group = lambda value: Trajectories(
        *(jnp.full((2, *size), value, jnp.float32) for size in ((3,), (2, 4), (2, 4), (2, 4), (2, 4), (2,)))
    )
    empty = group(0.0).map_prompts(lambda x: jnp.zeros((4, *x.shape[1:])))
    ring, replay = memories.Ring(empty, jnp.zeros((), jnp.int32)), memories.replay(share=0.5)
    for value in (1.0, 2.0, 3.0):
        batch, ring = replay.draw(ring, jax.random.key(int(value)), group(value))
        for leaf in jax.tree.leaves(batch):  # a group is of one kind as a whole
            assert bool(jnp.all(leaf.reshape(2, -1) == leaf.reshape(2, -1)[:, :1]))
    assert sorted(set(np.asarray(ring.data.reward).ravel())) == [2.0, 3.0]
    drawn = [replay.draw(ring, jax.random.key(i), group(9.0))[0].reward[:, 0] for i in range(400)]
    share = np.mean(np.asarray(drawn) == 9.0)
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(800)


def with_reward(job: Job, score_of) -> Job:
    return job._replace(inputs=job.inputs._replace(reward=HostReward("test", one_by_one(score_of))))


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), "high", None, np.ones(2)], ids=["nan", "inf", "text", "none", "array"]
)
def test_a_bad_reward_stops_the_run_before_anything_is_used_up(bad, world):
    job = make_job(asked(world, "rlhf"))
    run = open_run(job)
    with pytest.raises(BadRewardValue, match=r"for prompt '.* and completion '"):
        take_step(with_reward(job, lambda prompt, completion: bad), run, 0)
    assert not any(x.is_deleted() for x in jax.tree.leaves(run))


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_diverges_is_never_saved(name, world, tmp_path, monkeypatch):
    """A gradient that is no number has ruined the weights, though the loss of that step was one."""

    def ruined(job):
        def step(*args):
            run, info = job.programs.step(*args)
            return run, info._replace(**{name: jnp.nan}) if int(args[-1]) == 2 else info

        return job._replace(programs=job.programs._replace(step=step))

    settings, folder = asked(world, "rlhf"), fresh_folder(tmp_path, "run")
    settings = dataclasses.replace(settings, saving=Saving(save_every=1))
    with pytest.raises(Diverged, match=f"step 3: {name} is nan"):
        trained(settings, folder, change=ruined)
    store = Checkpoints(folder / "checkpoints")
    assert store.latest == 2
    store.close()


def test_texts_in_pieces_a_model_as_reward_and_every_option(world, tmp_path):
    """Windows of a text as prompts, rewarded by the base model itself, tempered, in bfloat16, scanned, recomputed."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the sun is up and so it was a day " * 3)
    task = Task(
        "rlhf", str(world.base), str(prompts), str(world.base), beta=0.5, prompt_length=6, num_prompts=9
    )
    learning = Learning(1e-2, temperature=0.8, compute_dtype="bfloat16", scan_layers=True, remat=True, seed=3)
    folder = fresh_folder(tmp_path, "run")
    result = trained(Settings(task, SIZES, learning), folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and result["steps"] == 4
    assert all(row["reward"] < 0 for row in rows)  # log-likelihoods
    assert rows[0]["log_ratio"] == pytest.approx(
        0.0, abs=0.05
    )  # plain, not tempered, policy against the base
    assert np.isfinite([result[name] for name in ("kl", "P", "S", "C")]).all()


def test_names_of_the_hub_are_bases_and_rewards(world, monkeypatch, tmp_path):
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: str(world.base / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert model_folder("org/tiny") == world.base / "model"
    assert rewards_of(load_reward("org/tiny"), ["a "], ["sun"], skip=False) < 0
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (load_reward, model_folder):
        with pytest.raises(RunError, match=r"org/tiny: no such folder; .* pip install 'kl-rl\[hf\]'"):
            use("org/tiny")


def test_a_signal_during_the_agreement_counts_at_the_next_step(monkeypatch):
    from kl_rl.storage import preemption

    with preemption.Preemption() as asked_to_stop:

        def agreed(message):
            if message is None:
                signal.raise_signal(signal.SIGTERM)
            return message

        monkeypatch.setattr(preemption, "agreed", agreed)
        assert not asked_to_stop.asked()
        assert asked_to_stop.asked() and asked_to_stop.code == 143


def test_a_bad_sample_is_replaced_by_a_good_one_of_its_group(world):
    """Skipping: what is learned from is exactly the good samples, and the bad ones are counted."""
    from kl_rl.runs.step import _mended

    tokens = np.arange(3 * 4 * 2).reshape(3, 4, 2)
    prompt, flat = np.arange(3)[:, None], np.ones((3, 4, 2))
    reward = np.arange(12.0).reshape(3, 4)
    bad = np.array([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    mended = _mended(Trajectories(prompt, tokens, flat, flat, flat, reward), bad)
    np.testing.assert_array_equal(mended.reward[0], [1, 1, 2, 2])
    assert mended.prompt[1, 0] in (0, 2) and not np.isin(mended.reward[1], [0, 3, 4, 5, 6, 7]).any()
    np.testing.assert_array_equal(mended.reward[2], reward[2])
    np.testing.assert_array_equal(mended.tokens[..., 0], 2 * mended.reward)


def test_skipping_counts_and_goes_on(world):
    job = make_job(asked(world, "rlhf", on_bad_reward="skip"))

    def fails_sometimes(prompt, completion):
        if "a" in completion:
            raise RuntimeError("no score")
        return len(completion)

    seen = 0
    job, run = with_reward(job, fails_sometimes), open_run(job)
    for step in range(3):
        run, row = take_step(job, run, step)
        seen += row["skipped"]
    assert seen > 0
    with pytest.raises(BadRewardValue, match="every completion"):
        take_step(with_reward(job, lambda p, c: float("nan")), run, 3)


def test_knob_and_rate_are_arguments_of_one_program(world):
    job = make_job(asked(world, "rlhf"))
    run, _ = take_step(job, open_run(job), 0)
    before = job.programs.step.cache_size()  # other tests may have used the same program
    for step, beta in enumerate((0.5, 0.7), 1):
        knobs = job.knobs._replace(value=jnp.float32(beta), learning_rate=jnp.float32(beta / 100))
        run, _ = take_step(job._replace(knobs=knobs), run, step)
    assert job.programs.step.cache_size() == before


def test_the_recorded_probability_is_the_scorers(world):
    """The behaviour's log-probabilities equal teacher forcing, prompts padded on the right."""
    job = make_job(asked(world, "dt-tilted"))
    prompt = job.array(job.inputs.train.ids)
    drawn = job.programs.draw(job.inputs.base, jax.random.key(0), prompt, None)
    batch = Trajectories(
        prompt, drawn.tokens, drawn.mask, jnp.ones_like(drawn.mask), drawn.log_model, drawn.mask[..., 0]
    )
    np.testing.assert_allclose(score(job.inputs.base, batch), drawn.log_model, atol=2e-5)


def test_return_edges_lie_between_rewards_that_occur():
    reward = np.array([0.0] * 50 + [1.0] * 30 + [2.0] * 15 + [5.0] * 5)
    edges = padded_edges(reward)
    assert edges.shape == (7,) and np.all(np.diff(edges[np.isfinite(edges)]) > 0)
    assert set(edges[np.isfinite(edges)]) <= {0.5, 1.5, 3.5}
    assert 3.5 in edges
    with pytest.raises(RunError, match="score 3"):
        padded_edges(np.full(10, 3.0))


def test_every_prompt_comes_once_an_epoch(world):
    job = make_job(asked(world, "rlhf"))
    total = len(job.inputs.train.texts)
    order = order_of(job.inputs.train, 3, seed=1)
    index = np.concatenate([order(step) for step in range(total)])
    for epoch in index.reshape(3, total):
        assert sorted(epoch) == list(range(total))
    assert not set(job.inputs.train.texts) & set(job.inputs.held_out.texts)


def test_a_run_goes_on_with_another_mesh(world, tmp_path):
    """Three steps on one device, then one on two by two by two: equal to four on one device, to rounding."""
    sizes = dataclasses.replace(SIZES, batch=4)
    whole, part = fresh_folder(tmp_path, "whole"), fresh_folder(tmp_path, "part")
    trained(asked(world, "rlhf", sizes=sizes), whole)
    with pytest.raises(Stopped):
        trained(asked(world, "rlhf", sizes=sizes), part, progress=stop_after(3))
    moved = asked(world, "rlhf", sizes=sizes, mesh=(("data", 2), ("fsdp", 2), ("tensor", 2)))
    assert moved.compared() == asked(world, "rlhf", sizes=sizes).compared()
    assert trained(moved, part)["resumed"] == 3
    rows = [
        [json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()] for x in (whole, part)
    ]
    assert rows[0][:3] == rows[1][:3] and rows[0][3] != rows[1][3]
    assert rows[1][3] == pytest.approx(rows[0][3], rel=1e-4, abs=1e-5)
    weights = [load_checkpoint(x / "model").weights for x in (whole, part)]
    for tree in weights:  # its gradient is 0 but for rounding, of which Adam makes full steps
        del tree["layers"]["key"]["bias"]
    for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_step_in_parts_equals_a_step(world):
    """Gradients of four prompts, together and in two parts: equal to rounding."""
    rows = []
    for parts in (1, 2):
        sizes = dataclasses.replace(SIZES, batch=4, gradient_accumulation=parts)
        settings = asked(world, "vargrad-replay", sizes=sizes)
        assert settings.compared()["gradient_accumulation"] == parts
        job = make_job(settings)
        rows.append(take_step(job, open_run(job), 0)[1])
    assert {name: rows[0][name] for name in rows[0]} == pytest.approx(rows[1], rel=1e-5, abs=1e-6)


def data_file(world, folder, kind):
    """Twelve prompts with two completions each, as pairs or with rewards."""
    words = ["the sun", "a sky", "no rain"]
    rows = []
    for i in range(12):
        prompt, good, bad = f"{i} of ", words[i % 3], words[(i + 1) % 3]
        if kind == "pairs":
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
        else:
            rows += [
                {"prompt": prompt, "completion": c, "reward": r} for c, r in ((good, 1.5), (bad, i / 12))
            ]
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_data(settings, path):
    return dataclasses.replace(
        settings, task=dataclasses.replace(settings.task, prompts=None, data=str(path))
    )


@pytest.mark.parametrize(
    ("method", "kind"), [("dpo", "pairs"), ("vargrad-replay", "rewards"), ("dt-tilted", "rewards")]
)
def test_data_of_the_user_are_the_batches(method, kind, world, tmp_path):
    """Every training prompt with its own completions, end tokens included; none of those that are measured on."""
    sizes = dataclasses.replace(SIZES, horizon=10, batch=3)
    job = make_job(with_data(asked(world, method, sizes=sizes), data_file(world, tmp_path, kind)))
    size = 1 if method == "dt-tilted" else 2  # it compares nothing: each completion is a row
    assert len(job.inputs.train.texts) == 20 // size and job.is_held_out and job.choice.drawn_by == "data"
    assert job.inputs.data.tokens.shape == (20 // size, size, 10)
    tokenizer, seen = job.inputs.model.tokenizer, []
    for row, prompt in enumerate(job.inputs.train.texts):
        number = int(prompt.split()[0])
        words = [["the sun", "a sky", "no rain"][(number + k) % 3] for k in (0, 1)]
        wanted = dict(zip(words, [1.0, 0.0] if kind == "pairs" else [1.5, number / 12], strict=True))
        texts = decoded(tokenizer, job.inputs.data.tokens[row], job.inputs.data.mask[row])
        said = job.inputs.data.label if kind == "pairs" else job.inputs.data.reward
        np.testing.assert_allclose(said[row], [wanted[text] for text in texts])
        ends = [
            job.inputs.data.tokens[row, k, int(job.inputs.data.mask[row, k].sum()) - 1] for k in range(size)
        ]
        assert set(ends) <= set(tokenizer.end_ids)
        seen += [(number, text) for text in texts]
    assert len(set(seen)) == 20
    np.testing.assert_array_equal(job.inputs.data.prompt, job.inputs.train.ids)
    run = open_run(job)
    for step in range(2):
        run, row = take_step(job, run, step)
        batch = job.inputs.data.reward[job.order(step)]
        assert row["reward"] == pytest.approx(float(np.mean(batch)), nan_ok=True) and row["loss"] != 0
        assert np.isnan(row["reward"]) == (kind == "pairs")  # comparisons do not say


def test_a_prompt_is_trained_on_or_held_out():
    """Every row of it; without repetitions as many as wished for, of three prompts none."""
    texts = [f"prompt {i % 12}" for i in range(30)]
    rows, kept = split_rows(texts, 3, seed=0)
    assert len(kept) == 3 and not {texts[i] for i in kept} & {texts[i] for i in rows}
    assert len({texts[i] for i in kept}) == 3 and {texts[i] for i in [*rows, *kept]} == set(texts)
    assert len(rows) == 30 - sum(texts.count(texts[i]) for i in kept)
    rows, kept = split_rows(["a", "b", "c", "a"], 8, seed=0)
    assert rows.tolist() == [0, 1, 2, 3] and kept.tolist() == [0, 1, 2]


def test_a_run_on_data_resumes_bit_equal(world, tmp_path):
    settings = with_data(asked(world, "dpo"), data_file(world, tmp_path, "pairs"))
    whole, part = fresh_folder(tmp_path, "whole"), fresh_folder(tmp_path, "part")
    result = trained(settings, whole)
    with pytest.raises(Stopped):
        trained(settings, part, progress=stop_after(3))
    assert trained(settings, part)["resumed"] == 3
    assert contents(part) == contents(whole)
    assert result["kl"] > 0.0 and result["held_out"]


def test_nothing_learned_is_said(world, tmp_path):
    """No completion reaches the threshold; and of one prompt none is held out."""
    settings, said = asked(world, "filter", sizes=dataclasses.replace(SIZES, held_out=0)), []
    task = dataclasses.replace(settings.task, threshold=1e6)
    result = trained(dataclasses.replace(settings, task=task), fresh_folder(tmp_path, "run"), say=said.append)
    assert said[1:] == [
        "warning: no sample had any weight (no reward passed) in any step: nothing was learned"
    ]
    assert result["held_out"] is False


def test_measurements_start_at_zero(world, tmp_path):
    """Before the first step q is p0: every divergence is 0 up to rounding."""
    folder, said = fresh_folder(tmp_path, "run"), []
    trained(asked(world, "rlhf"), folder, say=said.append)
    assert len(said) == 1 and "rounded" not in said[0] and "words" in said[0]  # how the word list was read
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert any("effective sample size" in warning for row in rows for warning in row["warnings"])
    assert len({row["base_reward"] for row in rows}) == 1 and all(row["held_out"] for row in rows)
    assert abs(rows[0]["kl"]) < 1e-5 and rows[0]["C"] < 1e-5
    assert rows[-1]["C_lower"] <= rows[-1]["C"] <= rows[-1]["C_upper"]
