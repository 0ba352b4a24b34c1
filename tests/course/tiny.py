"""A model for the exercises, the same on every machine: its weights are sines, not random numbers."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def tiny_model() -> Qwen2ForCausalLM:
    """Two layers, 23 tokens, in eval mode."""
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=False, eos_token_id=2))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" not in name:
                places = torch.arange(parameter.numel()).double()
                parameter.copy_((0.6 * torch.sin(0.7 + 1.3 * i + places * places * 0.11)).view_as(parameter))
    return model.eval()
