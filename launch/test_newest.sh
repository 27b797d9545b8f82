#!/usr/bin/env bash
# Tests the project with the newest versions of its light dependencies, including pre-releases:
#   launch/test_newest.sh [pytest arguments]
# It creates a temporary environment. torch, torchvision and other packages that are not upgraded
# come from .venv, which is not changed. Without arguments it runs the tests that depend most on
# these libraries: two to four minutes on two cores.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

tests=(tests/test_versions.py tests/test_plan.py tests/config/test_config.py
  tests/runtime/test_redaction.py tests/data/test_{decode,augment,policy,quarantine}.py
  tests/data/sources tests/prepare/test_packing_formats.py tests/tracking
  tests/checkpoint/test_checkpoint.py tests/training/test_{metrics,optim}.py)
packages=(hydra-core omegaconf numpy pillow opencv-python-headless rich wandb tensorboard
  safetensors simplejpeg scipy fsspec)

"$project_dir/launch/setup.sh"
cd "$project_dir"
venv=.venv/bin/python
folder=$(mktemp -d "${TMPDIR:-/tmp}/alexnet_ddp.newest.XXXXXX")
trap 'rm -rf "$folder"' EXIT

# The upper bounds of pyproject.toml apply: later versions are not supported yet. A lower bound with
# .dev0 makes pip accept pre-releases of that package; --pre would also accept those of its
# dependencies.
"$venv" - "${packages[@]}" >"$folder/requirements.txt" <<'PYTHON'
import re, sys, tomllib

listed = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
wanted = [line for line in listed if re.match(r"[\w-]+", line)[0] in sys.argv[1:]]
print(*(re.sub(r">=([\d.]+)", r">=\1.dev0", line) for line in wanted), sep="\n")
PYTHON
PIP_ROOT_USER_ACTION=ignore "$venv" -m pip install \
  --quiet --disable-pip-version-check --no-input --upgrade \
  --target "$folder/packages" --requirement "$folder/requirements.txt"

# The search path: the upgraded packages, this checkout, the packages of .venv.
"$venv" -m venv --without-pip "$folder/venv"
site=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
{
  printf '%s\n' "$folder/packages" "$project_dir"
  "$venv" -c 'import sys
print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")'
} >"$site/newest.pth"

"$folder/venv/bin/python" - "${packages[@]}" <<'PYTHON'
import importlib.metadata, sys

print("newest:", *(f"{name} {importlib.metadata.version(name)}" for name in sys.argv[1:]))
PYTHON
if (($# == 0)); then set -- "${tests[@]}"; fi
"$folder/venv/bin/python" -m pytest "$@"
