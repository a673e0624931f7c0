#!/usr/bin/env bash
# A real Slurm on this machine's loopback, for the tests: Debian's packages, two virtual nodes, no accounting, no cgroups.
#
#   tests/slurm/start.sh FOLDER     # state, logs and slurm.conf go there; prints: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/stop.sh FOLDER      # stops what was started there, and nothing else
#
# Needs root; installs munge, slurmctld, slurmd and slurm-client with apt where they are missing. Running it again while
# it is up changes nothing. Exit status 3: Slurm cannot be had here.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
folder=$(realpath -m "${1:?usage: start.sh FOLDER}")
host=$(uname -n)
host=${host%%.*}
nodes=2
cpus=4          # of each node, whatever the machine has: tasks of tests mostly wait
port=${SLURM_TEST_PORT:-26817}

give_up() {
    echo "start.sh: $1" >&2
    tail -n 10 "$folder"/log/*.log >&2 2>/dev/null || true
    exit 3
}

wait_until() {  # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

running() {     # DAEMON: the process of its pid file lives, is that program, and was started for this folder
    local pid
    pid=$(cat "$folder/run/$1.pid" 2>/dev/null) || return 1
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q "${1%%.*} .*$folder/"
}

install_packages() {
    local log policy=/usr/sbin/policy-rc.d
    log=$(mktemp)
    # Packages start their daemons when they are installed, unless this file says no.
    [ -e $policy ] && policy= || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy; }
    local done=1
    {
        apt-get update || true
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 \
            munge slurmctld slurmd slurm-client
    } >"$log" 2>&1 || done=
    [ -z "$policy" ] || rm -f "$policy"
    [ -n "$done" ] || { tail -n 10 "$log" >&2; give_up "apt-get could not install Slurm"; }
    rm -f "$log"
}

# Slurm looks its own host up and asks for addresses of a kind that the machine has besides 127.0.0.1.
name_the_host() {
    mkdir -p "$folder/added"
    if command -v ip >/dev/null && [ -z "$(ip -o -4 addr show scope global 2>/dev/null)" ]; then
        ip addr add 198.51.100.1/32 dev lo 2>/dev/null && touch "$folder/added/address" || true
    fi
    if ! getent ahostsv4 "$host" >/dev/null; then
        echo "127.0.0.1 $host" >>/etc/hosts
        echo "127.0.0.1 $host" >"$folder/added/hosts"
    fi
}

write_configuration() {
    mkdir -p "$folder"/{run,log,state,munge}
    chmod 755 "$folder" "$folder/run"
    chmod 700 "$folder/munge"
    [ -s "$folder/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    # slurmd asks for a cgroup plugin even where no setting uses one, and cannot find out which without /sys/fs/cgroup.
    echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$port
SrunPortRange=$((port + 100))-$((port + 200))
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
OverTimeLimit=0
MinJobAge=3600
MaxArraySize=10001
AccountingStorageType=accounting_storage/none
NodeName=node[0-$((nodes - 1))] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1))-$((port + nodes)) CPUs=$cpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

start_daemons() {
    local socket=$folder/run/munge.socket node
    if ! running munged; then
        rm -f "$socket" "$socket.lock"
        munged --force --key-file="$folder/munge/key" --socket="$socket" --pid-file="$folder/run/munged.pid" \
            --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed" </dev/null >/dev/null 2>&1 ||
            give_up "munged does not start"
    fi
    wait_until 10 test -S "$socket" || give_up "munged has no socket"
    running slurmctld || slurmctld -f "$SLURM_CONF" </dev/null >"$folder/log/slurmctld.out" 2>&1 ||
        give_up "slurmctld does not start"
    wait_until 20 sh -c 'timeout 5 scontrol ping | grep -q "is UP"' || give_up "slurmctld does not answer"
    for node in $(seq 0 $((nodes - 1))); do
        running "slurmd.node$node" && continue
        mkdir -p "$folder/spool.node$node"
        slurmd -N "node$node" -f "$SLURM_CONF" </dev/null >"$folder/log/slurmd.out" 2>&1 || give_up "slurmd does not start"
    done
}

installed() {
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || return 1
    done
}

all_idle() { [ "$(timeout 5 sinfo -h -N -p main -t idle,mixed,alloc -o %N | wc -l)" = $nodes ]; }

[ "$(id -u)" = 0 ] || give_up "needs root"
if ! installed munged slurmctld slurmd sbatch squeue scontrol scancel sinfo; then
    command -v apt-get >/dev/null || give_up "no Slurm here, and no apt-get to install it with"
    install_packages
fi
export SLURM_CONF=$folder/slurm.conf
name_the_host
running slurmctld || write_configuration
start_daemons
wait_until 15 all_idle || scontrol update nodename=ALL state=resume 2>/dev/null || true
wait_until 15 all_idle || give_up "the nodes do not come up: $(sinfo -h -N -o '%N %T %E' | tr '\n' ';')"
echo "export SLURM_CONF=$SLURM_CONF"
