import pytest
import torch

pytest.importorskip("transformers")

from spikecore.caption import caption, create_decoder, create_tokenizer, generate
from spikecore.models import create_model

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "encoder_hidden_size": 12, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 40, "eos_token_id": 3, "sep_token_id": 3, "bos_token_id": 38,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", *(f"w{i}" for i in range(30))]


def decoder(**settings):
    torch.manual_seed(0)
    model = create_decoder(**{**SMALL, **settings})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return create_tokenizer(tmp_path / "vocab.txt")


def test_the_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in create_decoder().parameters()) == 137_881_148


@pytest.mark.parametrize("form", ["whole", "alone", "library"])
def test_weights_of_blip(tmp_path, form):
    model = decoder()
    state = model.state_dict()
    if form == "library":
        del state["cls.predictions.decoder.weight"], state["cls.predictions.decoder.bias"]
    if form == "whole":
        state = {f"text_decoder.{k}": v for k, v in state.items()} | {"visual_encoder.pos_embed": torch.zeros(3)}
        state["text_decoder.bert.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save({"model": state}, tmp_path / "blip.pth")
    got = create_decoder(tmp_path / "blip.pth", **SMALL)
    assert all(torch.equal(v, got.state_dict()[k]) for k, v in model.state_dict().items())
    assert not got.training
    with pytest.raises(ValueError, match=r"blip\.pth does not fit BlipTextLMHeadModel"):
        create_decoder(tmp_path / "blip.pth", **{**SMALL, "num_hidden_layers": 3})


def test_the_tokens_of_blip(tokenizer, tmp_path):
    assert tokenizer.bos_token_id == len(WORDS)
    assert tokenizer.convert_tokens_to_ids("[ENC]") == len(WORDS) + 1
    assert tokenizer("A picture of w3", add_special_tokens=False).input_ids == [5, 6, 7, 11]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        create_tokenizer(tmp_path / "none.txt")


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_captioned_as_its_images_are(beams):
    model, states = decoder(), torch.randn(3, 5, 12)
    together = generate(model, states, [38, 5], beams=beams, max_length=9, min_length=4)
    assert together.shape[0] == 3
    assert (together[:, :2] == torch.tensor([38, 5])).all()
    assert not (together[:, 2:4] == 3).any()  # no end before min_length
    for row, state in zip(together, states, strict=True):
        alone = generate(model, state[None], [38, 5], beams=beams, max_length=9, min_length=4)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert not row[len(alone) :].any()
    assert len({tuple(row.tolist()) for row in together}) > 1  # the states count


def test_captions_of_images(tokenizer):
    encoder = create_model("sdt_caption_test").eval()
    book, images, model = torch.randn(12, 12), torch.rand(2, 3, 32, 32), decoder()
    texts = caption(images, encoder, book, model, tokenizer, max_length=8, min_length=6)
    states = book[encoder.codes(images)[:, 1:]]
    ids = generate(model, states, [len(WORDS), 5, 6, 7], max_length=8, min_length=6)
    known = [[WORDS[i] for i in row if 4 < i < len(WORDS)] for row in ids.tolist()]
    assert texts == [" ".join(words[3:]) for words in known]
    assert all(texts)
    with pytest.raises(ValueError, match=r"book must be \[12, 12\], codes by the decoder's states, got \[11, 12\]"):
        caption(images, encoder, book[:11], model, tokenizer)
