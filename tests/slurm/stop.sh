#!/usr/bin/env bash
# Stops the Slurm that start.sh started in a folder, its jobs first, and takes back the address and the line of
# /etc/hosts that it added; other daemons and other folders are left alone.
#
#   tests/slurm/stop.sh FOLDER
set -uo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
folder=$(realpath -m "${1:?usage: stop.sh FOLDER}")
export SLURM_CONF=$folder/slurm.conf
[ -f "$SLURM_CONF" ] || exit 0

jobs_left() { [ -n "$(timeout 5 squeue -h -t R,CG,S,PD -o %i 2>/dev/null)" ]; }
# A job's processes are no children of the daemons: without their slurmd nobody would end them.
timeout 10 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel 2>/dev/null
for _ in $(seq 150); do
    jobs_left || break
    sleep 0.1
done
for file in "$folder"/run/slurmd.*.pid "$folder/run/slurmctld.pid" "$folder/run/munged.pid"; do
    pid=$(cat "$file" 2>/dev/null) || continue
    name=$(basename "$file")
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q "${name%%.*} .*$folder/" || continue
    kill -TERM "$pid"
    for _ in $(seq 100); do
        [ -e "/proc/$pid" ] || break
        sleep 0.1
    done
    [ ! -e "/proc/$pid" ] || kill -KILL "$pid"
done
# Another Slurm of this machine may have come to need them.
if ! pgrep -x slurmctld >/dev/null; then
    if [ -e "$folder/added/address" ]; then
        ip addr del 198.51.100.1/32 dev lo && rm "$folder/added/address"
    fi
    if [ -e "$folder/added/hosts" ]; then
        # Written in place: containers mount this file, so it cannot be replaced by another.
        others=$(grep -vxFf "$folder/added/hosts" /etc/hosts)
        printf '%s\n' "$others" >/etc/hosts && rm "$folder/added/hosts"
    fi
fi
exit 0
