#!/usr/bin/env bash
# Runs a training job again and again until it is complete, by hand or in SLURM.
#
#   ./autoresume.sh [OPTIONS] COMMAND...
#   ./autoresume.sh python ft_launcher.py --nproc-per-node=4 --max-restarts=3 train.py
#
#   --max-failures N  end after N runs in a row without a further checkpoint (3)
#   --flag FILE       FLAG, if not ft_finished.flag or, in a job array, ft_finished_TASK.flag
#   --slurm MODE      who does the next run after exit code 0 in a SLURM job:
#     chain           the next job, queued at once to start however this one ends (default)
#     requeue         this job, requeued
#     loop            this job, as after other exit codes
#   --sbatch OPTIONS  for the next job, which has the script's #SBATCH lines and arguments
#   --keep-bad-nodes  let the next job use them
#
# Exit code 0 may mean "saved, to be continued": only FLAG says that training is complete.
#   FLAG           ends this with 0; COMMAND finds its path in $FAULT_TOL_FINISHED_FLAG_FILE
#   FLAG.gave_up   why another run is pointless; ends this with 93, as exit code 93 does
#   FLAG.progress  the newest checkpoint's "step"
#   FLAG.stop      asks COMMAND to save a checkpoint and exit; the next run resumes
#   FLAG.bad_nodes nodes that the next jobs avoid for a day: "host", "reason", "time"
#   FLAG.runs      how each run started and ended
#   FLAG.lock      locked during a run; FLAG.job: the job script
#
# Signals reach COMMAND, which is waited for and starts with USR1 and USR2 ignored.
#   TERM, INT, HUP  end this with 128+N; scancel also cancels the next job
#   USR1            creates FLAG.stop and ends this with 0 (#SBATCH --signal=B:USR1@300)
# In SLURM, end the job script with "exec ./autoresume.sh ...", so that signals arrive here.

set -uo pipefail
shopt -s lastpipe # for "command | read": bash 5.2 may lose a signal while it parses a $(...)
exec 3>&2

say() { printf '[autoresume] %s\n' "$*" >&3; }
usage_error() { say "error: $*" && exit 2; }

