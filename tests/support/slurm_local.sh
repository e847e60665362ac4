#!/usr/bin/env bash
# slurm_local.sh: a real SLURM (slurmctld + N slurmd + private munged) on one machine,
# without systemd, everything under one work directory, stopped by recorded PID.
#
#   slurm_local.sh up     WORKDIR [--nodes N] [--cpus C] [--gpus G] [--net netns|ports] [--conf FILE]
#                             (FILE: extra slurm.conf lines; environment at first `up`: REQUEUE_DELAY=10
#                             KILL_WAIT=5 SLURMD_TIMEOUT=10 GRACE_TIME=15 seconds)
#   slurm_local.sh status WORKDIR
#   slurm_local.sh env    WORKDIR        # prints: export SLURM_CONF=...   (eval it)
#   slurm_local.sh stop-node  WORKDIR NODE   # fault injection: SIGKILL slurmd + its steps
#   slurm_local.sh start-node WORKDIR NODE
#   slurm_local.sh down   WORKDIR
#
# --net netns : every node has its own network + UTS + mount namespace, i.e. its own
#               hostname, eth0 and IP (needs root: CAP_NET_ADMIN + CAP_SYS_ADMIN).
# --net ports : every slurmd listens on 127.0.0.1 with its own port; works without root,
#               but all nodes share one hostname/IP/port space.
# Default: netns when root and it works, else ports.
#
# Debian packages: slurmctld slurmd slurm-client munge iproute2 util-linux
set -euo pipefail

