"""The `fusedattn` command: `fusedattn env` and `fusedattn bench`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, environment

_BENCH_NEEDS = ("rich", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default); returns the exit status."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedattn", description="Fused transformer kernels for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"fusedattn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    env = commands.add_parser("env", help="what this machine has, and how to get what is missing")
    env.add_argument("--json", action="store_true", help="print JSON instead of text")
    env.set_defaults(run=_env)

    bench = commands.add_parser(
        "bench",
        help="measure every op against its peers, and train transformers side by side",
        description="Measure attention, its options, the norms, softmax and positional encodings "
        "against their peers, then train the reference transformers plain and fused. Writes JSON, "
        "CSV and plots, and prints tables.",
    )
    size = bench.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        action="store_true",
        help="a subset with every regime in it, in about nine minutes (the default on a CPU; a GPU "
        "has a grid of its own: bf16, 16k tokens, lengths 512 to 16k, each pass by itself)",
    )
    size.add_argument(
        "--full",
        action="store_true",
        help="the whole grid, with torch.compile and FlexAttention for every shape; takes an hour "
        "or more",
    )
    parts = ("attention", "rowwise", "options", "transformer", "models", "host")
    bench.add_argument("--only", choices=parts, help="run one part alone")
    bench.add_argument(
        "--output",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="where results.json, the CSV files and the plots go (default: %(default)s)",
    )
    bench.add_argument("--seed", type=int, default=0, help="of all random inputs (default: 0)")
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    bench.set_defaults(run=_bench)
    return parser


def _env(arguments: argparse.Namespace) -> int:
    found = environment.collect()
    try:
        print(json.dumps(found, indent=1) if arguments.json else environment.as_text(found))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        # Python flushes once more on its way out: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    missing = [name for name in _BENCH_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'fusedattn bench needs {" and ".join(missing)}: pip install "fusedattn[bench]"',
            file=sys.stderr,
        )
        return 2
    from .benchmarks import suite

    try:
        plan = suite.make_plan(
            arguments.device,
            quick=arguments.quick,
            full=arguments.full,
            seed=arguments.seed,
            only=arguments.only,
        )
        arguments.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"fusedattn bench: {error}", file=sys.stderr)
        return 2
    suite.run(plan, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
