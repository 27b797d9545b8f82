"""Secrets stay out of every sink; what is no secret stays readable."""

import logging
import sys

import pytest

from alexnet_ddp import cli
from alexnet_ddp.runtime.redaction import redact, redact_yaml
from alexnet_ddp.tracking.console import PlainConsole

SECRETS = {
    "data.token='CANARY x'": "data.token=***",
    "+AWS_SECRET_ACCESS_KEY=CANARY,CANARY": "AWS_SECRET_ACCESS_KEY=***",
    "secret_key=[a,CANARY]": "secret_key=***",
    "logger={api_key:CANARY,a:1}": "logger={api_key:***,a:1}",
    "could not read {'api_key': 'CANARY'}": "could not read {'api_key': ***}",
    "with dbpassword=CANARY and seed=1": "with dbpassword=*** and seed=1",
    "s3://me:CANARY@host/x": "s3://***@host/x",
    "s3://me:CAN@ARY@host/x": "s3://***@host/x",
    "https://h/x?a=b&sig=CANARY&c=d": "https://h/x?a=b&sig=***&c=d",
    "https://h/x?X-Amz-Signature=CANARY&X-Amz-Credential=CANARY": "https://h/x?X-Amz-Signature=***&X-Amz-Credential=***",
}
HARMLESS = [
    *(
        "checkpoint.keep_last=3",
        "monkey=3",
        "tokenizer=x",
        "data.cache_dir=/x",
        "KeyError: 'x'",
        "write to a@b.c",
    ),
    *(
        "https://host/a@2/x",
        "Key 'api_key' not in 'LoggerConfig'",
        "optimizer.lr=0.1",
        "signal=TERM",
    ),
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_becomes_three_stars_and_the_rest_stays(text):
    assert redact(text) == SECRETS[text]
    assert redact([{"overrides": [text]}]) == [{"overrides": [SECRETS[text]]}]


@pytest.mark.parametrize("text", HARMLESS)
def test_text_without_secrets_is_not_changed(text):
    assert redact(text) == text


def test_a_value_is_hidden_because_of_its_name():
    assert redact({"wandb": {"api_key": "CANARY", "tokens": ["CANARY"], "keep": "x"}, "n": 1}) == {
        "wandb": {"api_key": "***", "tokens": ["***"], "keep": "x"}, "n": 1
    }  # fmt: skip


def test_a_document_of_yaml_can_still_be_read():
    import yaml

    text = "a:\n  api_key: CANARY\n  root: s3://me:CANARY@h/x\n  token: null\n  keep: 2\n"
    found = yaml.safe_load(redact_yaml(text))
    assert found == {"a": {"api_key": "***", "root": "s3://***@h/x", "token": None, "keep": 2}}


def test_log_output_and_traces_are_redacted(capsys):
    handler = cli._Say()
    handler.emit(
        logging.LogRecord(
            "alexnet_ddp", logging.WARNING, "", 0, "at %s", ("s3://me:CANARY@h/x",), None
        )
    )
    PlainConsole(1).say("at s3://me:CANARY@h/x")
    try:
        raise RuntimeError("api_key=CANARY")
    except RuntimeError:
        cli._show_trace(*sys.exc_info())
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("at s3://***@h/x\n", "warning: at s3://***@h/x")
    assert err.endswith("RuntimeError: api_key=***\n")
    assert "CANARY" not in out + err
