"""Runners of the selective scans: the loop that SNN_Mamba's SS2D is built on."""

from collections.abc import Callable

from golden.harness import Case, Report, backends, runner

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
