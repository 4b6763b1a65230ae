#!/usr/bin/env bash
# `make test-docker`: builds the cpu image of docker/Dockerfile for real and runs tests inside it, without a Docker
# daemon and without an image registry: buildah builds it, on a stand-in for its base that is made here of Debian's
# packages and a local CPython.
#
# Needs: root; Debian or Ubuntu with `apt-get install buildah debootstrap`; a CPython 3.12 whose prefix can be copied,
# such as pyenv's (PYTHON=/path/to/bin/python3.12 names one); Debian's and PyPI's servers; 25 GB under WORK.
#
#   TESTS='tests/unit/config tests/unit/losses'   what runs inside (default: tests/unit)
#   WORK=/var/tmp/minitron-docker                 images and caches; stays, so that the next build is quick
#   TARGET=cpu                                    build another target, and run no tests
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
work=${WORK:-/var/tmp/minitron-docker}
base=$(sed -n 's/^ARG CPU_BASE=//p' "$root/docker/Dockerfile")
target=${TARGET:-test}
image=localhost/minitron:$target

die() {
    printf 'test-docker: error: %s\n' "$*" >&2
    exit 1
}

image_tool() {
    buildah --root "$work/store" --runroot "$work/run" --storage-driver overlay "$@"
}

# The prefix of a CPython 3.12: of $PYTHON, or pyenv's.
python_prefix() {
    local candidate
    for candidate in "${PYTHON:-}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        [[ -x $candidate ]] || continue
        "$candidate" -c 'import sys; assert sys.version_info[:2] == (3, 12); print(sys.base_prefix)' && return
    done
    die "no CPython 3.12 to copy; name one: PYTHON=/path/to/bin/python3.12"
}

check_prerequisites() {
    [[ $(id -u) == 0 ]] || die "must run as root (buildah with chroot isolation, debootstrap)"
    local tool
    for tool in buildah debootstrap; do
        command -v "$tool" >/dev/null || die "$tool is missing: apt-get install --no-install-recommends buildah debootstrap"
    done
}

# Debian with the libraries that CPython's own modules are linked to, CPython in /usr/local, and this machine's
# certificates: where PyPI is reached through a proxy of one's own, only these will do.
make_base() {
    local prefix rootfs=$work/rootfs container
    prefix=$(python_prefix)
    rm -rf "$rootfs"
    debootstrap --variant=minbase --include=ca-certificates,libssl3,libffi8,libbz2-1.0,liblzma5,libsqlite3-0,zlib1g,libreadline8,libuuid1,libexpat1,libncursesw6 \
        bookworm "$rootfs" http://deb.debian.org/debian >"$work/debootstrap.log" 2>&1 ||
        die "debootstrap failed: see $work/debootstrap.log"
    rm -rf "$rootfs"/var/cache/apt/archives/*.deb "$rootfs"/var/lib/apt/lists/*
    tar -C "$prefix" --exclude=__pycache__ --exclude='lib/python3.12/test' --exclude='lib/python3.12/site-packages' \
        -cf - bin include lib | tar -C "$rootfs/usr/local" -xf -
    mkdir -p "$rootfs/usr/local/lib/python3.12/site-packages"
    ln -sf python3.12 "$rootfs/usr/local/bin/python3"
    ln -sf python3.12 "$rootfs/usr/local/bin/python"
    echo /usr/local/lib >"$rootfs/etc/ld.so.conf.d/python.conf"
    chroot "$rootfs" ldconfig
    chroot "$rootfs" python3 -m ensurepip --upgrade >>"$work/debootstrap.log" 2>&1
    cp --dereference /etc/ssl/certs/ca-certificates.crt "$rootfs/etc/ssl/certs/ca-certificates.crt"
    container=$(image_tool from scratch)
    image_tool copy --quiet "$container" "$rootfs" / >/dev/null
    image_tool config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
        --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
        --cmd python3 "$container"
    image_tool commit --quiet --signature-policy "$work/policy.json" --rm "$container" "$base" >/dev/null
    rm -rf "$rootfs"
}

timed() {
    local name=$1 start=$SECONDS
    shift
    "$@"
    printf 'test-docker: %s: %d s\n' "$name" $((SECONDS - start))
}

build() {
    image_tool build --isolation chroot --pull-never --layers --signature-policy "$work/policy.json" \
        --target "$target" --build-arg "TESTS=${TESTS:-tests/unit}" --tag "$image" \
        --file "$root/docker/Dockerfile" "$root"
}

check_prerequisites
mkdir -p "$work"
printf '{"default": [{"type": "insecureAcceptAnything"}]}\n' >"$work/policy.json"
image_tool images --quiet "$base" >/dev/null 2>&1 || timed "stand-in for $base" make_base
timed "build of target $target" build
image_tool images
