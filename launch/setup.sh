#!/usr/bin/env bash
# Makes .venv in the project's folder and installs the project there, editable, with what its tests need:   launch/setup.sh
# Run it as often as you like: it does nothing when pyproject.toml, Python and the folder are what they were.
#   PYTHON=python3.12    the Python to build with; default: the first of python3.13, 3.12, 3.11, python3 that is >= 3.11
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
venv=$project_dir/.venv
stamp=$venv/.alexnet_ddp_installed # what was installed; there only after a complete installation
cut=$venv/.alexnet_ddp_installing  # left behind where an installation was interrupted: then nothing in .venv is trusted

say() { echo "setup: $*"; }

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# By asking each: a python3.13 on PATH may be a shim that only says that it is not installed.
find_python() {
  local candidates=(python3.13 python3.12 python3.11 python3) candidate
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die 64 "no Python of at least 3.11 (tried: ${candidates[*]}); install one, or name it: PYTHON=/path/to/python3.12 launch/setup.sh"
}

# The folder is part of it: the scripts of a virtual environment name it, so a moved project needs a new one.
fingerprint() {
  "$venv/bin/python" -I -S -c '
import hashlib, sys
print(hashlib.sha256(open(sys.argv[1] + "/pyproject.toml", "rb").read()).hexdigest(), sys.version.split()[0], sys.argv[1])
' "$project_dir" 2>/dev/null
}

is_installed() { [[ -e $stamp && ! -e $cut ]] && is_wanted_version && [[ $(fingerprint) == "$(<"$stamp")" ]]; }
is_wanted_version() { [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$(version_of "$venv/bin/python")" ]]; }
is_whole() {
  [[ ! -e $cut ]] && is_new_enough "$venv/bin/python" && is_wanted_version && "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
    { [[ ! -e $stamp ]] || [[ $(<"$stamp") == *" $project_dir" ]]; }
}

if is_installed; then exit 0; fi

# One at a time: two jobs may start in the same shared folder. The lock goes with the process.
exec 9>>"$project_dir/pyproject.toml" # opened for writing: NFS locks nothing else
if command -v flock >/dev/null; then flock 9 || say "no locks on this file system: do not start two set-ups at once"; fi
if is_installed; then exit 0; fi

if ! is_whole; then
  base=$(find_python)
  [[ ! -e $venv ]] || say ".venv is incomplete, moved or of another Python: making it anew"
  say "making .venv with $base ($(version_of "$base"))"
  rm -rf "$venv"
  mkdir "$venv"
  : >"$cut"
  "$base" -m venv "$venv" ||
    die 64 "$base cannot make virtual environments; install its venv module (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON"
fi

interrupted=''
trap 'interrupted=1' INT TERM # bash gets to it when pip has ended, which an interruption ends with an ordinary code
say "installing alexnet_ddp and what it needs: some minutes the first time (torch is large)"
: >"$cut"
if ! (cd "$project_dir" && PIP_ROOT_USER_ACTION=ignore "$venv/bin/python" -m pip install \
  --quiet --disable-pip-version-check --no-input -e '.[dev]'); then
  [[ -z $interrupted ]] || die 130 "interrupted; the next run of launch/setup.sh makes .venv anew"
  rm -f "$cut" # pip ended by itself and left what was there before
  die 1 "pip could not install the project (its reason is above); once that is mended, run launch/setup.sh again"
fi
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
rm "$cut"
say "done: .venv ($(version_of "$venv/bin/python"))"
