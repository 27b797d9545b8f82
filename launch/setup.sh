#!/usr/bin/env bash
# Creates .venv in the project's folder and installs the project (editable) with its test
# dependencies:   launch/setup.sh
# It does nothing if pyproject.toml, Python and the folder have not changed since the last call.
#   PYTHON=python3.12    default: the first of python3.13, 3.12, 3.11 and python3 that is >= 3.11
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
venv=$project_dir/.venv
stamp=$venv/.alexnet_ddp_installed # fingerprint of a complete installation
cut=$venv/.alexnet_ddp_installing  # exists during an installation; .venv is rebuilt if it is left

say() { echo "setup: $*"; }

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Print the first Python that is new enough. Each candidate is run, because a python3.13 on PATH may
# be a shim that only prints an error.
find_python() {
  local candidates=(python3.13 python3.12 python3.11 python3) candidate
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die 64 "no Python >= 3.11 found (tried: ${candidates[*]}); install one, or set PYTHON:" \
    "PYTHON=/path/to/python3.12 launch/setup.sh"
}

# It contains the folder, because the scripts of a virtual environment contain its path: a moved
# project needs a new environment.
fingerprint() {
  "$venv/bin/python" -I -S -c '
import hashlib, sys
with open(sys.argv[1] + "/pyproject.toml", "rb") as file:
    sha = hashlib.sha256(file.read()).hexdigest()
print(sha, sys.version.split()[0], sys.argv[1])
' "$project_dir" 2>/dev/null
}

is_installed() {
  [[ -e $stamp && ! -e $cut ]] && is_wanted_version && [[ $(fingerprint) == "$(<"$stamp")" ]]
}
is_wanted_version() {
  [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$(version_of "$venv/bin/python")" ]]
}
is_reusable() {
  [[ ! -e $cut ]] && is_new_enough "$venv/bin/python" && is_wanted_version &&
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
    { [[ ! -e $stamp ]] || [[ $(<"$stamp") == *" $project_dir" ]]; }
}

if is_installed; then exit 0; fi

# Lock, because two jobs may start in the same shared folder. The lock ends with the process.
[[ -f $project_dir/pyproject.toml ]] ||
  die 64 "$project_dir is no checkout of the project; with an installed package use launch/local.sh"
exec 9>>"$project_dir/pyproject.toml" # for writing, as NFS requires for a lock
if command -v flock >/dev/null; then
  flock 9 || say "no locks on this file system: do not run launch/setup.sh twice at the same time"
fi
if is_installed; then exit 0; fi

if ! is_reusable; then
  base=$(find_python)
  [[ ! -e $venv ]] || say ".venv is incomplete, was moved or has another Python: replacing it"
  say "creating .venv with $base ($(version_of "$base"))"
  rm -rf "$venv"
  mkdir "$venv"
  : >"$cut"
  "$base" -m venv "$venv" ||
    die 64 "$base cannot create virtual environments; install its venv module" \
      "(Debian, Ubuntu: apt-get install python3-venv), or set PYTHON"
fi

interrupted=''
# bash runs the trap after pip has ended; pip's code does not show that it was interrupted.
trap 'interrupted=1' INT TERM
say "installing alexnet_ddp and its dependencies; the first time takes minutes (torch is large)"
: >"$cut"
if ! (cd "$project_dir" && PIP_ROOT_USER_ACTION=ignore "$venv/bin/python" -m pip install \
  --quiet --disable-pip-version-check --no-input --no-compile -e '.[dev]'); then
  [[ -z $interrupted ]] || die 130 "interrupted; the next run of launch/setup.sh replaces .venv"
  rm -f "$cut" # pip failed by itself, so .venv is as it was before
  die 1 "pip could not install the project (see its message above);" \
    "fix that and run launch/setup.sh again"
fi
# pip compiles on one core. Some packages contain files for other versions of Python, which fail.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" >/dev/null || true
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
rm "$cut"
say "done: .venv ($(version_of "$venv/bin/python"))"
