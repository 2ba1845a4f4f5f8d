#!/usr/bin/env bash
# Run the fast suite on every torch version that minisft is tested with, each in its own environment.
#
#     bash benchmarks/versions.sh [VERSION...]
#
# The environments are made in the current directory (venv-2.11.0, several GB each) and kept for the next run.
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
for version in "${@:-2.11.0 2.13.0 2.14.1}"; do
    for one in $version; do
        python3 -m venv "venv-$one"
        "venv-$one/bin/pip" install -q "torch==$one" -e "$repository[test]" || exit 1
        echo "torch $one"
        (cd "$repository" && "$OLDPWD/venv-$one/bin/python" -m pytest -n 2 | tail -n 3)
    done
done
