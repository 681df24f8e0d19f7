"""Reward models of the hub: the numbers of transformers' sequence classification, and clear errors."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kl_rl.huggingface import CheckpointError, load_reward_model
from kl_rl.huggingface.opened import begin_of, load_model
from kl_rl.models import last_hidden
from kl_rl.rewards.host import load_reward, rewards_of
from kl_rl.rewards.values import PromptText
from kl_rl.runs.prompts import load_prompts, reader_of
from kl_rl.storage.errors import RunError
from kl_rl.tokenizer import load_tokenizer

HERE = Path(__file__).parent / "checkpoints" / "reward_models"
NAMES = sorted(path.parent.name for path in HERE.glob("*/config.json"))


@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_those_of_transformers(name):
    """Measured with jax 0.10.2: at most 7.2e-7, where rewards are up to 1.4; left padding changes nothing."""
    expected, model = np.load(HERE / name / "expected.npz"), load_reward_model(HERE / name)
    padded = np.pad(expected["ids"], ((0, 0), (3, 0)), constant_values=-1)
    for ids in (expected["ids"], padded):
        found = (
            jax.jit(last_hidden, static_argnums=0)(model.config, model.weights, jnp.asarray(ids))
            @ model.score
        )
        assert np.abs(np.asarray(found) - expected["rewards"]).max() < 1e-5


def test_a_folder_as_reward_scores_texts():
    """Wherever the prompt ends, and at every length: what transformers answers for the whole text."""
    expected, reward = np.load(HERE / "qwen3" / "expected.npz"), load_reward(str(HERE / "qwen3"))
    texts, wanted = list(expected["texts"]), expected["text_rewards"]
    for cut in (0, 11):
        prompts, completions = [t[:cut] for t in texts], [t[cut:] for t in texts]
        together = rewards_of(reward, prompts, completions, skip=False)
        np.testing.assert_allclose(together, wanted, atol=1e-5)
        for prompt, completion, value in zip(prompts, completions, wanted, strict=True):
            assert abs(rewards_of(reward, [prompt], [completion], skip=False)[0] - value) < 1e-5
    many = rewards_of(reward, [""] * 70, (texts * 70)[:70], skip=False)  # more than are scored at once
    np.testing.assert_allclose(many, np.resize(wanted, 70), atol=1e-5)
    too_long = (["", "", ""], [texts[0], "x" * 100, texts[1]])
    with pytest.raises(RunError, match="do not fit the reward model's context of 64"):
        rewards_of(reward, *too_long, skip=False)
    skipped = rewards_of(reward, *too_long, skip=True)
    np.testing.assert_allclose(skipped, [wanted[0], np.nan, wanted[1]], atol=1e-5)


def test_a_language_model_as_reward_gives_log_likelihoods():
    """Together and alone, of prompts and completions of any lengths: the sum of the log-probabilities."""
    folder = HERE.parent / "qwen3"
    reward, model = load_reward(str(folder)), load_model(folder)
    encode, begin = model.tokenizer.encode, begin_of(model.tokenizer)
    prompts, completions = ["the ", "a longer prompt than ", "x"], ["sun", "the others of this test", ""]
    run = jax.jit(lambda policy, *ids: policy.logits(*ids))
    found = rewards_of(reward, prompts, completions, skip=False)
    for prompt, completion, value in zip(prompts, completions, found, strict=True):
        first, ids = ([] if begin is None else [begin]) + encode(prompt), encode(completion)
        wanted = 0.0
        if ids:
            logits = run(model.base, jnp.asarray([first]), jnp.asarray([ids]))[0]
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
            wanted = float(sum(log_probs[i, token] for i, token in enumerate(ids)))
        assert value == pytest.approx(wanted, abs=1e-4)
    assert rewards_of(reward, prompts[:1], completions[:1], skip=False)[0] == pytest.approx(
        found[0], abs=1e-4
    )


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
ASKED = ({"role": "user", "content": "the sun"},)


def two_copies(source, folder):
    """Of a model: with this chat template, and without one."""
    talks, plain = (Path(shutil.copytree(source, folder / name)) for name in ("talks", "plain"))
    (talks / "chat_template.jinja").write_text(TEMPLATE)
    (plain / "chat_template.jinja").unlink()
    return talks, plain


def conversation(text):
    made = PromptText(text)
    made.messages = ASKED
    return made


def test_a_conversation_goes_through_the_reward_models_template(tmp_path):
    """Not the text that another model's template made of it; without a template, the text."""
    (talks, plain), prompt = two_copies(HERE / "qwen3", tmp_path), conversation("as another model says it")
    model, tokenizer = load_reward_model(plain), load_tokenizer(plain)

    def score(text, begin=()):
        ids = jnp.asarray([[*begin, *tokenizer.encode(text)]])
        hidden = jax.jit(last_hidden, static_argnums=0)(model.config, model.weights, ids)
        return float((hidden @ model.score)[0])

    rate = lambda folder, prompt: rewards_of(load_reward(str(folder)), [prompt], ["sky"], skip=False)[0]
    begin = [i for i in [begin_of(tokenizer)] if i is not None]
    wanted = (
        score("user: the sun\nassistant: sky\n", begin),
        score("as another model says itsky", begin),
    )
    assert rate(talks, prompt) == pytest.approx(wanted[0], abs=1e-5)
    assert rate(plain, prompt) == pytest.approx(wanted[1], abs=1e-5)
    assert rate(talks, str(prompt)) == pytest.approx(wanted[1], abs=1e-5)
    assert abs(wanted[0] - wanted[1]) > 1e-3


