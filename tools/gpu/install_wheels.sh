#!/usr/bin/env bash
# Installs wheels into a folder of their own, without a network, beside the torch that is already there.
#   tools/gpu/install_wheels.sh WHEELS SITE      then: export PYTHONPATH=SITE
# WHEELS holds *.whl files; a wheel that was split to travel lies there as NAME.whl.part-00, .part-01, ... and is joined.
# PYTHON names the interpreter (default python3). Nothing is installed unless every part is there.
set -euo pipefail

from=${1:?usage: install_wheels.sh WHEELS SITE}
site=${2:?usage: install_wheels.sh WHEELS SITE}
python=${PYTHON:-python3}

fail() {
  echo "$1" >&2
  exit 2
}

[[ -d $from ]] || fail "WHEELS = $from is not a folder; name the folder that holds the wheels"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

shopt -s nullglob
for first in "$from"/*.whl.part-*; do
  name=$(basename "${first%.part-*}")
  [[ -e $work/$name ]] && continue
  parts=("$from/$name".part-*)
  for ((index = 0; index < ${#parts[@]}; index++)); do
    printf -v expected '%s/%s.part-%02d' "$from" "$name" "$index"
    [[ -e $expected ]] || fail "$expected is missing, so $name cannot be joined; copy all its parts into $from"
  done
  cat "${parts[@]}" >"$work/$name"
  "$python" -m zipfile -t "$work/$name" >/dev/null 2>&1 ||
    fail "the ${#parts[@]} parts of $name in $from do not make a whole wheel; copy the last parts too, or copy them again"
done
for wheel in "$from"/*.whl; do
  ln -s "$(realpath "$wheel")" "$work/$(basename "$wheel")"
done
wheels=("$work"/*.whl)
((${#wheels[@]})) || fail "WHEELS = $from holds no wheel (*.whl or *.whl.part-00, ...); gather them with tools/gpu/gather_wheels.sh"

"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
  --upgrade --target "$site" "${wheels[@]}"
echo "Installed ${#wheels[@]} wheels into $site"
