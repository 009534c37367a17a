"""Runner of the caption decoder: states, logits, losses, gradients, captions by greedy and beam search."""

import pytest
import torch
from golden.harness import Case, Report, fill, probe, runner

ENCODER = (
    "WenhuiHua-com/Dual-Efficient-Spiking-Neural-Network-Vision-Encoder-for-Partitioned-VLM-Edge-Cloud-Co-Inference"
)


@runner(ENCODER, "models/med.py", "BertLMHeadModel (med decoder with cross attention)")
def caption_decoder(case: Case, _: None) -> Report:
    pytest.importorskip("transformers")
    from spikecore.caption import create_decoder, generate

    config, want, report = dict(case.config), case.tensors, Report()
    width = config.pop("encoder_width")
    decoder = create_decoder(**config, encoder_hidden_size=width, eos_token_id=2, sep_token_id=2, label_smoothing=0.0)
    state: dict[str, torch.Tensor] = {}
    for entry in case.data["state"]:
        kind, *rest = entry["fill"]
        if kind == "same as":
            state[entry["key"]] = state[rest[0]]
        elif kind != "arange":  # position_ids, which later releases do not keep
            state[entry["key"]] = fill(case.data["case_seed"], entry["key"], entry["shape"], entry["fill"])
    decoder.load_state_dict(state)

    states = want["encoder_hidden_states"].clone().requires_grad_()
    inputs = {"input_ids": want["ids"], "attention_mask": want["attention_mask"]}
    out = decoder(**inputs, encoder_hidden_states=states, labels=want["labels"], output_hidden_states=True)
    out.loss.backward()
    report.values("logits", out.logits, want["logits"])
    report.values("loss", out.loss, want["loss"].squeeze())
    for i, hidden in enumerate(out.hidden_states):
        report.values(f"hidden.{i}", hidden, want[f"hidden.{i}"])
    report.gradients({"states": states.grad}, {"states": want["grad.encoder_hidden_states"]})
    largest = max(entry["norm"] for entry in case.data["grads"].values())
    for name, p in decoder.named_parameters():
        entry = case.data["grads"][name]
        measured = torch.tensor([p.grad.double().norm(), probe(p.grad, case.data["case_seed"], f"grad:{name}")])
        report.gradients({name: measured}, {name: torch.tensor([entry["norm"], entry["dot"]])}, largest)
    with torch.no_grad():
        each = decoder(**inputs, encoder_hidden_states=states, labels=want["labels"], reduction="none").loss
        report.values("loss of each", each, want["loss_reduction_none"])
        text = decoder.bert(**inputs, is_decoder=False).last_hidden_state
        report.values("as an encoder", text, want["encoder_text_mode"])
    for beams in (1, 3):
        ids = generate(
            decoder, states.detach()[:1], want["ids"][0, :3].tolist(), beams=beams, max_length=14, min_length=6
        )
        assert torch.equal(ids, want[f"generate_beams{beams}"]), f"{beams} beams"
    return report
