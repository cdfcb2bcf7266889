"""Load a model folder: float32 weights and a tokenizer, or one line that says what is wrong."""

import json
import pathlib

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import internals
from common.attention import install_mask_hook
from common.errors import UserError
from common.hub import check_model_name, check_network
from sampling import vocabulary

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# cuDNN's attention plans anew for every length, which a decoder changes at each step, and since
# torch 2.11 a masked backward of it can return NaN (pytorch issue 196678); flash attention and
# the memory-efficient kernel stay
torch.backends.cuda.enable_cudnn_sdp(False)


def load_config(name):
    """The configuration of a causal language model, or UserError."""
    check_model_name(name)
    folder = pathlib.Path(name)
    if folder.is_dir():
        _check_folder(name, folder)
    if not folder.is_dir():
        check_network(f"--model {name}", str(name))
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # noqa: BLE001 - the library raises many kinds, the hub's among them
        raise UserError(
            f"--model {name}: its configuration cannot be read ({_first_line(error)})"
        ) from error
    names = getattr(config, "architectures", None) or []
    causal = not names or any(n.endswith(("CausalLM", "LMHeadModel")) for n in names)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or not causal:
        raise UserError(
            f"--model {name}: {', '.join(names) or config.model_type} is not a causal language "
            "model; this project trains those only"
        )
    return config


def _check_folder(name, folder):
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"--model {name}: holds a LoRA adapter, not a model; merge it into its base model "
            "(peft: merge_and_unload, then save_pretrained) and name that folder"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {name}: the folder holds no config.json; "
            "give a folder written by save_pretrained"
        )


def load_tokenizer(name):
    wrong = "the folder needs tokenizer.json or the files it is made from"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # noqa: BLE001 - as above
        raise UserError(
            f"--model {name}: its tokenizer cannot be read ({_first_line(error)}); {wrong}"
        ) from error
    if not tokenizer("1").input_ids:  # the library makes an empty one where it finds no files
        raise UserError(
            f"--model {name}: its tokenizer cannot be read (it has no vocabulary); {wrong}"
        )
    if not tokenizer.chat_template:
        print(
            "note: the tokenizer has no chat template; "
            "prompts use the plain form 'Question: ... Answer:'"
        )
    return tokenizer


def load_model(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer). Weights are float32 whatever the folder holds: AdamW at 1e-6 does not
    move bfloat16 weights."""
    load_config(name)
    tokenizer = load_tokenizer(name)
    folder = pathlib.Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(
            f"--model {name}: holds a configuration and no weights (*.safetensors); download or "
            "copy them, too"
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # noqa: BLE001 - as above, and safetensors' own for a damaged file
        raise UserError(
            f"--model {name}: its weights cannot be read ({_first_line(error)})"
        ) from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise UserError(
            f"--model {name}: {len(wrong)} weights are missing or have another shape, "
            f"first {wrong[0]}; they would start at random"
        )
    _check_vocabulary(name, model, tokenizer)
    if not is_tied(model):
        raise UserError(
            f"--model {name}: its configuration ties input and output embeddings, but its files "
            "hold two different tensors; set tie_word_embeddings to false in its config.json"
        )
    model = install_mask_hook(model.to(device))
    try:
        check_logits(model, f"--model {name}")
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything
        raise UserError(
            f"--model {name}: a forward pass fails ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return model, tokenizer


def _check_vocabulary(name, model, tokenizer):
    """Raise UserError where the tokenizer has words that the model does not know.

    Tokens that were added to the tokenizer and lie beyond the embedding are never drawn, and
    fit_context refuses a prompt that holds one.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {i for i in tokenizer.get_vocab().values() if i >= rows}
    if beyond - tokenizer.added_tokens_decoder.keys():
        raise UserError(
            f"--model {name}: the tokenizer has ids up to {vocabulary(tokenizer) - 1}, the model "
            f"knows {rows}; they do not belong together"
        )


def check_logits(model, name):
    """As internals.check_logits, with a UserError."""
    try:
        internals.check_logits(model, name)
    except ValueError as error:
        raise UserError(str(error)) from error


def vocab_size_of(model, tokenizer):
    """Return how many ids can be drawn: those that both tokenizer and embedding have, from 0 on."""
    return min(vocabulary(tokenizer), model.get_input_embeddings().weight.shape[0])


def is_tied(model):
    """Return whether the embeddings are one tensor, where the configuration ties them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    return not tied or embedding.weight is head.weight


def assert_tied(model):
    """Raise AssertionError unless is_tied: after sharding and resume."""
    if not is_tied(model):
        raise AssertionError(
            "the configuration ties input and output embeddings, but they are two tensors"
        )


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def run_config(model):
    """The options of the run in whose folder a model lies (final/ or checkpoint-N/), or None."""
    path = pathlib.Path(model).resolve().parent / "config.json"
    options = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return options if "prompts_per_step" in options else None
