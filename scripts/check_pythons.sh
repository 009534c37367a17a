#!/usr/bin/env bash
# The sdist must install, isolated, and pass the quick tests on every Python it promises.
set -euo pipefail

usage() {
  cat <<'END'
usage: scripts/check_pythons.sh [Python versions...] [-- pytest arguments...]

Makes an sdist, and for each Python (default: 3.10 3.12 3.13) installs it with its build isolated into a venv of its own
and runs pytest -m "not slow". Interpreters: python3.X on PATH, or a newest 3.X.* under ~/.pyenv/versions. One venv at
a time, all in a temporary folder that is removed at the end; the build and the venv hold a torch each.
END
}

versions=()
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    -*) echo "unknown option $1; see --help" >&2 && exit 2 ;;
    *) versions+=("$1") && shift ;;
  esac
done
((${#versions[@]})) || versions=(3.10 3.12 3.13)

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
export TMPDIR=$tmp # pip's build environments go with it
say() { printf '== %s\n' "$*"; }

# Run a command with its output in a log, which is shown only where it fails.
quietly() {
  if ! "$@" >"$tmp/log" 2>&1; then
    tail -n 60 "$tmp/log"
    return 1
  fi
}

interpreter() { # version; prints a path, fails where there is none. A pyenv shim may exist without its version.
  local candidate
  for candidate in "python$1" $(ls -d ~/.pyenv/versions/"$1".*/bin/python 2>/dev/null | sort -rV); do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

make_sdist() { # interpreter
  "$1" -m venv "$tmp/tools"
  quietly "$tmp/tools/bin/python" -m pip install -q scikit-build-core || return 1
  # What git would commit of the working tree.
  mkdir "$tmp/tree"
  (cd "$repo" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' f; do
    if [[ -e $f ]]; then cp --parents -t "$tmp/tree" "$f"; fi
  done)
  # The backend itself: `python -m build` would first install all of torch to make an archive of text files.
  (cd "$tmp/tree" && quietly "$tmp/tools/bin/python" -c "from scikit_build_core.build import build_sdist; build_sdist('$tmp/dist')")
}

check() { # version pytest-arguments...
  local version=$1 bin=$tmp/venv/bin python result
  if ! python=$(interpreter "$version"); then
    say "Python $version: not found (neither python$version on PATH nor ~/.pyenv/versions/$version.*)"
    result="not found"
  else
    rm -rf "$tmp/venv" "$tmp/src"
    if [[ ! -d $tmp/dist ]]; then
      say "making the sdist with Python $version"
      make_sdist "$python" || return 1
    fi
    mkdir "$tmp/src" && tar -xf "$tmp"/dist/*.tar.gz -C "$tmp/src" --strip-components=1
    say "Python $version ($("$python" -V)): installing the sdist with [test], build isolated"
    "$python" -m venv "$tmp/venv"
    if ! quietly "$bin/python" -m pip install -q "$tmp/src[test]"; then
      result="not installable"
    else
      say "Python $version: tests"
      if (cd "$tmp/src" && PATH="$bin:$PATH" "$bin/pytest" -q -p no:cacheprovider -m "not slow" "${@:2}" 2>&1) | tee "$tmp/tests"; then
        result="ok: $(tail -n 1 "$tmp/tests")"
      else
        result="FAILED: $(tail -n 1 "$tmp/tests")"
      fi
    fi
  fi
  printf '%-6s %s\n' "$version" "$result" >>"$tmp/table"
  [[ $result == ok* ]]
}

failed=0
for version in "${versions[@]}"; do
  check "$version" "$@" || failed=1
done
say "result"
cat "$tmp/table" 2>/dev/null || true
exit $failed
