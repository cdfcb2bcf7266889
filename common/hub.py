"""Check a model's name, and that the Hugging Face hub answers: one line within seconds, if not."""

import os
import pathlib
import socket
import threading
import urllib.parse

from common.errors import UserError

SECONDS = 2.0


def check_model_name(name, flag="--model"):
    """Raise UserError where a name is neither a folder that is there nor a name on the hub."""
    folder = pathlib.Path(name)
    path_like = folder.is_absolute() or str(name).startswith(".") or len(folder.parts) != 2
    if not folder.is_dir() and (path_like or folder.parent.is_dir()):
        raise UserError(
            f"{flag} {name}: no such folder; "
            "give a Hugging Face model folder or a hub name such as Qwen/Qwen3-0.6B"
        )


def check_network(what, name, kind="model", needed="config.json"):
    """UserError unless the hub answers, or what it would be asked for lies in its cache."""
    from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache

    if kind == "model" and isinstance(try_to_load_from_cache(name, needed), str):
        return
    if kind == "dataset" and os.path.isdir(constants.HF_HUB_CACHE):
        if any(repo.repo_id == name for repo in scan_cache_dir().repos):
            return
    proxies = [v for v in os.environ if v.lower() in ("https_proxy", "all_proxy")]
    if proxies:  # which answers for the hub
        return
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable()
    if reason:
        raise UserError(
            f"{what}: no such folder, and the hub cannot be asked ({reason}); name a folder, or "
            "connect to the network"
        )


def _unreachable():
    """Why the hub does not answer within SECONDS, names looked up included; None: it does."""
    from huggingface_hub import constants

    address = urllib.parse.urlparse(constants.ENDPOINT)
    port, outcome = address.port or (443 if address.scheme == "https" else 80), []

    def ask():
        try:
            socket.create_connection((address.hostname, port), SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(f"{address.hostname}: {error}")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return outcome[0] if outcome else f"{address.hostname}: no answer in {SECONDS:g} s"
