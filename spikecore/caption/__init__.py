"""Captions from spiking encoders (extra: ``pip install "spikecore[caption]"``)."""

from spikecore.caption.decoder import caption, create_decoder, create_tokenizer, generate

__all__ = ["caption", "create_decoder", "create_tokenizer", "generate"]