PROG=${0##*/}
die() { echo "$PROG: $*" >&2; exit 1; }
log() { echo "$PROG: $*" >&2; }

find_bin() { # sbin is often not in PATH of normal users
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" || die "missing command: $1"
}

[[ $# -ge 2 ]] || { sed -n '2,/^$/p;/^set /q' "$0" | grep '^#' >&2; exit 2; }
CMD=$1; mkdir -p "$2"; W=$(cd "$2" && pwd -P); shift 2

NODES=2 CPUS=4 GPUS=8 NET=auto EXTRA_CONF=""
# shellcheck source=/dev/null
if [[ -f $W/state ]]; then . "$W/state"; fi

# ------------------------------------------------------------------ PID helpers
# A PID file holds "pid starttime"; the start time (field 22 of /proc/PID/stat) protects
# against PID reuse, so that we never signal a process that we did not start.
starttime() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; s=${s##*) }; read -ra s <<< "$s"; echo "${s[19]}"; }
remember() { echo "$2 $(starttime "$2")" > "$W/run/$1.pid"; }
alive() {
    local pid st now
    [[ -s $W/run/$1.pid ]] || return 1
    read -r pid st < "$W/run/$1.pid"
    now=$(starttime "$pid") || return 1
    [[ $now == "$st" && $(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null) != Z* ]]
}
pid_of() { cut -d' ' -f1 "$W/run/$1.pid"; }
stop() { # stop NAME [SIGNAL] [GRACE_SECONDS]
    local n=$1 sig=${2:-TERM} grace=${3:-10} i
    if alive "$n"; then
        kill -"$sig" "$(pid_of "$n")" 2>/dev/null || true
        for ((i = 0; i < grace * 20; i++)); do alive "$n" || break; sleep 0.05; done
        if alive "$n"; then log "$n did not stop, SIGKILL"; kill -KILL "$(pid_of "$n")" 2>/dev/null || true; fi
    fi
    rm -f "$W/run/$n.pid"
}
# Job steps daemonise away from slurmd (parent PID 1, environment blanked). They are found
# by the node's log file that every slurmstepd holds open, and, with namespaces, by the
# network namespace, which also catches processes that detached from their step.
node_pids() { # node_pids NODE
    local p ns
    ns=$(cat "$W/run/$1.netns" 2>/dev/null || true)
    for p in /proc/[0-9]*; do
        if [[ -n $ns && $(readlink "$p/ns/net" 2>/dev/null) == "$ns" ]]; then
            echo "${p#/proc/}"
        elif [[ $(cat "$p/comm" 2>/dev/null) == slurmstepd* ]] &&
            find "$p/fd" -maxdepth 1 -lname "$W/log/slurmd.$1.log" 2>/dev/null | grep -q .; then
            tree "${p#/proc/}"
        fi
    done | sort -un
}
kill_all() { local p; for p in "$@"; do kill -KILL "$p" 2>/dev/null || true; done; }
tree() { local c; for c in $(cat "/proc/$1/task/"*/children 2>/dev/null | tr ' ' '\n'); do tree "$c"; done; echo "$1"; }

node_name() { echo "node$1"; }
node_ip() { [[ $NET == netns ]] && echo "$SUBNET.$((10 + $1))" || echo 127.0.0.1; }

# ------------------------------------------------------------------ configuration
write_conf() {
    local me ctl_addr i
    me=$(id -un)
    ctl_addr=127.0.0.1; [[ $NET == netns ]] && ctl_addr=$SUBNET.1
    mkdir -p "$W"/{etc,run,log,ctld,spool}; chmod 700 "$W/ctld"
    if [[ ! -s $W/etc/munge.key ]]; then (umask 077; head -c 1024 /dev/urandom > "$W/etc/munge.key"); fi
    {
        echo "127.0.0.1 localhost"
        echo "$ctl_addr $(hostname -s)"
        for ((i = 1; i <= NODES; i++)); do echo "$(node_ip "$i") $(node_name "$i")"; done
    } > "$W/etc/hosts"
    cat > "$W/etc/slurm.conf" <<CONF
ClusterName=local
# must be this machine's own short host name, or slurmctld refuses to start
SlurmctldHost=$(hostname -s)($ctl_addr)
SlurmctldPort=$PORT
SlurmUser=$me
SlurmdUser=$me
# cred_expire is also the delay before a requeued job may start again (default 120 s)
AuthType=auth/munge
AuthInfo=socket=$W/run/munge.socket,cred_expire=${REQUEUE_DELAY:-10}
CredType=cred/munge
StateSaveLocation=$W/ctld
SlurmdSpoolDir=$W/spool/%n
SlurmctldPidFile=$W/run/slurmctld.own.pid
SlurmdPidFile=$W/run/slurmd.%n.own.pid
SlurmctldLogFile=$W/log/slurmctld.log
SlurmdLogFile=$W/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
# no cgroup, no cpu binding: works in containers, sandboxes and CI runners
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
# accept the CPUs/memory/GPUs written below, whatever this machine has
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
# preempt_send_user_signal: preemption sends the --signal of the job first (>=23.02: PreemptParameters=send_user_signal)
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2,preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=${KILL_WAIT:-5}
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=${SLURMD_TIMEOUT:-10}
MessageTimeout=10
TCPTimeout=5
InactiveLimit=0
Waittime=0
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$W/log/jobcomp.txt
CONF
    if ((GPUS > 0)); then
        echo "GresTypes=gpu" >> "$W/etc/slurm.conf"
        # Placeholder devices: sbatch --gpus-per-node works and every task gets
        # CUDA_VISIBLE_DEVICES, although there is no GPU. slurmd wants character devices;
        # a link to /dev/null is enough because nothing constrains devices here.
        mkdir -p "$W/dev"
        for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$W/dev/gpu$i"; done
        echo "NodeName=node[1-$NODES] Name=gpu File=$W/dev/gpu[0-$((GPUS - 1))]" > "$W/etc/gres.conf"
    else
        rm -f "$W/etc/gres.conf"
    fi
    for ((i = 1; i <= NODES; i++)); do
        local gres="" host
        ((GPUS > 0)) && gres=" Gres=gpu:$GPUS"
        if [[ $NET == netns ]]; then host=$(node_name "$i") port=$((PORT + 1)); else host=localhost port=$((PORT + i)); fi
        echo "NodeName=$(node_name "$i") NodeHostname=$host NodeAddr=$(node_ip "$i") Port=$port CPUs=$CPUS RealMemory=4096$gres State=UNKNOWN" >> "$W/etc/slurm.conf"
    done
    cat >> "$W/etc/slurm.conf" <<CONF
PartitionName=main Nodes=node[1-$NODES] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE_TIME:-15} OverSubscribe=NO
PartitionName=urgent Nodes=node[1-$NODES] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF OverSubscribe=NO
CONF
    [[ -z $EXTRA_CONF ]] || cat "$EXTRA_CONF" >> "$W/etc/slurm.conf"
}

save_state() {
    printf '%s=%q\n' NODES "$NODES" CPUS "$CPUS" GPUS "$GPUS" NET "$NET" PORT "$PORT" SUBNET "$SUBNET" BR "$BR" \
        EXTRA_CONF "$EXTRA_CONF" REQUEUE_DELAY "${REQUEUE_DELAY:-10}" KILL_WAIT "${KILL_WAIT:-5}" \
        SLURMD_TIMEOUT "${SLURMD_TIMEOUT:-10}" GRACE_TIME "${GRACE_TIME:-15}" > "$W/state"
}

# Several clusters may live on one machine: derive port, subnet and bridge from the path.
derive_ids() {
    local h; h=$(printf '%s' "$W" | cksum | cut -d' ' -f1)
    PORT=$((20000 + h % 400 * 20)); SUBNET="10.$((200 + h % 50)).$((h / 50 % 250))"; BR="sl$((h % 100000))"
}

netns_works() { [[ $(id -u) == 0 ]] && unshare --net --uts --mount true 2>/dev/null && ip link add slprobe$$ type bridge 2>/dev/null && ip link del slprobe$$; }

# ------------------------------------------------------------------ daemons
start_munged() {
    alive munged && return
    rm -f "$W/run/munge.socket"*
    # munged refuses group-writable directories on the path to its files unless --force
    setsid "$(find_bin munged)" --foreground --force --num-threads=2 --key-file="$W/etc/munge.key" \
        --socket="$W/run/munge.socket" --pid-file="$W/run/munged.own.pid" \
        --seed-file="$W/run/munged.seed" --log-file="$W/log/munged.log" >>"$W/log/munged.out" 2>&1 < /dev/null &
    remember munged $!
    wait_for 5 "munged" test -S "$W/run/munge.socket"
}
start_ctld() {
    alive slurmctld && return
    SLURM_CONF="$W/etc/slurm.conf" setsid "$(find_bin slurmctld)" -D -f "$W/etc/slurm.conf" >>"$W/log/slurmctld.out" 2>&1 < /dev/null &
    remember slurmctld $!
}
start_node() {
    local i=$1 n; n=$(node_name "$1")
    alive "slurmd.$n" && return
    mkdir -p "$W/spool/$n"
    local slurmd; slurmd=$(find_bin slurmd)
    if [[ $NET == netns ]]; then
        # The namespaces live exactly as long as slurmd and its job steps: nothing to clean up.
        # shellcheck disable=SC2016  # expanded inside
        SLURM_CONF="$W/etc/slurm.conf" setsid unshare --net --uts --mount --propagation private bash -c '
            set -e
            hostname "$1"
            mount --bind "$2/etc/hosts" /etc/hosts
            ip link set lo up
            for _ in $(seq 200); do [ -e "$2/run/$1.net" ] && break; sleep 0.05; done
            ip link show eth0 >/dev/null
            exec "$3" -D -N "$1" -f "$2/etc/slurm.conf"' _ "$n" "$W" "$slurmd" \
            >>"$W/log/slurmd.$n.out" 2>&1 < /dev/null &
        local pid=$!
        remember "slurmd.$n" $pid
        rm -f "$W/run/$n.net"
        # wait until the child is in its own network namespace
        wait_for 5 "namespace of $n" bash -c "[ \"\$(readlink /proc/$pid/ns/net)\" != \"\$(readlink /proc/self/ns/net)\" ]"
        ip link del "$BR-$i" 2>/dev/null || true
        ip link add "$BR-$i" type veth peer name eth0 netns "$pid"
        ip link set "$BR-$i" master "$BR" up
        nsenter -t "$pid" -n ip addr add "$(node_ip "$i")/24" dev eth0
        nsenter -t "$pid" -n ip link set eth0 up
        readlink "/proc/$pid/ns/net" > "$W/run/$n.netns"
        : > "$W/run/$n.net"
    else
        SLURM_CONF="$W/etc/slurm.conf" setsid "$slurmd" -D -N "$n" -f "$W/etc/slurm.conf" >>"$W/log/slurmd.$n.out" 2>&1 < /dev/null &
        remember "slurmd.$n" $!
    fi
}
wait_for() { # wait_for SECONDS WHAT CMD...
    local t=$1 what=$2 i n; shift 2
    for ((i = 0; i < t * 20; i++)); do
        "$@" >/dev/null 2>&1 && return
        for n in "$W"/run/*.pid; do # fail at once when a daemon has died
            n=${n##*/}; n=${n%.pid}
            [[ $n == *.own || $n == '*' ]] || alive "$n" || { tail -n 5 "$W"/log/"$n".* >&2 || true; die "$n died while waiting for: $what"; }
        done
        sleep 0.05
    done
    die "timeout after ${t}s: $what (see $W/log)"
}
all_idle() { [[ $(SLURM_CONF="$W/etc/slurm.conf" sinfo -h -p main -N -o '%T' | grep -cE '^(idle|mixed|allocated)$') == "$NODES" ]]; }

case $CMD in
up)
    while [[ $# -gt 0 ]]; do
        case $1 in
        --nodes) NODES=$2; shift 2 ;; --cpus) CPUS=$2; shift 2 ;; --gpus) GPUS=$2; shift 2 ;;
        --net) NET=$2; shift 2 ;; --conf) EXTRA_CONF=$(readlink -f "$2"); shift 2 ;;
        *) die "unknown option $1" ;;
        esac
    done
    for b in munged slurmctld slurmd sinfo; do find_bin "$b" >/dev/null; done
    [[ -n ${PORT:-} ]] || derive_ids
    if [[ $NET == auto ]]; then if netns_works; then NET=netns; else NET=ports; fi; fi
    write_conf; save_state
    if [[ $NET == netns ]] && ! ip link show "$BR" >/dev/null 2>&1; then
        ip link add "$BR" type bridge; ip addr add "$SUBNET.1/24" dev "$BR"; ip link set "$BR" up
    fi
    start_munged; start_ctld
    for ((i = 1; i <= NODES; i++)); do start_node "$i"; done
    # A restart after an unclean stop can leave nodes "down": resume them.
    wait_for 30 "slurmctld" env SLURM_CONF="$W/etc/slurm.conf" scontrol ping
    wait_for 60 "nodes idle" all_idle
    log "up: $NODES nodes, net=$NET; export SLURM_CONF=$W/etc/slurm.conf"
    ;;