def test_a_conversation_goes_through_the_likelihood_models_template(tmp_path):
    folders = two_copies(HERE.parent / "qwen3", tmp_path)
    talks, plain = (load_reward(str(folder)) for folder in folders)
    rate = lambda reward, prompt: rewards_of(reward, [prompt], ["sky"], skip=False)[0]
    found = rate(talks, conversation("as another model says it"))
    assert found == pytest.approx(rate(plain, "user: the sun\n>"), abs=1e-5)
    assert abs(found - rate(plain, "as another model says it")) > 1e-3


def test_prompts_of_a_file_bring_their_conversation_to_the_reward(tmp_path):
    talks, _ = two_copies(HERE.parent / "qwen3", tmp_path)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": ASKED}) + "\n" + json.dumps({"prompt": "the moon"}) + "\n")
    reader = reader_of(load_model(talks), 4, place=False)
    asked, told = load_prompts(str(file), None, None, reader).take(np.arange(2)).texts
    assert (asked, asked.messages) == ("user: the sun\n>", ASKED)
    assert (told, told.messages) == ("the moon", None)


def spoiled(folder, change):
    copy = Path(shutil.copytree(HERE / "qwen3", folder / "copy"))
    spec, tensors = json.loads((copy / "config.json").read_text()), load_file(copy / "model.safetensors")
    change(spec, tensors)
    (copy / "config.json").write_text(json.dumps(spec))
    save_file(tensors, copy / "model.safetensors")
    return copy


BAD = {
    "two labels": (
        lambda spec, t: t.update({"score.weight": np.repeat(t["score.weight"], 2, 0)}),
        "score.weight: has shape [2, 16]; a reward model has one label",
    ),
    "no output": (lambda spec, t: t.pop("score.weight"), "tensor score.weight: missing"),
    "unknown": (
        lambda spec, t: spec.update(architectures=["BertForSequenceClassification"]),
        "unknown reward model 'BertForSequenceClassification'",
    ),
    "no norm": (lambda spec, t: t.pop("model.norm.weight"), "tensor model.norm.weight: missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_said(case, tmp_path):
    change, message = BAD[case]
    folder = spoiled(tmp_path, change)
    with pytest.raises(CheckpointError) as error:
        load_reward_model(folder)
    assert message in str(error.value) and str(folder) in str(error.value)
    with pytest.raises(RunError) as error:
        load_reward(str(folder))
    assert message in str(error.value)
