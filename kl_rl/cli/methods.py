"""``kl-rl methods``: what is known about each method, from its card."""

from __future__ import annotations

import argparse
import json

from kl_rl.cli.parsing import Subparsers, add_command

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
The methods, from their cards: idea, formula, what a batch must be, the knob, the options, the fixed point and what it
costs (KL(q||p0) = P + S + C, in nats, computed from the fixed point in a world of 27 strings), the paper.
P: the least KL that buys the mean reward; S: what the shape of the rewards costs beyond it; C: calibration loss.
"""
EXAMPLES = """\
examples:
  kl-rl methods                      one line each
  kl-rl methods grpo                 one card; a family's name gives all its cards
  kl-rl methods mymodule:MY_METHOD   a card of your own
  kl-rl methods dpo --bibtex         its paper
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add ``methods`` to the commands."""
    parser = add_command(subparsers, run, "methods", "what is known about each method", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "name", metavar="NAME", nargs="*", help="method, family or module:NAME (default: all)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the cards as a JSON array")
    form.add_argument("--bibtex", action="store_true", help="print the papers as BibTeX")
    form.add_argument("--markdown", action="store_true", help="print the pages of the documentation")


def run(args: argparse.Namespace) -> int:
    """The command.

    Returns:
      0; 2 for an unknown method.
    """
    import jax

    from kl_rl.methods.card import bibtex
    from kl_rl.methods.catalogue import methods_named
    from kl_rl.report import cards

    jax.config.update("jax_enable_x64", True)  # C = 0 is then 0, not 1e-8
    chosen = methods_named(args.name or None)
    if args.json:
        print(json.dumps([cards.card(method) for method in chosen], indent=2, allow_nan=False))
    elif args.bibtex:
        print("\n\n".join(dict.fromkeys(filter(None, map(bibtex, chosen)))))
    elif args.markdown:
        print(cards.page_markdown(chosen), end="")
    elif args.name:
        print("\n\n".join(map(cards.card_text, chosen)))
    else:
        print(
            f"{len(chosen)} methods; KL(q||p0) = P + S + C at the fixed point, nats; kl-rl methods NAME: the card\n"
        )
        print(cards.methods_table(chosen))
    return 0
