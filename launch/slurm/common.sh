# shellcheck shell=bash
# What every job script of minitron calls, in this order: say_where, run_ranks, go_on_or_end. Bash; sourced.
# The script sets RUN_JOBS, the folder <run>/jobs, and two arrays: SRUN_OPTIONS, and RANK_VARIABLES, names of variables
# that it exports.
#
# The ranks check their machines first, as `minitron preflight` does.
# Exit codes of a job: 0 done; 75 stopped on request with everything saved, or preempted, and requeued; anything else
# is an error whose line is in the log, and is not requeued. A job that waits for a failed one is cancelled by SLURM.
set -uo pipefail

status=0

say_where() {
    printf -- '-- job %s on %s, attempt %d, %s\n' "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" \
        $((${SLURM_RESTART_COUNT:-0} + 1)) "$(date '+%F %T')"
    rm -f -- "$RUN_JOBS/$SLURM_JOB_ID.stopped" "$RUN_JOBS/$SLURM_JOB_ID.code"
}

# One task is one rank: signals reach Python, and no second launcher is in between. A rank that fails ends the others.
# Until Python holds the signal back, a few milliseconds after its start, it must not be fatal; a program that is
# started inherits what the shell ignores. Variables are given by `env` once more: in a container its image's values
# come before those of the job.
run_ranks() {
    local name variables=()
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun itself no longer takes it from the job
    for name in OMP_NUM_THREADS "${RANK_VARIABLES[@]}"; do
        variables+=("$name=${!name}")
    done
    # shellcheck disable=SC2016  # expanded by the inner shell
    srun --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" bash -c 'trap "" USR1; exec env "$@"' rank "${variables[@]}" "$@"
    status=$?
}

# Whether SLURM wants the nodes for a job that goes first. Where the queue has a GraceTime, the ranks have ended by
# SIGTERM before SLURM itself would requeue, and an end with an error would count as the job's own.
is_preempted() {
    scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'
}

requeue() {
    scontrol requeue "$SLURM_JOB_ID" || printf -- '-- SLURM does not take it back: the same command goes on from here\n'
    exit 75
}

# Rank 0 leaves the mark once everything is saved, and a rank with an error its code: both count for more than what
# srun gives, the code of a rank that was cut off.
go_on_or_end() {
    if [ -e "$RUN_JOBS/$SLURM_JOB_ID.stopped" ]; then
        printf -- '-- stopped and saved: back into the queue\n'
        requeue
    fi
    if [ "$status" -ne 0 ] && is_preempted; then
        printf -- '-- preempted: back into the queue\n'
        requeue
    fi
    if [ -e "$RUN_JOBS/$SLURM_JOB_ID.code" ]; then
        status=$(<"$RUN_JOBS/$SLURM_JOB_ID.code")
    fi
    printf -- '-- ended with exit code %d, %s\n' "$status" "$(date '+%F %T')"
    exit "$status"
}
