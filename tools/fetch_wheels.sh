#!/usr/bin/env bash
# Fill a folder with every wheel that an installation without internet needs.
#
#   tools/fetch_wheels.sh FOLDER [PYTHON]       (default: .venv/bin/python)
#
# PYTHON must be of a complete environment: building detectron2 needs its torch. The wheels are for
# that Python version and platform.
set -euo pipefail

folder=$(realpath -m "${1:?usage: tools/fetch_wheels.sh FOLDER [PYTHON]}")
python=${2:-.venv/bin/python}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

mkdir -p "$folder"
"$python" -m pip wheel --wheel-dir "$folder" -c "$here/constraints.txt" \
    -r "$here/requirements.txt" -r "$here/requirements-dev.txt" \
    "pip>=23.1,<26.3" setuptools wheel

# The cache is off because pip would take a wheel from it that was built without the YAML files.
DIST_EXTRA_CONFIG=$here/requirements-detectron2.cfg "$python" -m pip wheel --wheel-dir "$folder" \
    --no-cache-dir --no-deps --no-build-isolation --use-pep517 --require-hashes \
    -r "$here/requirements-detectron2.txt"
