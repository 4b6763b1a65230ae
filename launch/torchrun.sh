#!/bin/bash
# minitron on several hosts without SLURM. The same line on each of them, all of which see one file system:
#
#   launch/torchrun.sh ADDRESS[:PORT] HOSTS RANKS_PER_HOST compress experiment=... [key=value ...]
#
# ADDRESS is the first host's IPv4 address as the others reach it, not its name: a name may lead to a loopback address
# there (Debian writes 127.0.1.1 into /etc/hosts), and then no host would think that it is the first.
#
# What a lost rank or host costs: the others stop, wait launch.join_timeout_s for it to come back (start the same line
# on it again), and all go on from the newest saved step. If the first host is lost, start the line on all of them.
# launch.max_restarts (20) is how often that may happen. SIGUSR1 to any rank saves and ends the job.
set -euo pipefail

if [ $# -lt 4 ]; then
    sed -n '2,11s/^#\{1,\} \{0,1\}//p' "$0" >&2
    exit 2
fi
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

octet='(25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])'
[[ $1 =~ ^$octet(\.$octet){3}(:[0-9]+)?$ ]] ||
    die "ADDRESS is '$1', not an IPv4 address; write the first host's as the others reach it, such as 10.0.0.1 or" \
        "10.0.0.1:29500 (hostname -I prints it there)"
[[ $2 =~ ^[1-9][0-9]*$ && $2 != 1 ]] ||
    die "HOSTS is '$2'; write their number, 2 or more (one host needs no script: minitron ... launch=torchrun)"
[[ $3 =~ ^[1-9][0-9]*$ ]] ||
    die "RANKS_PER_HOST is '$3'; write the processes on each host, 1 or more, with GPUs one for each"
command -v ip >/dev/null || die "the program ip is missing; install iproute2 (Debian, Ubuntu: apt install iproute2)"
first=${1%%:*}
port=29500
case $1 in *:*) port=${1##*:} ;; esac
hosts=$2
ranks=$3
shift 3

# This host's address and interface on the way to the first.
route=$(ip -o -4 route get "$first" 2>&1) ||
    die "no way from this host to ADDRESS $first (${route##*: }); write one that 'ip route get' has a way to"
address=$(sed -n 's/.* src \([0-9.]*\).*/\1/p' <<<"$route")
interface=$(ip -o -4 addr show to "$address" | awk '{ print $2; exit }')
is_host=false
[ "$address" != "$first" ] || is_host=true

export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" # else it takes where the host's name leads
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"

minitron=${MINITRON:-$(dirname -- "$0")/../.venv/bin/minitron}
[ -x "$minitron" ] || minitron=minitron
exec "$minitron" "$@" launch=torchrun launch.nodes="$hosts" launch.nproc_per_node="$ranks" \
    launch.rendezvous="$first:$port" launch.is_host="$is_host" launch.local_address="$address"
