"""Weights & Biases: a key, and a way to the server. Only asks; sends nothing, and never shows the key."""

import netrc
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from alexnet_ddp.config import LoggerConfig, Wandb
from alexnet_ddp.doctor.finding import Finding, Level

_REACH_S = 3.0


def judge_wandb(cfg: LoggerConfig) -> Finding:
    """Rank 0 sends. Without a key or a way a run goes offline and on, so this is never worse than a warning."""
    mode = os.environ.get("WANDB_MODE", cfg.wandb.value).lower()
    if cfg.wandb is not Wandb.online or mode != "online":
        return Finding("wandb", mode if cfg.wandb is Wandb.online else cfg.wandb.value, "nothing")
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or "api.wandb.ai"
    needed = f"a key, and a way to {host}"
    remedy = "logger.wandb=offline, and wandb sync afterwards"
    if not has_key(host):
        return Finding("wandb", "no key", needed, Level.warn, f"wandb login, or {remedy}")
    try:
        with socket.create_connection(
            (host, server.port or (80 if server.scheme == "http" else 443)), _REACH_S
        ):
            return Finding("wandb", f"a key, and {host} answers", needed)
    except OSError as error:
        return Finding("wandb", f"{host} does not answer ({error})", needed, Level.warn, remedy)


def has_key(host: str) -> bool:
    """In the environment, or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return (
            netrc.netrc(os.environ.get("NETRC", Path.home() / ".netrc")).authenticators(host)
            is not None
        )
    except (OSError, netrc.NetrcParseError):
        return False
