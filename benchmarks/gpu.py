"""Everything that needs an accelerator, in one call and one table: training, decoding, and the tests marked gpu.

python benchmarks/gpu.py                 # on the first device; --json appends a line to benchmarks/results/gpu.jsonl
python benchmarks/gpu.py --only train    # or decode, tests
python benchmarks/gpu.py --tiny          # a toy model, to see that it works: on a CPU too

Training: bfloat16 with float32 master weights and AdamW; of the batch sizes that fit, with and without recomputing
layers, the fastest counts. Model-FLOP utilization is the operations the model asks for (runs/plan/flops, recomputation
not counted) over wall time and the chip's peak. Decoding: bfloat16; the bound is the time the chip needs to read all
weights that a token uses, and the cache written so far, once per token. The first tokens and the prompt are subtracted.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine import provenance
from engine_table import Row, table

HERE = Path(__file__).parent
MFU, BANDWIDTH = 0.45, 0.50
PARTS = ("tests", "train", "decode")


class Chip(NamedTuple):
    """Dense bfloat16 operations per second and bytes per second of the main memory."""

    flops: float
    bandwidth: float


# By the beginning of jax's device_kind, longest match first. Sources: NVIDIA's data sheets of the A100, H100, H200 and
# L4 (dense figures, half of those "with sparsity"); cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture".
CHIPS = {
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1.555e12),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 1.935e12),
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 3.35e12),
    "NVIDIA H100 PCIe": Chip(756e12, 2.0e12),
    "NVIDIA H100 NVL": Chip(835e12, 3.9e12),
    "NVIDIA H200": Chip(989.4e12, 4.8e12),
    "NVIDIA L4": Chip(121e12, 0.3e12),
    "TPU v4": Chip(275e12, 1.228e12),
    "TPU v5 lite": Chip(197e12, 0.819e12),
    "TPU v5e": Chip(197e12, 0.819e12),
    "TPU v5": Chip(459e12, 2.765e12),
    "TPU v6 lite": Chip(918e12, 1.64e12),
    "TPU v6e": Chip(918e12, 1.64e12),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes."""

    model: str = "1b"  # of kl_rl.runs.plan: 1.10 billion parameters
    length: int = 2048
    batches: tuple[int, ...] = (16, 8, 4, 2, 1)
    remat: tuple[bool, ...] = (False, True)
    steps: int = 10
    decode_batch: int = 64
    prompt: int = 128
    new: int = 512
    repeats: int = 3
    seed: int = 0


TINY = Config(
    model="tiny", length=32, batches=(2,), remat=(True,), steps=2, decode_batch=4, prompt=4, new=8, repeats=1
)


def find_chip(kind: str) -> Chip | None:
    """Peaks of a device kind, None if it is not in the table."""
    names = [
        name for name in CHIPS if kind == name or kind.startswith(name + " ") or kind.startswith(name + "-")
    ]
    exact = kind if kind in CHIPS else max(names, key=len, default="")
    return CHIPS.get(exact)


def _out_of_memory(error: Exception) -> bool:
    return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory"))


def train_step(config: Config, batch: int, remat: bool) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """A step ``(state, ids) -> (state, loss)`` and what makes the first state."""
    import jax
    import jax.numpy as jnp
    import optax

    from kl_rl.models import Execution, init_weights, packed_log_probs
    from kl_rl.runs.plan import read_model

    shape, optimizer = read_model(config.model), optax.adamw(1e-4)
    flash = "cudnn" if jax.devices()[0].platform == "gpu" else None
    # Logits of the whole batch where layers are kept, of parts of it where memory is short.
    rows = 4096 if remat else batch * config.length
    how = Execution(
        "bfloat16", scan_layers=True, remat=remat, attention=flash, chunk_rows=rows, chunk_vocab=shape.vocab
    )

    def loss(weights, ids):
        return -jnp.mean(packed_log_probs(shape, how, weights, ids))

    def step(state, ids):
        value, grads = jax.value_and_grad(loss)(state[0], ids)
        updates, optimizer_state = optimizer.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), optimizer_state), value

    def begin():
        weights = init_weights(jax.random.key(config.seed), shape)
        return weights, optimizer.init(weights)

    return jax.jit(step, donate_argnums=0), jax.jit(begin)


def time_training(config: Config, batch: int, remat: bool) -> dict[str, Any] | None:
    """Seconds a step (median) and operations of a step; None if it does not fit into memory."""
    import jax

    from kl_rl.runs.plan import Setting, read_model
    from kl_rl.runs.plan.flops import forward_flops

    step, begin = train_step(config, batch, remat)
    shape = read_model(config.model)
    ids = jax.random.randint(jax.random.key(1), (batch, config.length + 1), 0, shape.vocab)
    try:
        started = time.perf_counter()
        state, loss = step(begin(), ids)
        jax.block_until_ready(loss)
        first, times = time.perf_counter() - started, []
        for _ in range(config.steps):
            started = time.perf_counter()
            state, loss = step(state, ids)
            jax.block_until_ready((state, loss))
            times.append(time.perf_counter() - started)
    except jax.errors.JaxRuntimeError as error:
        if _out_of_memory(error):
            return None
        raise
    row = Setting(
        batch=batch, prompt_length=1, horizon=config.length, num_samples=1
    )  # a row of length + 1 ids
    return {
        "batch": batch,
        "remat": remat,
        "seconds": statistics.median(times),
        "min_seconds": min(times),
        "first_step": first,
        "flops": 3 * forward_flops(shape, row),
        "loss": float(loss),
    }


