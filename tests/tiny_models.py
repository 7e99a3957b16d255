"""Tiny random models and a tokenizer for them, so that tests need no network and no minute.

The models have what makes real ones hard to quantise: norm weights that are not 1, and a few channels that are many
times larger than the rest.
"""

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 128


def tiny_llama(
    *,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int = 96,
    layers: int = 2,
    vocab: int = VOCAB,
    bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A random Llama in eval mode; the same arguments give the same weights. The global random state is left alone."""
    config = LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        vocab_size=vocab,
        attention_bias=bias,
        mlp_bias=mlp_bias,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * torch.randn(weight.shape))
                weight[torch.randperm(len(weight))[:2]] *= 8  # channels that are large in every token
            elif name.endswith("bias"):
                weight.copy_(0.1 * torch.randn(weight.shape))
            else:
                weight.copy_(torch.randn(weight.shape) * weight.shape[1] ** -0.5)
                if name.endswith("up_proj.weight"):
                    weight[torch.randperm(len(weight))[:2]] *= 10  # large inputs of down_proj
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the first 125 ASCII characters, then `<unk>`, `<s>` and `</s>`: 128 in all."""
    vocab = {chr(code): code for code in range(VOCAB - 3)}
    vocab |= {"<unk>": VOCAB - 3, "<s>": VOCAB - 2, "</s>": VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
