"""Runners of the caption encoder's codebook: append, merge by importance, search."""

from collections.abc import Callable

from golden.harness import Case, Report, backends, runner

from spikecore import layers
from spikecore.ops import codebook_lookup, codebook_lookup_ref

backends["codebook_lookup"] = {"cpu": codebook_lookup, "ref": codebook_lookup_ref}

ENCODER = (
    "WenhuiHua-com/Dual-Efficient-Spiking-Neural-Network-Vision-Encoder-for-Partitioned-VLM-Edge-Cloud-Co-Inference"
)


@runner(ENCODER, "test_spike_caption.py", "CodeBook", op="codebook_lookup")
def merging_codebook(case: Case, lookup: Callable) -> Report:
    """`published=True`, its look-ups by the backend's operator."""
    want, report = case.tensors, Report()
    book = layers.MergingCodebook(case.config["size"], case.config["dim"], published=True)
    original, layers.codebook_lookup = layers.codebook_lookup, lookup
    try:
        for i, step in enumerate(case.data["steps"]):
            book.add(want[f"add{i}.tokens"], want[f"add{i}.importance"])
            report.counts(f"rows after add {i}", len(book), step["rows"])
            report.values(f"book after add {i}", book.book, want[f"add{i}.book"])
            report.values(f"weights after add {i}", book.weights[: len(book)], want[f"add{i}.weights"])
        report.spikes(book.search(want["query"]), want["search_visual"])
        # The published search leaves out the class token, the first.
        report.values("search", book.decode(want["indices"].squeeze(0)[1:]), want["search"])
    finally:
        layers.codebook_lookup = original
    return report
