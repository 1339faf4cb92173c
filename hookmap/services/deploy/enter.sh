# Runs first on the host, by `sh -c`: $1 the folder, $2 the Python to use, or nothing. A tar comes on stdin.
set -eu
umask 077
cd

usable() {
    command -v "$1" >/dev/null && "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))"
}

python=${2:-python3}
if test -z "$2"; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if usable "$candidate"; then
            python=$candidate
            break
        fi
    done
fi
command -v "$python" >/dev/null || exit 41
usable "$python" || exit 43
command -v tar >/dev/null || exit 42

mkdir -p -- "$1"
work=$(mktemp -d -- "$1/incoming.XXXXXX")
trap 'rm -rf -- "$work"; rmdir -- "$1" 2>/dev/null || :' EXIT
tar -xf - -C "$work"
"$python" "$work/on_host.pyz" "$work"
