"""Runners of EC-SNN's pruning: silent shares, kept filters, the smaller network's weights."""

import itertools

import torch
from golden.harness import Case, Report, probe, runner
from golden.models import state_of
from torch import nn

from spikecore.edge.prune import measure_apoz, prune, select_filters
from spikecore.models import ECSNN, ecsnn


@runner("AmazingDD/EC-SNN", "ecsnn.py", "the -prune branch (APoZ, filter selection, rebuilt net)")
def apoz(case: Case, _: None) -> Report:
    config, report = case.config, Report()
    layers, hidden = ecsnn.ARCHITECTURES[config["arch"]]
    model = ECSNN(
        layers, hidden, img_size=(config["img_height"], config["img_width"]), spiking=config["act"] == "snn",
        T=config["T"], in_chans=config["input_dim"], num_classes=config["num_cls"],
    )  # fmt: skip
    model.load_state_dict(state_of(case))
    x, bounds = case.input("x"), case.config["chunk_bounds"]
    y = torch.arange(len(x)) % 3  # which classes the samples have changes nothing
    batches = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(bounds)]
    got = measure_apoz(model, batches, published_quirks=True).of([0, 1, 2])
    keep = select_filters(got, config["apoz_threshold"], config["min_f"])
    small = prune(model, keep, config["p_num_cls"], published_quirks=True)

    for layer, (shares, filters) in enumerate(zip(got, keep, strict=True)):
        report.values(f"apoz.{layer}", shares, case.tensors[f"apoz.{layer}"])
        kept = torch.zeros(len(shares), dtype=torch.uint8).index_fill_(0, torch.tensor(filters), 1)
        report.counts(f"keep.{layer}", int((kept != case.tensors[f"keep.{layer}"]).sum()), 0)
    state = small.state_dict()
    for key, want in case.data["new_weight_stats"].items():
        assert list(state[key].shape) == want["shape"], key
        if f"new_weight.{key}" in case.tensors:
            report.counts(key, int((state[key] != case.tensors[f"new_weight.{key}"]).sum()), 0)
        report.values(f"norm of {key}", state[key].double().norm(), torch.tensor(want["norm"]).double())
        dot = torch.tensor(probe(state[key], case.data["case_seed"], f"new:{key}"), dtype=torch.double)
        report.values(f"dot of {key}", dot, torch.tensor(want["dot"]).double())
    layers = [m for m in small.conv_fc if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    want_layers = [entry["shape"] for entry in case.data["new_structure"] if entry["shape"]]
    assert [list(m.weight.shape) for m in layers] == want_layers
    assert len(small.conv_fc) == len(case.data["new_structure"])
    return report
