#!/bin/sh
# Prints the newest Python above 3.11 that runs and is newer than the one given; nothing if none.
# Each candidate is run, since a version manager's launcher may be on PATH for a version that it
# does not start.
current=$("$1" -c 'import sys; print(sys.version_info[1])')
# TensorFlow has no wheel for 3.14 yet.
for minor in 13 12; do
    [ "$minor" -gt "$current" ] || continue
    for candidate in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python; do
        if "$candidate" -c "import sys, venv; sys.exit(sys.version_info[:2] != (3, $minor))" 2>/dev/null; then
            echo "$candidate"
            exit 0
        fi
    done
done
