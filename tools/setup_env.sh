#!/usr/bin/env bash
# Build the project's virtual environment; a complete one whose requirements are unchanged is kept.
#
#   tools/setup_env.sh [VENV]                   (default: .venv)
#
# PYTHON   the interpreter to build it with     (default: python3)
# WHEELS   install from the wheels in this folder, without internet ("make wheels" fills one)
#
# The last step writes a stamp into the environment. Without a stamp it counts as half-built, and the
# next call builds it anew.
set -euo pipefail

venv=$(realpath -m "${1:-.venv}")
python=${PYTHON:-python3}
export WHEELS=${WHEELS:+$(realpath -m "$WHEELS")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marker=$venv/.built-by-virtex-d2
stamp=$venv/.complete

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

command -v "$python" >/dev/null || fail "no Python interpreter called '$python': set PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed; '$python' is $version: set PYTHON=..."
[ -z "$WHEELS" ] || [ -d "$WHEELS" ] || fail "WHEELS=$WHEELS is no folder"

fingerprint=$(
    echo "$version $PWD"
    cat requirements* constraints.txt setup.py tools/install_detectron2.sh | sha256sum
)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ]; then
    exit
fi

if [ -e "$venv" ] && [ ! -f "$marker" ]; then
    [ -d "$venv" ] && [ -z "$(ls -A "$venv")" ] ||
        fail "$venv exists and was not built by this script; it is left alone. Choose another VENV=..."
fi
rm -rf "$venv"
mkdir -p "$venv"
touch "$marker"

echo "Building $venv with Python $version (about 6 GB, most of it torch's CUDA libraries) ..."
"$python" -m venv "$venv" ||
    fail "'$python -m venv' does not work (on Debian it needs the package python3-venv)"

install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off --quiet \
        ${WHEELS:+--no-index --find-links "$WHEELS"} "$@"
}

# 23.1 knows settings of one requirement; 26.3 refuses detectron2's source for a URL in an extra of it.
install "pip>=23.1,<26.3"
install -c constraints.txt setuptools wheel
echo "Installing torch and the other requirements ..."
install -c constraints.txt -r requirements.txt -r requirements-dev.txt
echo "Installing detectron2 ..."
tools/install_detectron2.sh "$venv/bin/python" >"$venv/detectron2.log" 2>&1 || {
    cat "$venv/detectron2.log" >&2
    fail "detectron2 could not be installed"
}
install --no-deps --no-build-isolation -e .

"$venv/bin/python" -c 'import virtex_d2, detectron2.engine, lvis' ||
    fail "the environment was built, but does not import (see above)"
echo "$fingerprint" >"$stamp"
echo "The environment is complete."
