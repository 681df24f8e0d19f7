"""``kl-rl sample``: what a model writes."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from kl_rl.cli.parsing import Subparsers, add_command

__all__ = ["add_parser", "run"]

EXAMPLES = """\
examples:
  kl-rl sample --model runs/rlhf --prompt 'O Romeo,' --num 4 --max-tokens 60
  kl-rl sample --model models/qwen --chat --prompt 'Who wrote Hamlet?' --temperature 0.7 --top-p 0.95
  echo 'a longer prompt' | kl-rl sample --model runs/base --prompt -
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add ``sample`` to the commands."""
    parser = add_command(
        subparsers,
        run,
        "sample",
        "let a model write",
        "Sample completions of a prompt; each is printed as soon as it ends.",
        EXAMPLES,
    )
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="Hugging Face folder, or output of a run"
    )
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the prompt; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn in a conversation")
    parser.add_argument("--num", type=int, default=1, metavar="N", help="completions (default 1)")
    parser.add_argument(
        "--max-tokens", type=int, metavar="T", help="longest completion (default: what fits, at most 128)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="only the K most probable tokens (0: all)")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the most probable tokens with mass P")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON object per completion")


def _ids(args: argparse.Namespace, tokenizer: Any) -> list[int]:
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.chat:
        if tokenizer.chat_template is None:
            raise ValueError(f"{args.model}: this tokenizer has no chat template; leave out --chat")
        return tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": text}]))
    ids = tokenizer.encode(text, add_special_tokens=True)
    if not ids:
        raise ValueError("--prompt is empty, and this tokenizer has no begin mark to start from")
    return ids


def _horizon(args: argparse.Namespace, used: int, context: int) -> int:
    room = context - used
    wanted = min(128, room) if args.max_tokens is None else args.max_tokens
    if wanted < 1 or wanted > room:
        raise ValueError(
            f"the prompt has {used} tokens and the model's context {context}: there is room for "
            f"{max(room, 0)} more, not {wanted}; shorten the prompt or --max-tokens"
        )
    return wanted


def run(args: argparse.Namespace) -> int:
    """The command.

    Returns:
      0.
    """
    from kl_rl.cli.allocator import retain_freed_memory
    from kl_rl.cli.cache import use_cache

    if args.num < 1:
        raise ValueError(f"--num must be at least 1; got {args.num}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be at least 0 and less than 2**32; got {args.seed}")
    if args.top_k == 0:  # as elsewhere: all of them
        args.top_k = None
    retain_freed_memory()
    use_cache()
    import jax

    from kl_rl.core.streaming import stream
    from kl_rl.core.transform import Transform
    from kl_rl.huggingface.opened import begin_of, load_model, model_folder
    from kl_rl.runs.prompts import with_place
    from kl_rl.runs.returns import deployed_policy

    model = load_model(args.model)
    ids = _ids(args, model.tokenizer)
    policy = deployed_policy(model_folder(args.model), model.base)
    if policy is not model.base:
        ids = with_place(ids, begin_of(model.tokenizer))
    horizon = _horizon(args, len(ids), model.config.context)
    stop = tuple(end for end in model.tokenizer.end_ids if end < model.config.vocab)
    transform = Transform(args.temperature, args.top_k, args.top_p)
    options = {"num_samples": args.num, "horizon": horizon, "transform": transform, "stop": stop}
    for completion in stream(policy, jax.random.key(args.seed), [ids], **options):
        _show(args, model.tokenizer, completion)
    return 0


def _show(args: argparse.Namespace, tokenizer: Any, completion: Any) -> None:
    text = tokenizer.decode(completion.tokens)
    if args.json:
        row = {
            "sample": completion.sample,
            "text": text,
            "tokens": len(completion.tokens),
            "stopped": completion.stopped,
            "log_prob": float(completion.log_model.sum()),
        }
        print(json.dumps(row), flush=True)
    elif args.num == 1:
        print(text, flush=True)
    else:
        print(f"--- {completion.sample + 1}\n{text}", flush=True)
