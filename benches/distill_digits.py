"""What distillation gives a small spiking student on scikit-learn's digits: the same students, budget and batches, with
a ReLU teacher and without.

    python benches/distill_digits.py --seeds 3

The settings were chosen with ``--held-out --first-seed 10``; the test part gives the table.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikecore.data import Digits, load_digits
from spikecore.models import create_model
from spikecore.train.distill import build_distiller

BATCH, LR = 64, 5e-3
FEATURE = "conv_fc.12"  # the last convolution's activations
TEACHER = {"layers": "64 64 P 128 128 P", "spiking": False, "T": 1, "dropout": 0.2}
STUDENT = {"layers": "8 8 P 16 16 P", "hidden": (32,), "T": 2, "dropout": 0.0}


def criterion(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, label_smoothing=0.1)


def train(
    model: nn.Module, parameters: Iterable[nn.Parameter], loss: Callable[[Tensor, Tensor], Tensor], digits: Digits,
    epochs: int, seed: int,
) -> None:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(digits.y_train) // BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(digits.y_train), generator=random).split(BATCH):
            optimizer.zero_grad()
            loss(digits.x_train[index], digits.y_train[index]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    return float((model.eval()(digits.x_test).argmax(1) == digits.y_test).double().mean())


def run_student(digits: Digits, epochs: int, seed: int, teacher: nn.Module | None, loss: str, alpha: float) -> float:
    torch.manual_seed(seed)
    student = create_model("ecsnn_vgg_test", **STUDENT)
    if teacher is None:
        train(student, student.parameters(), lambda x, y: criterion(student(x), y), digits, epochs, seed)
    else:
        distiller = build_distiller(
            student, criterion, (1, 8, 8), teacher=teacher, loss=loss, alpha=alpha, student_feature=FEATURE,
            teacher_feature=FEATURE,
        )  # fmt: skip
        train(distiller, distiller.parameters(), lambda x, y: distiller(x, y)[1], digits, epochs, seed)
    return accuracy(student, digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15, help="of the students; default: %(default)s")
    parser.add_argument("--loss", default="blurred", choices=("blurred", "mixed", "kdsnn"))
    parser.add_argument("--alpha", type=float, default=1e-2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="test on 360 images of the training part, kept apart")
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    if args.held_out:
        x, y = digits.x_train, digits.y_train
        digits = Digits(x[360:], y[360:], x[:360], y[:360], digits.split_sha256)
    torch.manual_seed(100)
    teacher = create_model("ecsnn_vgg_test", **TEACHER)
    train(teacher, teacher.parameters(), lambda x, y: criterion(teacher(x), y), digits, 30, 100)
    print(f"teacher  {accuracy(teacher, digits):.2%}", flush=True)
    rows: dict[str, list[float]] = {"alone": [], args.loss: []}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        rows["alone"].append(run_student(digits, args.epochs, seed, None, args.loss, args.alpha))
        rows[args.loss].append(run_student(digits, args.epochs, seed, teacher, args.loss, args.alpha))
        print(f"seed {seed}   " + "   ".join(f"{name} {row[-1]:.2%}" for name, row in rows.items()), flush=True)
    for name, row in rows.items():
        spread = f" ± {statistics.stdev(row):.2%}" if len(row) > 1 else ""
        print(f"{name:<8} {statistics.mean(row):.2%}{spread}")


if __name__ == "__main__":
    main()