def train(config: Config, chip: Chip | None) -> tuple[list[Row], dict[str, Any]]:
    """Model-FLOP utilization of training."""
    tried = []
    for remat in config.remat:
        fits = (found for batch in config.batches if (found := time_training(config, batch, remat)))
        tried += [found] if (found := next(fits, None)) else []
    if not tried:
        return [Row("training", "no batch size fits into the device's memory", f">= {MFU:.0%}", False)], {}
    rows, best = [], 0.0
    for one in tried:
        rate = one["flops"] / one["seconds"]
        used = rate / chip.flops if chip else None
        best = max(best, used or 0.0)
        share = "peak unknown" if used is None else f"{used:.1%} of the peak"
        kept = "recomputed" if one["remat"] else "kept"
        text = "{:.3f} s a step, {:.1f} TFLOP/s, {:.0f} tokens/s, first step {:.1f} s".format(
            one["seconds"], rate / 1e12, one["batch"] * config.length / one["seconds"], one["first_step"]
        )
        rows.append(Row(f"training, batch {one['batch']}, layers {kept}", f"{share}: {text}"))
    if chip:
        rows.append(Row("training, best", f"{best:.1%} of the peak", f">= {MFU:.0%}", best >= MFU))
    return rows, {"train": tried, "mfu": best if chip else None}


def decode_bytes(config: Config) -> tuple[int, float]:
    """Bytes of the weights that a token uses, and of the cache that it reads on average; bfloat16."""
    from kl_rl.models import count_parameters
    from kl_rl.runs.plan import read_model

    shape = read_model(config.model)
    looked_up = 0 if shape.tied else (shape.vocab + shape.extra) * shape.width
    per_token = 2 * shape.layers * shape.attention.kv_heads * shape.attention.head_dim
    length = config.prompt + config.new / 2
    return 2 * (count_parameters(shape) - looked_up), 2.0 * per_token * config.decode_batch * length


def decode(config: Config, chip: Chip | None) -> tuple[list[Row], dict[str, Any]]:
    """Seconds a token against what reading weights and cache takes."""
    import jax
    import jax.numpy as jnp

    import kl_rl
    from kl_rl.models import Execution, decoder_policy, init_weights
    from kl_rl.runs.plan import read_model

    shape = read_model(config.model)
    weights = jax.jit(lambda key: init_weights(key, shape, jnp.bfloat16))(jax.random.key(config.seed))
    policy = decoder_policy(shape, weights, Execution("bfloat16"))
    prompt = jax.random.randint(jax.random.key(2), (config.decode_batch, config.prompt), 0, shape.vocab)

    def seconds(new: int) -> float:
        run = jax.jit(functools.partial(kl_rl.generate, num_samples=1, horizon=new))
        jax.block_until_ready(run(policy, jax.random.key(0), prompt))
        times = []
        for i in range(config.repeats):
            started = time.perf_counter()
            jax.block_until_ready(run(policy, jax.random.key(i), prompt))
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    whole, first = seconds(config.new), seconds(1)
    step, (of_weights, of_cache) = (whole - first) / (config.new - 1), decode_bytes(config)
    read = (of_weights + of_cache) / step
    share = read / chip.bandwidth if chip else None
    text = (
        f"{step * 1e3:.2f} ms a token of {config.decode_batch} rows, {config.decode_batch / step:.0f} tokens/s, "
        f"{read / 1e9:.0f} GB/s of {of_weights / 1e9:.2f} GB weights and {of_cache / 1e9:.2f} GB cache; "
        f"prompt and first token {first:.3f} s"
    )
    text = text if share is None else f"{share:.1%} of the bound: {text}"
    row = Row("decoding", text, f">= {BANDWIDTH:.0%}", None if share is None else share >= BANDWIDTH)
    return [row], {
        "decode": {"whole": whole, "first": first, "step": step, "bytes": [of_weights, of_cache]},
        "bandwidth_share": share,
    }


def tests() -> tuple[list[Row], dict[str, Any]]:
    """The numerical tests marked gpu, in a process of their own, before this one takes the device's memory."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    env = os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if " in " in line and any(w in line for w in OUTCOMES)]
    text = lines[-1].strip("= ") if lines else f"pytest ended with status {done.returncode}"
    if done.returncode:
        print(done.stdout[-8000:], done.stderr[-2000:], sep="\n", flush=True)
    met = done.returncode == 0 and "passed" in text
    skipped = done.returncode == 0 and "passed" not in text
    return [Row("numerical tests", text, "pass", None if skipped else met)], {"tests": text}


OUTCOMES = ("passed", "failed", "skipped", "error")


def run(config: Config, parts: tuple[str, ...]) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """Rows and figures of each part."""
    if "tests" in parts:
        yield tests()
    measured = [part for part in parts if part != "tests"]
    if not measured:
        return
    import jax

    device = jax.devices()[0]
    chip = find_chip(device.device_kind)
    about = f"{device.device_kind}, jax {jax.__version__}"
    about += "" if chip else ": its peaks are not in the table, so there is nothing to compare with"
    yield [Row("device", about)], {"device": device.device_kind, "jax": jax.__version__}
    for part in measured:
        yield {"train": train, "decode": decode}[part](config, chip)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = TINY if args.tiny else Config()
    rows: list[Row] = []
    figures = provenance() | {"config": dataclasses.asdict(config)}
    for some, found in run(config, tuple(p for p in PARTS if p in args.only)):
        rows += some
        figures |= found
    print(table(rows))
    if args.json:
        with open(HERE / "results" / "gpu.jsonl", "a") as file:
            file.write(json.dumps(figures, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
