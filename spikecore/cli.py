"""The `spikecore` command: parses, calls, prints."""

import argparse
import sys
from collections.abc import Sequence

from spikecore._backend import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 after one line of error, 2 for a wrong command line, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except OSError as e:
        print(f"spikecore: error: {f'{e.filename}: ' if e.filename else ''}{e.strerror or e}", file=sys.stderr)
        return 1
    except ImportError as e:
        print(f"spikecore: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikecore", description="Fused kernels for spiking vision.")
    parser.add_argument("--version", action="version", version=f"spikecore {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="say what is installed and what runs here")
    doctor.set_defaults(run=_doctor)

    quickstart = commands.add_parser("quickstart", help="train a small spiking VGG on handwritten digits, in a minute")
    quickstart.add_argument("--out", default="runs/quickstart", metavar="FOLDER", help="default: %(default)s")
    quickstart.add_argument(
        "--seeds", type=_positive, default=1, metavar="N", help="train seeds 0 to N - 1; default: 1"
    )
    quickstart.add_argument("--epochs", type=_positive, metavar="N", help="default: the recipe's own")
    quickstart.set_defaults(run=_quickstart)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _doctor(args: argparse.Namespace) -> int:
    from spikecore.doctor import doctor_lines

    print("\n".join(doctor_lines()))
    return 0


def _quickstart(args: argparse.Namespace) -> int:
    from spikecore.train.quickstart import quickstart

    outcome = quickstart(args.out, args.seeds, **({"epochs": args.epochs} if args.epochs else {}))
    print("\n".join(outcome.lines))
    return 0 if outcome.finished else 130
