#!/bin/sh
# The steps of docker/Dockerfile, the same for both bases. Runs as root inside the image.
#   install.sh dependencies whole|without-torch    tini, ip, a user, and what requirements.lock pins, in /opt/venv
#   install.sh minitron                            minitron itself, from /opt/build/minitron
set -eu

lock=/opt/build/requirements.lock
venv=/opt/venv

# Blocks of the lock by the name of their package: those of pattern $1 only, or with a `!` all but those.
packages() {
    awk -v pattern="${1#!}" -v negated="${1%"${1#!}"}" '
        /^[A-Za-z0-9]/ { name = $0; sub(/[=@ ].*/, "", name); take = (name ~ pattern) != (negated == "!") }
        take' "$lock"
}

dependencies() {
    apt-get update
    # iproute2 is for launch/torchrun.sh, whose `ip` finds this host's address. Ubuntu's python3, which NVIDIA's image
    # has, makes no venv without python3-venv.
    [ "$1" = whole ] || set -- "$1" python3-venv
    apt-get install --yes --no-install-recommends 'tini=0.19.*' iproute2 ${2:+"$2"}
    rm -rf /var/lib/apt/lists/*
    # Base images for a user of their own (NVIDIA's has `ubuntu` with the usual id).
    useradd --create-home --shell /bin/sh --uid 10001 --user-group minitron
    mkdir -p /workspace
    chown minitron:minitron /workspace
    # NVIDIA's image holds pip to its own versions; a venv on top of its packages changes none of them.
    unset PIP_CONSTRAINT
    case $1 in
        whole)
            python3 -m venv "$venv"
            packages '!^$' >/tmp/requirements.txt
            ;;
        without-torch)
            python3 -m venv --system-site-packages "$venv"
            packages '!^(torch|triton|nvidia-.*|cuda-.*)$' >/tmp/requirements.txt
            ;;
        *)
            echo "install.sh: dependencies whole or without-torch, not $1" >&2
            return 2
            ;;
    esac
    packages '^uv$' >/tmp/uv.txt
    "$venv/bin/python" -m pip install --no-cache-dir --require-hashes --no-deps -r /tmp/uv.txt
    "$venv/bin/uv" pip install --python "$venv/bin/python" --require-hashes --no-deps --compile-bytecode \
        --link-mode copy -r /tmp/requirements.txt
    rm /tmp/requirements.txt /tmp/uv.txt
}

case ${1:-} in
    dependencies) dependencies "${2:-}" ;;
    minitron)
        "$venv/bin/uv" pip install --python "$venv/bin/python" --no-cache --no-deps --no-build-isolation \
            --compile-bytecode /opt/build/minitron
        ;;
    *)
        echo "install.sh: dependencies or minitron, not ${1:-nothing}" >&2
        exit 2
        ;;
esac
