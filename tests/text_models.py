"""Tiny text encoders with random weights, built where a test needs one, in the folders that transformers writes."""

import json
from pathlib import Path

import pytest
import torch

WORDS = ["a", "b", "cat", "dog", "red", "blue", "on", "the"]
WIDTH = 8


def write_t5(folder: Path, seed: int = 0) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(folder)
    return _write_tokenizer(folder, "</s>", 512)


def write_clip(folder: Path, seed: int = 0) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    config = transformers.CLIPTextConfig(vocab_size=16, max_position_embeddings=7, **sizes, **ends)
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return _write_tokenizer(folder, "</s>", 7)


def _write_tokenizer(folder: Path, end: str, most: int) -> Path:
    """Whole words; the last token of a caption is its end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", end, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=end, unk_token="<unk>", model_max_length=most
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder
