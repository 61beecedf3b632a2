#!/usr/bin/env bash
# Fill a folder with every wheel that an installation without internet needs.
#
#   tools/fetch_wheels.sh FOLDER [PYTHON]                      (default: .venv/bin/python)
#   tools/fetch_wheels.sh FOLDER PYTHON VERSION INSTALLED      for a machine that has torch
#
# PYTHON must be of a complete environment: building detectron2 needs its torch. The wheels are for
# that Python version and platform. With VERSION, such as 3.12, they are for that Python on Linux
# x86-64, and only what the file INSTALLED (`pip freeze` or `pip list` there) does not have: in
# FOLDER/part1, part2 ... of less than 64 MiB each.
set -euo pipefail

folder=$(realpath -m "${1:?usage: tools/fetch_wheels.sh FOLDER [PYTHON [VERSION INSTALLED]]}")
python=${2:-.venv/bin/python}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The cache is off because pip would take a wheel from it that was built without the YAML files.
build_detectron2() {
    DIST_EXTRA_CONFIG=$here/requirements-detectron2.cfg "$python" -m pip wheel --wheel-dir "$1" \
        --no-cache-dir --no-deps --no-build-isolation --use-pep517 --require-hashes \
        -r "$here/requirements-detectron2.txt"
}

mkdir -p "$folder"
if [ -z "${3:-}" ]; then
    "$python" -m pip wheel --wheel-dir "$folder" -c "$here/constraints.txt" \
        -r "$here/requirements.txt" -r "$here/requirements-dev.txt" \
        "pip>=23.1,<26.3" setuptools wheel
    build_detectron2 "$folder"
    exit
fi

version=$3 installed=${4:?for another Python: name a file with what pip freeze says there}
[ -f "$installed" ] || { echo "error: no file $installed (pip freeze of that machine)" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# What is needed there: the requirements and what they require, but for what it has.
missing=$("$python" - "$here/requirements.txt" "$installed" <<'PYTHON'
import re, sys
from importlib import metadata

def name_of(line):
    found = re.match(r"[A-Za-z0-9._-]+", line.strip())
    return re.sub(r"[-_.]+", "-", found.group()).lower() if found else ""

required, there = (set(map(name_of, open(path, encoding="utf-8"))) for path in sys.argv[1:])
found, coming = {}, required - {""}
while coming:
    name = coming.pop()
    if name in there or name in found:
        continue
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue  # for another Python or system
    found[name] = distribution.version
    coming |= {name_of(of) for of in distribution.requires or () if "extra ==" not in of}
print(*(f"{name}=={version}" for name, version in sorted(found.items())), sep="\n")
PYTHON
)
for package in $missing; do
    "$python" -m pip download -q --dest "$work" --no-deps --only-binary=:all: --implementation cp \
        --python-version "$version" --platform manylinux_2_28_x86_64 \
        --platform manylinux2014_x86_64 "$package" 2>"$work/said" ||
        "$python" -m pip wheel -q --wheel-dir "$work" --no-deps "$package" # exists as source only
done
if ! grep -qiE '^(pb1[-_])?detectron2[ =@]' "$installed"; then
    build_detectron2 "$work"
    built=$(echo "$work"/pb1_detectron2-*.whl)
    # named after this Python, though nothing in it is compiled
    if ! "$python" -m zipfile -l "$built" | grep -q '\.so '; then
        "$python" -m wheel tags --remove --python-tag py3 --abi-tag none --platform-tag any "$built"
    fi
fi
bound=$(find "$work" -name '*.whl' ! -name '*-any.whl' ! -name "*cp${version/./}*" ! -name '*abi3*')
[ -z "$bound" ] || { echo "error: these are not for Python $version: $bound" >&2; exit 2; }
part=1 used=0
rm -rf "$folder"/part[0-9]*
for wheel in "$work"/*.whl; do
    size=$(stat -c %s "$wheel")
    if ((used && used + size >= 64 << 20)); then part=$((part + 1)) used=0; fi
    used=$((used + size))
    mkdir -p "$folder/part$part"
    mv "$wheel" "$folder/part$part/"
done
du -sh "$folder"/part*
