"""The `fusedattn` command: `fusedattn env` and `fusedattn bench`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, environment

_BENCH_NEEDS = ("rich", "matplotlib")
# As the benchmarks have them, which are imported where they run.
OPS = ("layer_norm", "rms_norm", "softmax", "rotary", "sinusoidal", "swiglu")
DTYPES = ("fp32", "bf16", "fp16")
OUTPUT = Path("bench-results")


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
    bench.add_argument(
        "--only",
        choices=(*parts, *OPS),
        metavar="NAME",
        help=f"run one part alone, {', '.join(parts)}, or one op: {', '.join(OPS)}",
    )
    _add_choices_of_cases(bench)
    bench.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="DIR",
        help="where results.json, the CSV files and the plots go (default: %(default)s)",
    )
    bench.add_argument("--seed", type=_seed, default=0, help="of all random inputs (default: 0)")
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    bench.set_defaults(run=_bench)
    return parser


def _add_choices_of_cases(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "--shape",
        type=_shape,
        nargs="+",
        default=(),
        metavar="SHAPE",
        help="the shapes to measure the op of --only in, forward and backward: 4096x32000 for "
        "softmax, 2x12x1024x64 (batch x heads x length x head dim) for attention, full and causal",
    )
    bench.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=(), help="only cases in these dtypes"
    )
    bench.add_argument(
        "--peers",
        nargs="+",
        default=(),
        metavar="PEER",
        help="only these peers: torch, torch.compile, eager, sdpa, flex, onnxruntime, openvino, …; "
        "a wrong name is answered by a list. --dtype and --peers are of what has cases: all but "
        "the models",
    )
    saved = bench.add_argument_group("saved results", "of files, or folders with a results.json")
    saved.add_argument(
        "--show",
        type=Path,
        nargs="?",
        const=OUTPUT,
        metavar="FILE",
        help=f"print the tables of a run again, by default the one in {OUTPUT}; nothing is run",
    )
    saved.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="OLD: compare this run, or the one of --show, with an older one; OLD NEW: those two, "
        "and nothing is run",
    )


def _shape(text: str) -> tuple[tuple[int, ...], ...]:
    """Of each dimension its size, or those of queries and of keys: 1x8x1v4096x128."""
    if not re.fullmatch(r"[0-9]+([xv][0-9]+)*", text):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected whole numbers joined by x, as in 4096x32000"
        )
    shape = tuple(tuple(map(int, part.split("v"))) for part in text.split("x"))
    if not all(map(all, shape)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected sizes of at least 1")
    return shape


def _seed(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 0 to 2**62")
    return int(text)


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
    from .benchmarks import choice, report, suite

    try:
        saved = _saved(arguments, report.read_json)
        plan = None
        if saved["new"] is None:
            plan = suite.make_plan(
                arguments.device,
                quick=arguments.quick,
                full=arguments.full,
                seed=arguments.seed,
                only=arguments.only,
            )
            plan = choice.narrowed(
                plan,
                only=arguments.only,
                shapes=arguments.shape,
                dtypes=arguments.dtype,
                peers=arguments.peers,
            )
            arguments.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"fusedattn bench: {error}", file=sys.stderr)
        return 2
    console = suite.new_console()
    results = suite.run(plan, arguments.output, console) if plan else saved["new"]
    if arguments.show:
        suite.show(results, console)
    if saved["old"]:
        suite.compare(saved["old"], results, console)
    return 0


def _saved(arguments: argparse.Namespace, read: Any) -> dict[str, Any]:
    """The older run to compare with and the newer one that stands for a run, where they are given.

    Raises:
        ValueError: they do not go together, or a file is not the results of a run.
    """
    compared = list(arguments.compare)
    if arguments.show and (clash := _asks_for_a_run(arguments)):
        raise ValueError(f"--show: got it with {clash}, expected --compare at most: nothing is run")
    if len(compared) > 2 or (arguments.show and len(compared) > 1):
        beside = " beside that of --show" if arguments.show else ", or an older and a newer one"
        raise ValueError(f"--compare: got {len(compared)} files, expected one{beside}")
    if len(compared) == 2 and (clash := _asks_for_a_run(arguments)):
        raise ValueError(f"--compare: got two files with {clash}, expected one file to run that")
    named = {"old": ("--compare", compared[0]) if compared else None, "new": None}
    if arguments.show:
        named["new"] = ("--show", arguments.show)
    elif len(compared) == 2:
        named["new"] = ("--compare", compared[1])
    found: dict[str, Any] = {}
    for name, given in named.items():
        try:
            found[name] = given and read(given[1])
        except ValueError as error:
            raise ValueError(f"{given[0]}: {error}") from error
    return found


def _asks_for_a_run(arguments: argparse.Namespace) -> str:
    """The first option that says what to run, or ""."""
    options = ("quick", "full", "only", "shape", "dtype", "peers")
    return next((f"--{name}" for name in options if getattr(arguments, name)), "")


if __name__ == "__main__":
    sys.exit(main())
