"""The `spikecore` command: parses, calls, prints."""

import argparse
import ast
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

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
    except (ImportError, *args.mistakes) as e:
        print(f"spikecore: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikecore", description="Fused kernels for spiking vision.")
    parser.add_argument("--version", action="version", version=f"spikecore {__version__}")
    parser.set_defaults(mistakes=())  # what a command raises for a mistake of its user
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

    convert = commands.add_parser("convert", help="published weights to safetensors with a JSON card")
    convert.add_argument("checkpoint", metavar="FILE", help="as its authors saved it")
    convert.add_argument("model", metavar="MODEL", help="a name of spikecore.list_models()")
    convert.add_argument("--out", required=True, metavar="FILE.safetensors")
    convert.add_argument("--ema", action="store_true", help="the moving average beside the weights")
    convert.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the model"
    )
    convert.add_argument(
        "--trust-pickle",
        action="store_true",
        help="also read a pickled module: THIS RUNS ANY CODE ITS AUTHOR PUT INTO THE FILE, with your rights",
    )
    convert.set_defaults(run=_convert, mistakes=(ValueError, TypeError))

    events = commands.add_parser("events", help="draw the recording of an event camera")
    events.add_argument("recording", metavar="FILE", help="ATIS .bin, AEDAT 2 to 4, .mat or .npz")
    out = events.add_mutually_exclusive_group(required=True)
    out.add_argument("--png", metavar="FOLDER", help="an image of each frame")
    out.add_argument("--gif", metavar="FILE.gif", help="an animation")
    events.add_argument("--frames", type=_positive, metavar="N", help="default: 16, or with --duration all")
    how = events.add_mutually_exclusive_group()
    how.add_argument(
        "--by",
        choices=["number", "time"],
        default="number",
        help="frames of equal numbers of events or of equal length",
    )
    how.add_argument("--duration", type=_positive, metavar="US", help="frames of this many microseconds")
    events.set_defaults(run=_events, mistakes=(ValueError,))
    return parser


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


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


def _convert(args: argparse.Namespace) -> int:
    from spikecore.models import convert_checkpoint

    if args.trust_pickle:
        print(f"spikecore: {args.checkpoint} may run code of its author, as --trust-pickle allows", file=sys.stderr)
    card = convert_checkpoint(
        args.model, args.checkpoint, args.out, ema=args.ema, trusted=args.trust_pickle, **dict(args.set)
    )
    print(f"{args.out}\n{card}")
    return 0


def _events(args: argparse.Namespace) -> int:
    from spikecore.data import draw

    by = "duration" if args.duration else args.by
    frames = draw.load_frames(args.recording, args.frames or (None if args.duration else 16), by, args.duration)
    if args.png:
        paths = draw.save_pngs(frames, args.png, pathlib.Path(args.recording).stem)
        print(f"{len(paths)} images: {paths[0]} to {paths[-1].name}")
    else:
        print(draw.save_gif(frames, args.gif, *([args.duration / 1000] if args.duration else [])))
    return 0
