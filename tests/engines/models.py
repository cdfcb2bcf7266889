"""Models for the tests of other engines."""

import shutil

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def with_head_size(source, folder, size=32):
    """Write a Qwen3 that computes what `source` computes, with larger attention heads.

    vLLM's attention on a CPU takes heads of 32 numbers and more; the shipped model has 24. Rotary
    embedding turns the pairs (i, i + d/2) with frequencies theta^(-2i/d): the halves keep their
    places, and theta becomes theta^(size/d). The root mean square over `size` numbers, d of them
    not 0, is sqrt(d/size) as large, and scores are divided by sqrt(size): k_norm makes up for both.
    """
    old = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source)
    d, config.head_dim = config.head_dim, size
    rope = dict(config.rope_parameters)
    rope["rope_theta"] **= size / d
    config.rope_parameters = rope
    new = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    places = torch.cat([torch.arange(d // 2), torch.arange(d // 2) + size // 2])
    state = {name: larger(name, w, d, size, places) for name, w in old.state_dict().items()}
    new.load_state_dict(state)
    new.generation_config = old.generation_config
    new.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    if (source / "chat_template.jinja").is_file():
        shutil.copy(source / "chat_template.jinja", folder)
    return old, new


def larger(name, w, d, size, places):
    """Return one weight with heads of `size` numbers instead of d."""
    if name.endswith("q_norm.weight"):
        return torch.ones(size).index_copy(0, places, w)
    if name.endswith("k_norm.weight"):
        return torch.ones(size).index_copy(0, places, w * (d / size) ** 0.5)
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        wide = torch.zeros(len(w) // d, size, w.shape[1])
        return wide.index_copy(1, places, w.view(-1, d, w.shape[1])).flatten(0, 1)
    if name.endswith("o_proj.weight"):
        wide = torch.zeros(w.shape[0], w.shape[1] // d, size)
        return wide.index_copy(2, places, w.view(w.shape[0], -1, d)).flatten(1)
    return w