down)
    for f in "$W"/run/slurmd.*.pid; do
        [[ $f == *.own.pid || ! -e $f ]] && continue
        n=${f##*/}; stop "${n%.pid}" TERM 5
    done
    for ((i = 1; i <= NODES; i++)); do # shellcheck disable=SC2046
        kill_all $(node_pids "$(node_name "$i")")
    done
    stop slurmctld TERM 10
    stop munged TERM 5
    if [[ -n ${BR:-} && $NET == netns ]]; then
        for ((i = 1; i <= NODES; i++)); do ip link del "$BR-$i" 2>/dev/null || true; done
        ip link del "$BR" 2>/dev/null || true
    fi
    rm -f "$W"/run/*.net "$W"/run/*.netns "$W"/run/*.own.pid "$W"/run/munge.socket*
    log "down"
    ;;
stop-node) # a crash: daemon and all its processes vanish at once
    n=$1
    pids=$(node_pids "$n")
    stop "slurmd.$n" KILL 2
    # shellcheck disable=SC2086
    kill_all $pids
    log "$n killed"
    ;;
start-node) start_node "${1#node}" ;;
env) echo "export SLURM_CONF=$W/etc/slurm.conf" ;;
status)
    rc=0
    for n in munged slurmctld $(for ((i = 1; i <= NODES; i++)); do echo "slurmd.$(node_name "$i")"; done); do
        if alive "$n"; then echo "$n: running (pid $(pid_of "$n"))"; else echo "$n: stopped"; rc=1; fi
    done
    [[ $rc != 0 ]] || SLURM_CONF="$W/etc/slurm.conf" sinfo -N -p main
    exit $rc
    ;;
*) die "unknown command $CMD" ;;
esac
