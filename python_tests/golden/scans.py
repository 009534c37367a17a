"""Runners of the scans: the loop that SNN_Mamba's SS2D is built on, VMamba's cross scan and merge."""

from collections.abc import Callable

from golden.harness import Case, Report, backends, runner

from spikecore.ops import SCANS, cross_merge, cross_scan
from spikecore.testing.cases import CASES

backends["selective_scan"] = {"cpu": CASES["selective_scan"].op, "ref": CASES["selective_scan"].ref}


@runner("para133/SNN_Mamba", "VMamba/SS2D.py", "selective_scan_torch", op="selective_scan")
def selective_scan_torch(case: Case, scan: Callable) -> Report:
    """Rule 4 (nothing spikes) for outputs, rule 3 for gradients."""
    want = case.tensors
    names = [n for n in ("u", "delta", "A", "B", "C", "D", "delta_bias") if n in want]
    leaves = {n: want[n].clone().requires_grad_() for n in names}
    (y,) = scan(**leaves, delta_softplus=case.config["delta_softplus"])
    (y * want["grad_out"]).sum().backward()
    report = Report()
    report.values("y", y, want["out"])
    report.gradients({f"grad.{n}": t.grad for n, t in leaves.items()}, {f"grad.{n}": want[f"grad.{n}"] for n in names})
    return report


@runner("para133/SNN_Mamba", "VMamba/SS2D.py", "cross_scan_fn, cross_merge_fn")
def cross_scan_and_merge(case: Case, _: None) -> Report:
    """Every scans mode and layout: exact forward, gradients up to the order in which directions are added up."""
    want, report = case.tensors, Report()
    H, W = case.config["H"], case.config["W"]
    for mode, codes in enumerate(SCANS):
        for into in ("CHW", "HWC"):
            for out in ("CL", "LC"):
                name = f"scans{mode}_in{into}_out{out}"
                x = case.input(f"x_{into}").requires_grad_()
                scanned = cross_scan(x, codes, channels_last=into == "HWC", out_channels_last=out == "LC")
                scanned.backward(want[f"{name}.scan_grad_out"])
                # Sequences come as maps, [B, K, C, H, W] or [B, H, W, K, C].
                y = case.input("y_CHW" if out == "CL" else "y_HWC").requires_grad_()
                merged = cross_merge(
                    y.flatten(3) if out == "CL" else y.flatten(1, 2), H, W, codes,
                    channels_last=out == "LC", out_channels_last=into == "HWC",
                )  # fmt: skip
                merged.backward(want[f"{name}.merge_grad_out"])
                report.spikes(scanned, want[f"{name}.scan_out"])
                report.values(f"{name}.merge_out", merged, want[f"{name}.merge_out"])
                grads = {"scan_grad_x": x.grad, "merge_grad_y": y.grad}
                report.gradients(grads, {k: want[f"{name}.{k}"] for k in grads})
    return report
