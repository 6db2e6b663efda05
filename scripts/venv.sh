#!/usr/bin/env bash
# Makes .venv, or brings it up to date: the dependencies of pyproject.toml, those of rollouts and tests too, at the versions
# of constraints.txt, and a link that makes this folder importable as `waybill`. Does nothing when both files are as they were.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.installed
wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum)
is_current() { [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; }
is_current && exit 0
# One at a time: nodes may share this folder.
exec 9< "${BASH_SOURCE[0]}"
flock 9
is_current && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "waybill needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON to another." >&2; exit 2; }
echo "setting up $venv (once, about a minute) ..." >&2
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
"$python" - "$root/pyproject.toml" > "$venv/requirements.txt" <<'PY'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["rollout"] + project["optional-dependencies"]["test"]))
PY
"$venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/constraints.txt" -r "$venv/requirements.txt" >&2
# The package is this folder, whatever the clone is called; type checkers follow the link, too.
mkdir -p "$venv/src"
ln -sfn ../.. "$venv/src/waybill"
echo "$venv/src" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/waybill.pth"
echo "$wanted" > "$stamp"
