"""What blocks that have a fused form look like."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """What blocks look like: x + attention(norm(x)), then x + down(act(gate) up) of its norm.

    Norms of queries and keys, multipliers, windows and scales of scores are read from the modules and the config.

    Attributes:
        qkv: the linears that write queries, keys and values, in this order.
        gate_up: those that write the gate, then what it multiplies.
        norms: in front of attention and of the MLP.
        after: behind them, before what they give is added to the stream; empty if there are none.
        norm_offset: norms multiply by this plus their weight.
        windowed: every block has the config's sliding window; otherwise those whose attention says so.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str, ...] = ()
    norm_offset: float = 0.0
    windowed: bool = False

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """The linears of every site."""
        out, down = ("self_attn.o_proj",), ("mlp.down_proj",)
        return {"attn_in": self.qkv, "attn_out": out, "mlp_in": self.gate_up, "mlp_mid": down}


FAMILIES = {
    "llama": Family(),
    "mistral": Family(windowed=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "granite": Family(),
    "phi3": Family(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",), windowed=True),
    "gemma3_text": Family(
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        after=("post_attention_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
    ),
}
