#!/usr/bin/env bash
# Install detectron2 v0.6 as pure Python (and lvis) for a Python interpreter that has torch already.
#
#   tools/install_detectron2.sh [PYTHON]        (default: python3)
#
# An installed detectron2, such as the official compiled build, is left alone.
# WHEELS=FOLDER takes both from wheels in that folder, without internet.
set -euo pipefail

python=${1:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements=$here/requirements-detectron2.txt

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# Looks in the environment alone (-I: not in the current folder), and imports nothing.
has() {
    "$python" -I -c 'import sys; from importlib.util import find_spec
spec = find_spec(sys.argv[1])
sys.exit(spec is None or spec.origin is None)' "$1"
}

command -v "$python" >/dev/null || fail "no Python interpreter called '$python'"
has torch || fail "$python has no torch, which detectron2's build needs: install torch and torchvision first"

if has detectron2; then
    echo "detectron2 is installed already and is left alone"
    pattern='^lvis=='
else
    pattern='^[a-z0-9-]*=='
fi

if [ -n "${WHEELS:-}" ]; then
    # The wheels were built from the sources that the hashes in the file name.
    grep -o "$pattern[^ ]*" "$requirements" |
        xargs "$python" -m pip install --no-index --find-links "$WHEELS" --no-deps
    exit
fi

# Only the chosen lines, each with its hash.
chosen=$(mktemp)
trap 'rm -f "$chosen"' EXIT
grep "$pattern" "$requirements" >"$chosen"

# The cache is off because pip would take a wheel from it that was built without the YAML files.
DIST_EXTRA_CONFIG=$here/requirements-detectron2.cfg "$python" -m pip install --no-cache-dir \
    --no-deps --no-build-isolation --use-pep517 --require-hashes -r "$chosen"
