"""`spikecore train`: a recipe's epochs, and the files that they leave."""

import contextlib
import csv
import io
import itertools
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spikecore.train.batches import (
    Order,
    eval_batches,
    open_samples,
    plain_worker_errors,
    seed_all,
    seed_of,
    train_batches,
)
from spikecore.train.build import Parts, autocast, build
from spikecore.train.checkpoint import STATE, Progress, load_state, save_state, save_weights, whole
from spikecore.train.evaluate import Evaluation, evaluate
from spikecore.train.figures import draw_confusion, draw_curves
from spikecore.train.files import prepare_folder, replace_file
from spikecore.train.ranks import Ranks, joined
from spikecore.train.recipe import Recipe, RecipeError

try:
    import yaml
    from timm.utils import distribute_bn
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm
except ImportError as e:
    raise ImportError(f'train: {e.name} is missing; pip install "spikecore[train]"') from e

__all__ = ["DivergedError", "train"]


class DivergedError(ArithmeticError):
    """A loss or a weight that is no number; the message says in which update."""


def train(recipe: Recipe, out: str | os.PathLike, *, resume: bool = False) -> list[str]:
    """Train `recipe` and write its files to `out`; returns lines to print.

    The files: recipe.yaml, metrics.csv (a row for each epoch), model.safetensors and best.safetensors with their cards
    (the last and the best epoch's; averages where `model_ema`), curves.png, confusion.png, energy.csv, tensorboard/,
    and state.pt, from which a run that was stopped goes on, to the very weights that it would have had.

    Args:
        resume: go on from the state in `out`, where there is one. So does a run that torchrun starts again.

    Raises:
        RecipeError: what the recipe asks for is not possible.
        DivergedError: the loss is no number any more. The files are those of the last good checkpoint.
        KeyboardInterrupt: Ctrl-C or SIGTERM; alone, a run writes its state first.
        LostRankError: see `spikecore.train.ranks`.
        OSError: `out` cannot be written, or data cannot be read.
    """
    out, started = Path(out), time.perf_counter()
    with joined() as ranks:
        if ranks.main:
            prepare_folder(out)
        ranks.wait()
        state = out / STATE
        resume = (resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0) and state.is_file()
        if state.is_file() and not resume:
            raise RecipeError(f"{out} holds a run already; go on with --resume, or choose another folder with --out")
        samples, tests = open_samples(recipe, training=True), open_samples(recipe, training=False)
        batches, order = train_batches(recipe, samples, ranks)
        parts = build(recipe, ranks, order.updates, samples[0][0])
        progress = load_state(state, recipe, parts, ranks, order.effective) if resume else Progress()
        if ranks.main:
            replace_file(out / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
        run = _Run(recipe, out, ranks, parts, progress, order)
        facts = {"classes": samples.classes, "kind": samples.kind}
        try:
            with plain_worker_errors():
                run.epochs(batches, eval_batches(recipe, tests, ranks), facts)
        except torch.OutOfMemoryError as e:
            raise RecipeError(
                f"{recipe.name}: the GPU's memory is full; with a smaller batch_size an update takes more turns"
            ) from e
        return run.lines(time.perf_counter() - started) if ranks.main else []


class _Run:
    """What all epochs of a run share."""

    def __init__(self, recipe: Recipe, out: Path, ranks: Ranks, parts: Parts, progress: Progress, order: Order) -> None:
        self.recipe, self.out, self.ranks, self.parts = recipe, out, ranks, parts
        self.progress, self.order = progress, order
        self.total = recipe.epochs + recipe.cooldown_epochs

    def epochs(self, batches: DataLoader, tests: DataLoader, facts: dict[str, Any]) -> None:
        recipe, ranks, progress = self.recipe, self.ranks, self.progress
        board = SummaryWriter(str(self.out / "tensorboard"), purge_step=progress.epoch + 1) if ranks.main else None
        done = progress.epoch * self.order.updates + progress.update
        with (
            board or contextlib.nullcontext(),
            tqdm(
                total=self.total * self.order.updates, initial=done, desc=recipe.name, unit="update",
                dynamic_ncols=True, disable=not ranks.main,
            ) as bar,
            _stop_signals(alone=ranks.world == 1) as asked,
        ):  # fmt: skip
            self.order.start(progress.epoch, progress.update, self.total)
            flow = iter(batches)
            while progress.epoch < self.total:
                started = time.perf_counter()
                first = progress.update
                self.epoch(flow, bar, asked)
                seconds = time.perf_counter() - started
                row = self.row(seconds, self.order.updates - first)
                progress.epoch, progress.update, progress.loss, progress.correct, progress.seen = (
                    progress.epoch + 1, 0, 0.0, 0, 0,
                )  # fmt: skip
                self.share_norms()
                if progress.epoch % recipe.val_interval == 0 or progress.epoch == self.total:
                    self.test(tests, row, facts, board)
                    bar.set_postfix_str(f"epoch {progress.epoch}, test {row['test_accuracy']:.2%}")
                progress.rows.append(row)
                self.report(board)
                self.save()

    def epoch(self, flow: Iterator[tuple[Tensor, ...]], bar: tqdm, asked: list[int]) -> None:
        """The epoch's updates from `progress.update` on."""
        recipe, parts, progress, order = self.recipe, self.parts, self.progress, self.order
        parts.net.train()
        parts.scheduler.step(progress.epoch)
        if parts.mixup is not None:
            parts.mixup.mixup_enabled = not 0 < recipe.mixup_off_epoch <= progress.epoch
        while progress.update < order.updates:
            step = progress.epoch * order.updates + progress.update
            parts.scheduler.step_update(step)
            loss = self.step(step, itertools.islice(flow, order.accumulate))
            progress.update += 1
            bar.update()
            bar.set_postfix_str(f"epoch {progress.epoch + 1} of {self.total}, loss {loss:.3f}", refresh=False)
            due = recipe.recovery_interval and progress.update % recipe.recovery_interval == 0
            if asked or (due and progress.update < order.updates):
                self.share_norms()
                self.save()
            if asked:
                raise KeyboardInterrupt

    def step(self, step: int, batches: Iterator[tuple[Tensor, ...]]) -> float:
        """One update of the weights; returns its loss on this rank."""
        recipe, parts, progress, device = self.recipe, self.parts, self.progress, self.ranks.device
        accumulate, mean = self.order.accumulate, 0.0
        for part, (x, y, *ids) in enumerate(batches):
            seed_all(seed_of(recipe.seed, step, part, self.ranks.rank))  # of mixup and dropout
            targets = y
            if parts.mixup is not None:
                x, targets = parts.mixup(x, y)
            x, targets = x.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with parts.synced(part == accumulate - 1):
                with autocast(recipe, device):
                    logits, loss = parts.wrapped(x, targets, **({"ids": ids[0]} if ids else {}))
                value = loss.item()
                if not math.isfinite(value):
                    raise self.diverged(f"the loss is {value}", step)
                parts.scaler.scale(loss / accumulate).backward()
            mean += value / accumulate
            progress.loss += value * len(y)
            labels = targets.argmax(1) if targets.dim() > 1 else targets  # of a mixture: its larger part
            progress.correct += int((logits.argmax(1) == labels).sum())
            progress.seen += len(y)
        if recipe.clip_grad is not None:
            parts.scaler.unscale_(parts.optimizer)
            torch.nn.utils.clip_grad_norm_(parts.objective.parameters(), recipe.clip_grad)
        parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad()
        if parts.ema is not None:
            parts.ema.update(parts.net, step + 1)
        return mean

    def share_norms(self) -> None:
        """One set of running statistics for all ranks."""
        if self.ranks.world > 1:
            for net in (self.parts.net, *([self.parts.ema.module] if self.parts.ema else [])):
                distribute_bn(net, self.ranks.world, self.recipe.dist_bn == "reduce")

    def save(self) -> None:
        step = self.progress.epoch * self.order.updates + self.progress.update
        for name, p in self.parts.net.named_parameters():
            if not bool(torch.isfinite(p.to_local() if hasattr(p, "to_local") else p).all()):
                raise self.diverged(f"{name} holds numbers that are not finite", step - 1)
        save_state(self.out / STATE, self.recipe, self.parts, self.progress, self.ranks, self.order.effective)

    def diverged(self, what: str, step: int) -> DivergedError:
        epoch, update = divmod(step, self.order.updates)
        there = (self.out / STATE).is_file()
        kept = f"{self.out} keeps the last good checkpoint" if there else "there was no checkpoint yet"
        return DivergedError(
            f"{what} in step {step + 1} (epoch {epoch + 1}, update {update + 1} of {self.order.updates}); {kept}; "
            "a lower lr, clip_grad or amp=false may help"
        )

    # ---- what an epoch leaves --------------------------------------------------------------------------------------

    def row(self, seconds: float, updates: int) -> dict[str, float]:
        progress = self.progress
        sums = torch.tensor([progress.loss, progress.correct, progress.seen], dtype=torch.float64)
        loss, correct, seen = self.ranks.sum(sums).tolist()
        return {
            "epoch": progress.epoch + 1,
            "lr": self.parts.optimizer.param_groups[0]["lr"],
            "train_loss": loss / seen,
            "train_accuracy": correct / seen,
            "seconds": seconds,
            "samples_per_s": updates * self.order.effective / seconds,
        }

    def test(self, tests: DataLoader, row: dict[str, float], facts: dict, board: SummaryWriter | None) -> None:
        """The test part into `row`, weights and figures into files."""
        recipe, progress = self.recipe, self.progress
        result = evaluate(self.parts.judged, tests, recipe, self.ranks)
        weights = whole(self.parts.judged.state_dict())
        row |= {
            "test_loss": result.loss, "test_accuracy": result.top1, "test_top5": result.top5,
            "firing_rate": result.firing_rate, "macs": result.energy.macs, "acs": result.energy.acs,
            "energy_uj": result.energy.energy_pj * 1e-6,
        }  # fmt: skip
        better = result.top1 > progress.best
        progress.best = max(progress.best, result.top1)
        if not self.ranks.main:
            return
        if not all(bool(torch.isfinite(v).all()) for v in weights.values()):
            raise self.diverged("the weights are not finite", progress.epoch * self.order.updates - 1)
        entry = {**facts, "epoch": progress.epoch, "metrics": row, "moving_average": recipe.model_ema}
        save_weights(self.out / "model.safetensors", weights, recipe, entry)
        if better:
            save_weights(self.out / "best.safetensors", weights, recipe, entry)
        replace_file(self.out / "confusion.png", draw_confusion(result.confusion, facts["classes"]))
        result.energy.to_csv(self.out / "energy.csv")
        if board is not None:
            self.log_rates(board, result)

    def log_rates(self, board: SummaryWriter, result: Evaluation) -> None:
        for name, rate in result.energy.firing_rates.items():
            board.add_scalar(f"firing_rate/{name}", rate, self.progress.epoch)

    def report(self, board: SummaryWriter | None) -> None:
        """metrics.csv and the scalars after every epoch, curves.png after those that were tested."""
        if board is None:
            return
        rows = self.progress.rows
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.7g}" for k, v in row.items()} for row in rows)
        replace_file(self.out / "metrics.csv", table.getvalue().encode())
        if "test_accuracy" in rows[-1]:
            replace_file(self.out / "curves.png", draw_curves(rows))
        for name, value in rows[-1].items():
            board.add_scalar(name, value, int(rows[-1]["epoch"]))
        board.flush()

    def lines(self, seconds: float) -> list[str]:
        rows = [row for row in self.progress.rows if "test_accuracy" in row]
        best = max(rows, key=lambda row: row["test_accuracy"])
        last = rows[-1]
        return [
            f"test accuracy  {last['test_accuracy']:.2%} after {last['epoch']:.0f} epochs; best "
            f"{best['test_accuracy']:.2%} in epoch {best['epoch']:.0f}",
            f"firing rate    {last['firing_rate']:.1%}; energy {last['energy_uj']:.4g} uJ a sample",
            f"training       {seconds:,.0f} s here, {last['samples_per_s']:,.0f} samples/s in the last epoch",
            f"written        {self.out}/: model.safetensors, best.safetensors, their cards, metrics.csv, curves.png, "
            "confusion.png, energy.csv",
        ]


@contextlib.contextmanager
def _stop_signals(alone: bool) -> Iterator[list[int]]:
    """A list that fills when a run of one process is asked to stop: it ends its update first. A second time stops it at
    once; so does the first where there are several ranks, which would stop in different updates."""
    asked: list[int] = []
    if not alone:
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where no signal arrives
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