parse_arguments() {
  max_failures=3 mode=chain sbatch_options=() keeps_bad_nodes=''
  flag=ft_finished${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}.flag
  flag=${FAULT_TOL_FINISHED_FLAG_FILE:-$flag}
  while [[ ${1:-} == -* ]]; do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
      --max-failures) max_failures=${2:-} ;;
      --flag) flag=${2:-} ;;
      --slurm) mode=${2:-} ;;
      --sbatch) eval "sbatch_options+=(${2:-})" || usage_error "--sbatch: cannot split '$2'" ;;
      --keep-bad-nodes) keeps_bad_nodes=yes && shift && continue ;;
      -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;;
      --) shift && break ;;
      *) usage_error "unknown option $1: see --help" ;;
    esac
    shift $(($# > 1 ? 2 : 1))
  done
  command=("$@")
}

check_arguments() {
  [[ $max_failures =~ ^[1-9][0-9]*$ ]] ||
    usage_error "--max-failures: got '$max_failures', expected 1 or more"
  [[ $mode =~ ^(chain|requeue|loop)$ ]] ||
    usage_error "--slurm: got '$mode', expected chain, requeue or loop"
  type -P -- "${command[0]:-}" >/dev/null || usage_error "command '${command[0]:-}' not found"
  [[ $flag == /* ]] || flag=$PWD/$flag
  if [[ -d $flag ]] || ! { : >>"$flag.lock"; } 2>/dev/null; then
    usage_error "--flag: got '$flag', expected a file in a writable directory"
  fi
}

# Set a variable to a member of a file's JSON object: text without its quotes.
read_member() { # VARIABLE FILE NAME
  local line='' pattern="\"$3\": *(\"(([^\"\\\\]|\\\\.)*)\"|([^\",}]*))"
  IFS= read -r line 2>/dev/null <"$2"
  [[ $line =~ $pattern ]]
  printf -v "$1" %s "${BASH_REMATCH[2]:-${BASH_REMATCH[4]:-}}"
}

note() { # TEXT...
  say "$*"
  printf '%(%FT%T%z)T job %s run %d step %s failures %d next %s: %s\n' \
    -1 "${job:--}" "$run" "${step:--}" "$failures" "${continuation:--}" "$*" >>"$flag.runs"
}

end() { # EXIT_CODE REASON
  note "$2"
  exit "$1"
}

end_chain() { cancel_continuation && end "$@"; }

take_lock() {
  local holder waits=0
  exec 9<>"$flag.lock" # COMMAND inherits it: the lock outlives a kill of this shell
  until flock --timeout 1 9; do
    (($? == 1)) || return # a file system without locks
    heed_signals
    [[ -z $stop_code$handing_over ]] || exit "${stop_code:-0}"
    IFS= read -r holder <"$flag.lock"
    ((waits++)) || say "waiting for another run, which holds $flag.lock: $holder"
    # A continuation waits as long as it takes.
    ((waits < 60 || run)) || end_chain 1 "another run still holds $flag.lock"
  done
  trap 'flock --unlock 9' EXIT # whatever COMMAND has left running
  echo "pid $$ on $HOSTNAME${job:+, job $job}, or what it started" >"$flag.lock"
}

# Set `info` to what SLURM shows of a job.
show() { # JOB
  scontrol show job "$1" 2>/dev/null | IFS= read -r -d '' info
  [[ -n $info ]]
}

know_job() {
  job=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  # In a terminal, as of a notebook's job, the job script is another one.
  [[ -n $job && ! -t 0 ]] && type -P sbatch >/dev/null || mode=loop
  if [[ -n $job ]] && grep -qz '/slurm_script$' "/proc/$PPID/cmdline" ||
    { ((PPID == 1)) && grep -qx '[a-z]*sh' /proc/1/comm; }; then
    say "warning: signals will not arrive here: end the script with exec ./autoresume.sh ..."
  fi
}

# Learn what the job before did, or this one before a requeue.
recall() {
  local earlier='' runs noted failed next=''
  read_member step "$flag.progress" step
  tail -n 1 -- "$flag.runs" 2>/dev/null | read -r _ _ earlier _ runs _ noted _ failed _ next _
  if [[ $mode == loop || $earlier != "$job" && $next != "${job%_*}:" ]]; then
    rm -f -- "$flag.gave_up" # whoever starts a job wants to try again
    return
  fi
  [[ $runs:$failed:$noted =~ ^[1-9][0-9]*:(0|[1-9][0-9]*):(-|[0-9]{1,18})$ ]] || return
  run=$runs
  [[ $noted == - ]] || best=$((10#$noted))
  [[ ${step:--} != "$noted" ]] || failures=$failed
}

# Queue one; none again if the user cancels it.
keep_continuation() {
  [[ $mode == chain ]] || return
  find_continuation
  if [[ -z $queued$continuation ]]; then
    queue_continuation || say "no continuation is queued yet"
    find_continuation && exclude_bad_nodes
    warn_of_differences
  fi
  queued+=$continuation
}

# A requeue leaves one behind, and so may an sbatch that fails.
find_continuation() {
  squeue --me --noheader --states PENDING --format '%A %E( %o ' |
    grep -F -- " afterany:$job(" | grep -F -- " $flag.job " | read -r continuation _
}

queue_continuation() {
  local arguments variables=("${!SLURM_@}") # would confuse srun in the next job
  show "$job" && scontrol write batch_script "$job" "$flag.job" >/dev/null || return
  find_arguments
  env --chdir="$SLURM_SUBMIT_DIR" "${variables[@]/#/--unset=}" \
    ${SLURM_CONF:+SLURM_CONF="$SLURM_CONF"} sbatch --dependency="afterany:$job" \
    --job-name="$SLURM_JOB_NAME" ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"} \
    --open-mode=append "${sbatch_options[@]}" "$flag.job" "${arguments[@]}"
}

# SLURM shows script and arguments as one text. Where our own end like it, as with "$@", it counts.
find_arguments() {
  local path text i
  [[ $info =~ Command=([^$'\n']*) ]]
  text=${BASH_REMATCH[1]} path=$text
  until [[ -f $path || $path != *' '* ]]; do path=${path% *}; done
  text=${text:${#path}}
  read -r -a arguments <<<"$text"
  for i in "${!our_arguments[@]}"; do
    [[ " ${our_arguments[*]:i}" != "$text" ]] || arguments=("${our_arguments[@]:i}")
  done
}

# Keep nodes found bad within a day from the next job: at most a quarter of its partition, or one.
exclude_bad_nodes() {
  local bad=() line since total most info
  [[ -n $continuation && -z $keeps_bad_nodes && -s $flag.bad_nodes ]] && show "$continuation" ||
    return 0
  [[ $info =~ \ Partition=([^[:space:]]*).*\ ExcNodeList=([^[:space:]]*).*\ NumNodes=([0-9]*) ]]
  [[ -v excluded ]] || excluded=${BASH_REMATCH[2]#(null)} # by the user
  sinfo --noheader --Node --partition "${BASH_REMATCH[1]}" --format %N | wc -l | read -r total
  most=$((total < 8 ? 1 : total / 4))
  ((total - most >= BASH_REMATCH[3])) || most=0
  date --date='1 day ago' +%FT%T | read -r since
  tac -- "$flag.bad_nodes" | while IFS= read -r line; do
    [[ $line =~ '"time": "'([^\"]*)'", "host": "'([^\"]*) && ${BASH_REMATCH[1]} > $since ]] &&
      [[ " ${bad[*]} " != *" ${BASH_REMATCH[2]} "* ]] && bad+=("${BASH_REMATCH[2]}")
  done
  ((${#bad[@]})) || return 0
  say "bad nodes: ${bad[*]}; job $continuation does without the newest, at most $most of $total:" \
    "see $flag.bad_nodes"
  bad=("${bad[@]:0:most}" ${excluded:+"$excluded"})
  printf -v line '%s,' "${bad[@]}"
  scontrol update "JobId=$continuation" "ExcNodeList=${line%,}"
}

warn_of_differences() {
  local ours=$info pair here there differences=''
  local slurm_and_sbatch_names='TimeLimit:time Partition:partition Account:account QOS:qos
    NumNodes:nodes NumTasks:ntasks CPUs/Task:cpus-per-task MinMemoryNode:mem Requeue:requeue
    MinMemoryCPU:mem-per-cpu TresPerJob:gpus TresPerNode:gpus-per-node TresPerTask:gpus-per-task
    Features:constraint OverSubscribe:exclusive WorkDir:chdir Reservation:reservation
    ReqNodeList:nodelist ExcNodeList:exclude'
  [[ -n $continuation ]] && show "$continuation" || return
  for pair in $slurm_and_sbatch_names; do
    [[ $ours =~ \ ${pair%:*}=([^[:space:]]*) ]]
    here=${BASH_REMATCH[1]:-none}
    [[ $info =~ \ ${pair%:*}=([^[:space:]]*) ]]
    there=${BASH_REMATCH[1]:-none}
    # A job that waits may show several partitions, or a range of nodes.
    [[ ",$there," == *,"$here"[,-]* ]] ||
      differences+=", --${pair#*:} ($here here, $there there)"
  done
  [[ -z $differences ]] || say "warning: job $continuation differs in${differences#,}:" \
    "write #SBATCH lines, or --sbatch 'OPTIONS'"
}

cancel_continuation() {
  [[ $mode != chain || -n $continuation ]] || find_continuation
  [[ -z $continuation ]] || scancel "$continuation"
  continuation='' mode=loop
}

# Act on the signals that the traps have noted.
heed_signals() {
  local signal arrived restarts=" Restarts=${SLURM_RESTART_COUNT:-0} "
  arrived=$signals signals='' # in one command: no trap runs in between
  for signal in $arrived; do
    say "got SIG$signal"
    if [[ -n $child ]]; then
      [[ $signal != USR1 ]] || : >"$flag.stop"
      kill -s "$signal" -- "-$child"
      kill -s CONT -- "-$child" # a stopped process hears nothing else
    fi
    # Other TERMs of SLURM's leave a reason, a time or a count.
    if [[ $signal == TERM && $mode == chain ]] && show "$job" &&
      [[ $info == *JobState=C*" Reason=None "*"$restarts"*PreemptTime=None* ]]; then
      say "the job was cancelled: cancelling its continuation $continuation"
      cancel_continuation
    fi
  done
}

run_command() {
  set -m # gives it a process group of its own
  (trap '' USR1 USR2 && exec "${command[@]}" </dev/null 2>&3 3>&-) &
  child=$!
  set +m
  # Not "wait" alone: of two signals that interrupt it, bash 5.2 may lose one.
  while kill -0 "$child"; do
    sleep 0.2 # not less: until its exec, the child may swallow signals
    heed_signals
  done
  wait "$child"
  status=$?
  child=''
}

# Whether there is a checkpoint further than all of this job's before.
has_progressed() {
  local before=$step
  read_member step "$flag.progress" step
  [[ $step != "$before" && $step =~ ^[0-9]{1,18}$ ]] && ((10#$step > best)) && best=$((10#$step))
}

run_once() {
  run=$((run + 1)) failures=$((failures + 1)) # until it shows progress
  note "run $run starts"
  SECONDS=0
  run_command 2>/dev/null # where bash says "Killed"
  # A command that tells of no checkpoints shows by its time that it works.
  has_progressed || ((!status && !${#step} && SECONDS >= 60)) && failures=0
  note "run $run ended with exit code $status after $SECONDS s, newest checkpoint:" \
    "${step:-none}, failures in a row: $failures of $max_failures"
  exclude_bad_nodes
  # SLURM may end the steps of a job before the job, to preempt it.
  [[ $mode == loop ]] || ! show "$job" || [[ $info == *JobState=RUNNING*PreemptTime=None* ]] ||
    handing_over=yes
}

end_if_over() {
  local reason
  if [[ -e $flag ]]; then
    read_member reason "$flag" reason
    ((run)) || say "for another training, remove $flag, or give --flag"
    end_chain 0 "training is complete: $flag${reason:+ ($reason)}"
  elif [[ $status == 93 || -e $flag.gave_up ]]; then
    read_member reason "$flag.gave_up" reason
    end_chain 93 "gave up: ${reason:-the command exited with 93}"
  elif [[ $status == 2 && $run == 1 ]]; then
    end_chain 2 "exit code 2 of the first run: wrong usage"
  elif [[ -n $stop_code ]]; then
    heed_signals # one that has just come may cancel the continuation
    end "$stop_code" "stopped${continuation:+: job $continuation continues}"
  elif ((failures >= max_failures)); then
    end_chain $((status ? status : 1)) "$failures runs in a row without progress: giving up"
  fi
}

# Leave the next run to the next job.
hand_over() {
  [[ -z $continuation ]] || end 0 "job $continuation continues from here"
  if [[ $mode == requeue ]]; then
    scontrol requeue "$job" || [[ -n $signals ]] && end 0 "requeued" # SLURM sends TERM at once
    say "cannot requeue job $job: doing all runs in this job"
    mode=loop
  fi
  [[ -z $handing_over ]] || end 0 "stopped as asked: run this again to continue"
}

main() {
  our_arguments=("$@")
  parse_arguments "$@"
  check_arguments
  child='' signals='' stop_code='' handing_over='' status='' run=0 failures=0
  continuation='' queued='' step='' best=-1
  know_job
  recall
  end_if_over
  trap 'signals+=" TERM" stop_code=143' TERM
  trap 'signals+=" INT" stop_code=130' INT
  trap 'signals+=" HUP" stop_code=129' HUP
  trap 'signals+=" USR1" handing_over=yes' USR1
  trap 'signals+=" USR2"' USR2
  keep_continuation
  take_lock
  export FAULT_TOL_FINISHED_FLAG_FILE=$flag
  while true; do
    rm -f -- "$flag.stop" # meant for an earlier run
    heed_signals
    end_if_over
    keep_continuation
    [[ $status != 0 && -z $handing_over ]] || hand_over
    [[ -n $stop_code ]] || run_once
  done
}

main "$@"
