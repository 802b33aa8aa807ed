#!/bin/sh
# Prints a Python above 3.11 that runs and is newer than the one given; nothing if there is none.
# Each candidate is run, since a version manager's launcher may be on PATH for a version that it
# does not start.
current=$("$1" -c 'import sys; print(sys.version_info[1])')
# 3.12 comes first because that is what development uses.
for minor in 12 13; do
    [ "$minor" -gt "$current" ] || continue
    for candidate in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python; do
        if "$candidate" -c "import sys, venv; sys.exit(sys.version_info[:2] != (3, $minor))" 2>/dev/null; then
            echo "$candidate"
            exit 0
        fi
    done
done
