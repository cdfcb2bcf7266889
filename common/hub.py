"""Check that the Hugging Face hub can be reached: fail in seconds and with one line, if not."""

import os
import socket
import threading
import urllib.parse

from common.errors import UserError

SECONDS = 2.0


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
