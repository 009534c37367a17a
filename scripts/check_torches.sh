#!/usr/bin/env bash
# One wheel, built once, must pass the tests on every torch it promises.
set -euo pipefail

usage() {
  cat <<'END'
usage: scripts/check_torches.sh [--wheel FILE] [torch versions...] [-- pytest arguments...]

Builds one wheel against the first torch and runs the test-suite with it on each of them (default: 2.10.* 2.13.* 2.14.*).
Every torch gets a venv of its own under a temporary folder; one at a time, removed before the next.

A version may be a whole specifier: ===2.13.0 is that build alone, not 2.13.0+cpu, where the index has both.

  --wheel FILE   test this wheel instead of building one
  PYTHON         environment variable: the interpreter (default: python3)
END
}

python=$(command -v "${PYTHON:-python3}") || { echo "no interpreter ${PYTHON:-python3}" >&2 && exit 2; }
wheel=""
versions=()
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --wheel) wheel=$(realpath -e "${2:?--wheel needs a file}") && shift 2 ;;
    --) shift && break ;;
    -*) echo "unknown option $1; see --help" >&2 && exit 2 ;;
    *) versions+=("$1") && shift ;;
  esac
done
((${#versions[@]})) || versions=('2.10.*' '2.13.*' '2.14.*')

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
say() { printf '== %s\n' "$*"; }

# Run a command with its output in a log, which is shown only where it fails.
quietly() {
  if ! "$@" >"$tmp/log" 2>&1; then
    tail -n 60 "$tmp/log"
    return 1
  fi
}

# What git would commit of the working tree: nothing that lies around here by chance is tested.
mkdir "$tmp/tree"
(cd "$repo" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' f; do
  if [[ -e $f ]]; then cp --parents -t "$tmp/tree" "$f"; fi
done)

test_on() { # torch version; prints a line of the table into $tmp/table
  local version=$1 bin=$tmp/venv/bin found=- result
  local wanted=torch==$version
  [[ $version != [=\<\>~!]* ]] || wanted=torch$version
  rm -rf "$tmp/venv"
  "$python" -m venv "$tmp/venv"
  say "torch $version: installing"
  if ! quietly "$bin/python" -m pip install -q "$wanted"; then
    result="torch not installable"
  else
    found=$("$bin/python" -W ignore -c 'import torch; print(torch.__version__)')
    # The version in the metadata: torch itself may add a +cu128 that the index does not know.
    "$bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$tmp/constraints"
    if [[ -z $wheel ]]; then
      say "building the wheel against torch $found"
      if ! quietly "$bin/python" -m pip install -q -c "$tmp/constraints" scikit-build-core pybind11 ninja cmake ||
        ! quietly "$bin/python" -m pip wheel -q --no-build-isolation --no-deps -w "$tmp/dist" "$tmp/tree"; then
        say "the wheel cannot be built"
        return 1
      fi
      wheel=$(echo "$tmp"/dist/*.whl)
    fi
    say "torch $found: tests with $(basename "$wheel")"
    if ! quietly "$bin/python" -m pip install -q -c "$tmp/constraints" "spikecore[test] @ file://$wheel"; then
      result="wheel not installable"
    elif (cd "$tmp/tree" && PATH="$bin:$PATH" "$bin/pytest" -q -p no:cacheprovider "${@:2}" 2>&1) | tee "$tmp/tests"; then
      result="ok: $(tail -n 1 "$tmp/tests")"
    else
      result="FAILED: $(tail -n 1 "$tmp/tests")"
    fi
  fi
  printf '%-8s %-14s %s\n' "$version" "$found" "$result" >>"$tmp/table"
  [[ $result == ok* ]]
}

failed=0
for version in "${versions[@]}"; do
  test_on "$version" "$@" || failed=1
done
say "result"
cat "$tmp/table" 2>/dev/null || true
exit $failed
