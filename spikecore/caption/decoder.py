"""BLIP's text decoder behind a spiking encoder: codes of an image's tokens, their vectors, words.

Papers: Li et al., "BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and
Generation", ICML 2022. The decoder is the transformers library's, whose numbers are those of BLIP's own code.
Encoder and code book: `spikecore.models.SDTCaption`, `spikecore.layers.MergingCodebook`; origin of this way to caption:
github.com/WenhuiHua-com/Dual-Efficient-Spiking-Neural-Network-Vision-Encoder-for-Partitioned-VLM-Edge-Cloud-Co-Inference.

::

    decoder = create_decoder("model_base_capfilt_large.pth")
    tokenizer = create_tokenizer("vocab.txt")               # of bert-base-uncased
    texts = caption(images, encoder, book, decoder, tokenizer)
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikecore.models import SDTCaption, load_checkpoint

try:
    from transformers import BertTokenizer, BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel
except ImportError as e:
    raise ImportError(f'caption: {e.name} is missing; pip install "spikecore[caption]"') from e

__all__ = ["caption", "create_decoder", "create_tokenizer", "generate"]

HEAD = "cls.predictions."
PAD, EOS, DEC = 0, 102, 30522  # [PAD], [SEP] of BERT's vocabulary, and [DEC], which begins a caption


def create_decoder(checkpoint: str | os.PathLike | None = None, **settings: Any) -> BlipTextLMHeadModel:
    """BLIP's decoder, in evaluation mode: 12 layers of width 768 with cross attention to states of width 768.

    Args:
        checkpoint: weights of BLIP as its authors saved them, or of the library; what is not of the decoder is left
            out. None: random weights.
        settings: of transformers' `BlipTextConfig`, over BLIP's own.

    Raises:
        ValueError: weights that do not fit, each named.
    """
    config = {
        "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512, "bos_token_id": DEC,
        "eos_token_id": EOS, "sep_token_id": EOS, "pad_token_id": PAD, "label_smoothing": 0.1, "is_decoder": True,
    }  # fmt: skip
    decoder = BlipTextLMHeadModel(BlipTextConfig(**{**config, **settings})).eval()
    if checkpoint is not None:
        load_checkpoint(decoder, checkpoint, _decoder_alone)
    return decoder


def _decoder_alone(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Of a whole BLIP or a decoder; files of the library leave out what is the same tensor as another."""
    prefix = "text_decoder."
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state
    state = {k: v for k, v in state.items() if not k.endswith(".position_ids")}
    for twin, name in (("decoder.weight", "bert.embeddings.word_embeddings.weight"), ("decoder.bias", f"{HEAD}bias")):
        if name in state:
            state.setdefault(HEAD + twin, state[name])
    return state


def create_tokenizer(vocabulary: str | os.PathLike) -> BertTokenizer:
    """BERT's tokenizer, lower case, with BLIP's two more tokens behind the vocabulary: [DEC] and [ENC].

    Args:
        vocabulary: ``vocab.txt`` of bert-base-uncased, a word each line.

    Raises:
        FileNotFoundError: no such file.
    """
    if not os.path.isfile(vocabulary):
        raise FileNotFoundError(f"create_tokenizer: there is no file {vocabulary}")
    tokenizer = BertTokenizer(os.fspath(vocabulary))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


@torch.no_grad()
def generate(
    decoder: BlipTextLMHeadModel, states: Tensor, prompt: Sequence[int], *, beams: int = 3, max_length: int = 30,
    min_length: int = 10, repetition_penalty: float = 1.0,
) -> Tensor:  # fmt: skip
    """Captions as ids ``[B, L]``, the prompt in front, filled up with the pad id; by beam search without sampling.

    Args:
        states: ``[B, N, width]``, what the decoder attends to.
        prompt: ids that every caption begins with.
        beams: 1: the likeliest word each time.
        max_length, min_length: of a caption with its prompt, in ids.
    """
    config = decoder.config
    ids = torch.tensor([*prompt], device=states.device).expand(len(states), -1)
    return decoder.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=states, num_beams=beams,
        max_length=max_length, min_length=min_length, repetition_penalty=repetition_penalty, do_sample=False,
        eos_token_id=config.sep_token_id, pad_token_id=config.pad_token_id,
    )  # fmt: skip


@torch.no_grad()
def caption(
    images: Tensor, encoder: SDTCaption, book: Tensor, decoder: BlipTextLMHeadModel, tokenizer: BertTokenizer, *,
    prompt: str = "a picture of ", **settings: Any,
) -> list[str]:  # fmt: skip
    """A text for each image, without the prompt.

    Args:
        images: as the encoder takes them; the published one: 224 x 224, normalised as CLIP's.
        encoder: in evaluation mode; its code of the mean token is left out.
        book: vectors ``[K, width]`` of the encoder's codes, such as ``codebook.book``.
        prompt: what the decoder is to continue.
        settings: of `generate`.

    Raises:
        ValueError: a book of another size than the encoder's codes and the decoder's states need.
    """
    wanted = [encoder.num_classes, decoder.config.encoder_hidden_size]
    if list(book.shape) != wanted:
        raise ValueError(f"caption: book must be {wanted}, codes by the decoder's states, got {list(book.shape)}")
    states = book[encoder.codes(images)[:, 1:]]
    first = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    texts = tokenizer.batch_decode(generate(decoder, states, first, **settings), skip_special_tokens=True)
    return [text.strip()[len(prompt.strip()) :].strip() for text in texts]
