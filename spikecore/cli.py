"""The `spikecore` command: parses, calls, prints."""

import argparse
import ast
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from spikecore._backend import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 after one line of error, 2 for a wrong command line, 130 after Ctrl-C."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if any(x.startswith("-") for x in more) or (more and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # overrides behind an option
        args.overrides += more
    me = f"spikecore: rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "spikecore"
    try:
        return args.run(args)
    except OSError as e:
        print(f"{me}: error: {f'{e.filename}: ' if e.filename else ''}{e.strerror or e}", file=sys.stderr)
        return 1
    except (ImportError, *args.mistakes) as e:
        print(f"{me}: error: {e}", file=sys.stderr)
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

    quickstart = commands.add_parser("quickstart", help="train a small QKFormer on handwritten digits, in a minute")
    quickstart.add_argument("--out", default="runs/quickstart", metavar="FOLDER", help="default: %(default)s")
    quickstart.add_argument(
        "--seeds", type=_positive, default=1, metavar="N", help="train seeds 0 to N - 1; default: 1"
    )
    quickstart.add_argument("--epochs", type=_positive, metavar="N", help="default: the recipe's own")
    quickstart.set_defaults(run=_quickstart)

    recipes = commands.add_parser("recipes", help="the table of recipes: model, data, epochs, published accuracy")
    recipes.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as 'qkformer*'; default: all")
    recipes.set_defaults(run=_recipes, mistakes=(ValueError,))

    train = commands.add_parser("train", help="train a recipe; also under torchrun --nproc-per-node N -m spikecore")
    train.add_argument("recipe", metavar="RECIPE", help="a name of `spikecore recipes`, or a YAML file")
    _add_overrides(train)
    train.add_argument("--out", metavar="FOLDER", help="default: runs/RECIPE")
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder, where there is one")
    train.set_defaults(run=_train, mistakes=(ValueError, ArithmeticError))

    test = commands.add_parser("test", help="accuracy, firing rates and energy of trained weights")
    test.add_argument("checkpoint", metavar="CHECKPOINT", help="weights with a card, or the folder of a run")
    _add_overrides(test)
    test.add_argument("--recipe", metavar="RECIPE", help="what weights without a card, such as published ones, are of")
    test.add_argument("--out", metavar="FOLDER", help="also write confusion.png and energy.csv there")
    test.set_defaults(run=_test, mistakes=(ValueError,))

    predict = commands.add_parser("predict", help="classes of images")
    predict.add_argument("checkpoint", metavar="CHECKPOINT", help="as for `spikecore test`")
    predict.add_argument("images", metavar="IMAGE", nargs="+", help="a file, or a folder of them")
    predict.add_argument("--classes", metavar="FILE.json", help="names of the classes; default: those of the card")
    predict.add_argument("--recipe", metavar="RECIPE", help="as for `spikecore test`")
    predict.add_argument("--top", type=_positive, default=5, metavar="N", help="classes to name; default: %(default)s")
    predict.set_defaults(run=_predict, mistakes=(ValueError,))

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


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="of the recipe, such as data.root=DIR epochs=10"
    )


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


def _recipes(args: argparse.Namespace) -> int:
    from spikecore.train.recipe import recipe_table

    print("\n".join(recipe_table(args.pattern)))
    return 0


def _train(args: argparse.Namespace) -> int:
    from spikecore.train.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)  # a mistake in it is said before the heavy imports
    from spikecore.train.loop import train

    _print_lines(train(recipe, args.out or f"runs/{recipe.name}", resume=args.resume))
    return 0


def _test(args: argparse.Namespace) -> int:
    from spikecore.train.evaluate import assess

    _print_lines(assess(args.checkpoint, args.overrides, recipe=args.recipe, out=args.out))
    return 0


def _predict(args: argparse.Namespace) -> int:
    from spikecore.train.evaluate import predict

    _print_lines(predict(args.checkpoint, args.images, classes=args.classes, recipe=args.recipe, top=args.top))
    return 0


def _print_lines(lines: Sequence[str]) -> None:
    if lines:
        print("\n".join(lines))


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
