#!/bin/bash
# A Slurm of one machine, to try recipes and cluster profiles on before a real cluster sees them.
usage() { cat <<'END'
usage: one_machine.sh start DIR [--nodes N] [--cpus N] [--gpus N] [--until-end-of PID]
       one_machine.sh stop DIR
       one_machine.sh kill-node | kill-slurmd | start-node DIR NUMBER
       one_machine.sh install

start        one controller and N nodes (2), each with its own host name, processes and Slurm daemon; everything they
             write is in DIR, which must not exist. Prints the line that points Slurm's commands at them.
             --cpus, --gpus: what a node claims to have (96 and 0); the GPUs are only names.
             --until-end-of: stop by itself when this process has ended.
stop         end what start has started, jobs included, and remove DIR
kill-node    a node loses its power: its daemon and all tasks are gone at once
kill-slurmd  only its daemon dies; tasks live on
start-node   it comes back, after either
install      Debian's packages, where they are missing; start does this by itself

Needs root, on Debian 12 or a relative of it. Exit status: 0 done, 1 failed, 2 not possible here.
END
}
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
declare -A PACKAGES=([slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [munged]=munge)
SECONDS_TO_START=60

fail() { echo "one_machine.sh: $*" >&2; exit 1; }
refuse() { echo "one_machine.sh: $*" >&2; exit 2; }

install() {
  [ "$EUID" = 0 ] || refuse "needs root"
  local missing=() program
  for program in "${!PACKAGES[@]}"; do
    command -v "$program" >/dev/null || missing+=("${PACKAGES[$program]}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || refuse "no apt-get here: install Slurm and munge first (on Debian ${missing[*]})"
  echo "installing ${missing[*]}" >&2
  local get=(env DEBIAN_FRONTEND=noninteractive apt-get --yes --quiet --no-install-recommends install "${missing[@]}")
  # A machine that was never asked for packages has no lists of them yet.
  { "${get[@]}" || { apt-get --quiet update && "${get[@]}"; }; } >&2 </dev/null ||
    refuse "${missing[*]} could not be installed"
}

# --- processes: what is started is known by its number and its time of start, so that nothing else is ever ended ------

born() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }'; }

launch() { # launch NAME COMMAND...: a daemon, its number in DIR/pids/NAME
  local name=$1; shift
  setsid "$@" >"$DIR/log/$name.out" 2>&1 </dev/null 9>&- &
  echo "$! $(born $!)" >"$DIR/pids/$name"
}

running() { # running NAME: print its number, if it is still that process
  local pid since
  read -r pid since 2>/dev/null <"$DIR/pids/$1" || return 1
  [ -n "$since" ] && [ "$(born "$pid")" = "$since" ] && echo "$pid"
}

end() { # end NAME SIGNAL: and wait until it is gone
  local pid i
  if pid=$(running "$1"); then
    kill "-$2" "$pid" 2>/dev/null || true
    for ((i = 0; i < 200; i++)); do
      running "$1" >/dev/null || break
      [ $i != 100 ] || kill -KILL "$pid" 2>/dev/null || true
      sleep 0.05
    done
  fi
  rm -f "$DIR/pids/$1"
}

wait_for() { # wait_for WHAT COMMAND...
  local what=$1 end=$((SECONDS + SECONDS_TO_START)); shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || fail "$what: not within $SECONDS_TO_START s; see $DIR/log"
    sleep 0.05
  done
}

# --- the cluster ------------------------------------------------------------------------------------------------------

free_ports() { # print the first of 100 ports in a row that nobody listens on
  local base port used
  used=" $(awk '$4 == "0A" { split($2, a, ":"); print a[2] }' /proc/net/tcp /proc/net/tcp6 2>/dev/null | tr '\n' ' ')"
  for ((base = 16800; base < 19900; base += 100)); do
    for ((port = base; port < base + 100; port++)); do
      [[ $used != *" $(printf %04X "$port") "* ]] || continue 2
    done
    echo "$base"
    return
  done
  fail "no ports left"
}

write_settings() { # write_settings NODES CPUS GPUS
  local nodes=$1 cpus=$2 gpus=$3 port i gres=""
  port=$(free_ports)
  mkdir -p "$DIR"/{log,pids,state,spool,munge,dev}
  head -c 128 /dev/urandom >"$DIR/munge/key"
  chmod 600 "$DIR/munge/key"
  { echo "127.0.0.1 localhost $HOSTNAME"; for ((i = 1; i <= nodes; i++)); do echo "127.0.0.1 node$i"; done; } >"$DIR/hosts"
  # Without a plugin named here slurmd looks for one, and refuses to start where no cgroups are mounted.
  echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf"
  if [ "$gpus" -gt 0 ]; then
    gres="Gres=gpu:$gpus"
    for ((i = 0; i < gpus; i++)); do mknod "$DIR/dev/gpu$i" c 1 3; done
    printf 'AutoDetect=off\nName=gpu File=%s\n' "$DIR/dev/gpu[0-$((gpus - 1))]" >"$DIR/gres.conf"
  fi
  {
    cat <<END
ClusterName=one-machine
SlurmctldHost=$HOSTNAME(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits one second longer than credentials live; 5 is the least, 120 the default.
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/state/slurmctld.pid
SlurmdPidFile=$DIR/spool/%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/%n.log

# No systemd, no cgroups, no accounting.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE

# Nodes claim more than there is.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core

# Nobody likes to wait for a trial.
SchedulerParameters=sched_min_interval=0,sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdTimeout=10
ReturnToService=2
# How long squeue remembers jobs that have ended.
MinJobAge=3600

# A job in the partition urgent takes nodes from those in main, which get SIGTERM and have GraceTime to save.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
END
    [ -z "$gres" ] || echo "GresTypes=gpu"
    for ((i = 1; i <= nodes; i++)); do
      echo "NodeName=node$i NodeAddr=127.0.0.1 Port=$((port + 1 + i)) CPUs=$cpus RealMemory=64000 $gres"
    done
    echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60"
    echo "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF"
  } >"$DIR/slurm.conf"
}

start_node() { # a node is a host name, a view of /etc/hosts and a tree of processes, of which bash is the first
  ! running "node$1" >/dev/null || { start_slurmd "$1"; return; }
  launch "node$1" unshare --mount --uts --pid --fork --kill-child=KILL --mount-proc bash -c '
    mount --bind "$1/hosts" /etc/hosts; hostname "node$2"
    slurmd -D -N "node$2" & while :; do wait -n 2>/dev/null || sleep 0.2; done' node "$DIR" "$1"
}

first_process() { # the first process of a node, under the number it has outside
  local outer
  outer=$(running "node$1") || fail "node$1 is not there"
  tr -d ' ' <"/proc/$outer/task/$outer/children"
}

slurmd_of() {
  local child
  for child in $(cat "/proc/$(first_process "$1")/task"/*/children); do
    [ "$(cat "/proc/$child/comm" 2>/dev/null)" != slurmd ] || echo "$child"
  done
}

start_slurmd() {
  [ -z "$(slurmd_of "$1")" ] || fail "node$1 is up"
  launch "slurmd$1" nsenter --target "$(first_process "$1")" --mount --uts --pid slurmd -D -N "node$1"
}

idle() { [ "$(sinfo --noheader --states=idle --format=%D)" = "$1" ]; }

start() {
  local nodes=2 cpus=96 gpus=0 until="" i
  while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || refuse "$1 needs a value"
    case $1 in
      --nodes) nodes=$2 ;; --cpus) cpus=$2 ;; --gpus) gpus=$2 ;; --until-end-of) until=$2 ;;
      *) usage >&2; refuse "unknown option $1" ;;
    esac
    shift 2
  done
  [ "$nodes" -le 90 ] || refuse "at most 90 nodes"
  install
  [ ! -e "$DIR" ] || refuse "$DIR exists"
  unshare --mount --uts --pid --fork --mount-proc true 2>/dev/null || refuse "this machine allows no namespaces"
  exec 9<"$0"
  flock 9  # two that start at once would find the same ports free
  write_settings "$nodes" "$cpus" "$gpus"
  trap abandon EXIT
  # --force: munged would like folders that others may enter; only root is here.
  launch munged munged --foreground --force --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" \
    --pid-file="$DIR/munge/pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed"
  wait_for munged test -S "$DIR/munge/socket"
  launch slurmctld slurmctld -D
  for ((i = 1; i <= nodes; i++)); do start_node "$i"; done
  wait_for "$nodes idle nodes" idle "$nodes"
  exec 9<&-
  [ -z "$until" ] || launch guard bash -c '
    while [ "$(sed "s/.*) //" "/proc/$1/stat" 2>/dev/null | awk "\$1 != \"Z\" { print \$20 }")" = "$2" ]; do sleep 1; done
    exec "$3" stop "$4"' guard "$until" "$(born "$until")" "$(realpath "$0")" "$DIR"
  trap - EXIT
  echo "export SLURM_CONF=$DIR/slurm.conf"
}

abandon() { # what is left of a start that failed
  local status=$?
  tail -n 5 "$DIR"/log/*.log >&2 || true
  stop
  exit "$status"
}

stop() {
  local name
  [ -f "$DIR/slurm.conf" ] && [ -d "$DIR/pids" ] || refuse "$DIR holds no Slurm of this script"
  [ "$(running guard || true)" = "$$" ] || end guard TERM
  for name in $(ls "$DIR/pids" | grep -E '^(node|slurmd)'); do end "$name" KILL; done
  end slurmctld TERM
  end munged TERM
  rm -rf "$DIR"
}

[ $# -gt 0 ] || { usage; exit 2; }
command=$1; shift
case $command in
  install) install; exit ;;
  -h | --help) usage; exit ;;
  start | stop | kill-node | kill-slurmd | start-node) ;;
  *) usage >&2; refuse "unknown command $command" ;;
esac
[ $# -gt 0 ] || refuse "$command: which DIR?"
[ "$EUID" = 0 ] || refuse "needs root"
DIR=$(realpath -m "$1"); shift
export SLURM_CONF=$DIR/slurm.conf
case $command in
  start) start "$@" ;;
  stop) stop ;;
  *)
    [ -d "$DIR/pids" ] && [ $# = 1 ] || refuse "$command DIR NUMBER"
    case $command in
      kill-node) end "node$1" KILL ;;
      kill-slurmd) kill -KILL $(slurmd_of "$1") ;;
      start-node) start_node "$1" ;;
    esac ;;
esac
